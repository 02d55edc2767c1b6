"""What the counters of an engine that serves a pair say, beside what this project finds, and why the two may differ."""

from typing import NamedTuple

from drafter.metrics import Estimate
from experiments.reporting.tabular import Table, with_interval

TITLE = "The engine's own counters"
NAMES = {"llama-server": "llama-server", "vllm": "vLLM", "sglang": "SGLang"}
COUNTING = {
    "llama-server": (
        "llama-server reports drafted and accepted tokens; target calls follow from them and from γ. A draft that ends "
        "the text is not among its accepted ones. Its time is that after the first token."
    ),
    "vllm": (
        "vLLM counts the target calls that have drafts, and also counts accepted drafts after the end of a text; its "
        "own mean acceptance length is 1 + accepted drafts / target calls. Its time is that from the first token to "
        "the last."
    ),
    "sglang": (
        "SGLang counts target calls; its own `spec_accept_length` also has the first token, which needs no draft. It "
        "reports the time of a complete request alone, so that its token rates have the reading of the prompt."
    ),
}
NEAR = 0.02  # two τ agree if they differ by at most this share
FEWER = 0.1  # so much less than γ, as a share, are drafts missing that the end of a text does not explain


class EngineFigures(NamedTuple):
    """What an engine counted, pooled over prompts, and what this project finds at the same γ. All of it is greedy.

    Attributes:
        engine: llama-server, vllm or sglang.
        gamma: γ of the server.
        tau: τ after the first token, by the engine's counters.
        accepted: the share of drafted tokens that the engine counts as accepted.
        drafts_per_call: drafted tokens per target call.
        rate: tokens per second with the drafter, in the time that the engine reports.
        rate_alone: the same of the server without the drafter; None if there is none.
        ratio: of the two.
        own_tau: τ here, counted in the same way.
        own_speedup: the measured speed-up here; None if this γ was not decoded.
        own_prediction: the predicted one.
        equal: the number of the engine's texts that are the target's own here, and of all texts.
    """

    engine: str
    gamma: int
    tau: Estimate
    accepted: float
    drafts_per_call: float
    rate: float
    rate_alone: float | None
    ratio: Estimate | None
    own_tau: float
    own_speedup: Estimate | None
    own_prediction: float
    equal: tuple[int, int]


def engine_paragraphs(found: EngineFigures) -> list[str]:
    """Return the paragraphs of the page: what was asked, how the engine counts, and why the two τ may differ."""
    equal, texts = found.equal
    asked = (
        f"{NAMES[found.engine]} with γ = {found.gamma} answered the same {texts} prompts greedily. {equal} of its "
        f"texts are the target's own. τ is counted after the first token, which comes from the call that reads the "
        f"prompt, for both. The share of accepted drafts is the engine's own."
    )
    if found.ratio is None:
        asked += " There was no server without the drafter (`measure.url_alone`), so that it has no ratio."
    return [asked, COUNTING[found.engine], comparison(found)]


def comparison(found: EngineFigures) -> str:
    """Return one sentence on whether the two τ agree, and what may have made them differ."""
    name, values = NAMES[found.engine], f"{found.tau.value:.2f} in the engine, {found.own_tau:.2f} here"
    if abs(found.tau.value - found.own_tau) <= NEAR * found.own_tau:
        return f"τ agrees: {values}."
    reasons = []
    if found.drafts_per_call < (1 - FEWER) * found.gamma:
        reasons.append(
            f"{name} drafts {found.drafts_per_call:.1f} tokens per target call and not {found.gamma}, as with a least "
            f"probability of drafts"
        )
    equal, texts = found.equal
    if equal < texts:
        reasons.append(
            f"{texts - equal} of {texts} texts are others, because the weights or the arithmetic of the server are "
            f"rounded in another way, such as to half precision or 8 bits, or because it has other models"
        )
    else:
        reasons.append(
            "the weights or the arithmetic of the server's drafter are rounded in another way, or it is another"
        )
    return (
        f"τ differs: {values}. The acceptance rule is no reason at temperature 0, where all rules are one; this may be "
        f"one: {'; and '.join(reasons)}."
    )


def engine_table(found: EngineFigures) -> Table:
    """Return the table of the engine and of this project."""
    columns = ["greedy", "τ", "accepted", "tokens/s with the drafter", "tokens/s without", "ratio"]
    alone = "" if found.rate_alone is None else f"{found.rate_alone:.1f}"
    engine = [with_interval(found.tau), f"{found.accepted:.0%}", f"{found.rate:.1f}", alone, with_interval(found.ratio)]
    own = with_interval(found.own_speedup) or f"{found.own_prediction:.2f} (predicted)"
    rows = [[NAMES[found.engine], *engine], ["this project", f"{found.own_tau:.2f}", "", "", "", own]]
    return Table("engine", TITLE, columns, rows)
