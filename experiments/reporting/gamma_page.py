"""Write the page on which gamma pays: a row for each task and gamma, and a verdict for each task."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from drafter.metrics import Estimate
from experiments.reporting.results import RATIO
from experiments.reporting.tabular import Table, with_interval

if TYPE_CHECKING:
    from drafter.decoding.timings import CallTimings


# How a block's cost differs from cγ + v(γ) where drafts are proposed without a model.
BLOCKS = {
    "alone": "Drafts are proposed without a model: a block costs c + v(n) with its own number n of drafts, v(0) = 1.",
    "beside a model": "A block whose drafts are proposed without the model costs v(n) with its own number n of drafts.",
}


class GammaRow(NamedTuple):
    """A task at one gamma: block efficiency, the cost of a block in target calls, the speed-ups, and the prompts."""

    task: str
    gamma: int
    block_efficiency: float
    cost: float
    predicted: float
    measured: Estimate | None  # None: not decoded
    prompts: int | None = None  # None: not known


def gamma_page(
    rows: list[GammaRow],
    timings: "CallTimings",
    drafter: str,
    compiled: bool,
    widths: Mapping[int, int],
    rule: str = RATIO,
    without_model: str | None = None,
    plain_alone: bool = False,
    greedy: tuple[int, int] = (0, 0),
) -> str:
    """Return the page in Markdown.

    Args:
        rows: all tasks and gammas.
        timings: the call timings that the predictions rest on.
        drafter: the name of the drafter.
        compiled: whether both models were compiled.
        widths: number of tokens -> number to which target calls were padded.
        rule: the acceptance rule above temperature 0, which the page names unless it is the paper's.
        without_model: whether drafts are proposed without a model, "alone" or "beside a model"; None if not.
        plain_alone: whether the target alone was not compiled, although the pair was.
        greedy: how many greedy decodings gave the target's own text, and how many there were.
    """
    how = f"{'the target' if without_model == 'alone' else 'both models'} compiled" if compiled else "no model compiled"
    call = "proposing the drafts of a block" if without_model == "alone" else "a drafter call"
    states = {"target": timings.target_replays, "drafter": timings.drafter_replays}
    lines = [
        f"# Which γ for {drafter}",
        "",
        f"On this machine ({how}) {call} takes {1e3 * timings.drafter:.2f} ms and a target call with one token "
        f"{1e3 * timings.target[0]:.2f} ms: c = {timings.ratio:.2f}. A target call with γ + 1 tokens takes v(γ) times "
        f"as long. A block costs cγ + v(γ) target calls and gives τ(γ) tokens; τ counts the bonus token.",
        "",
    ]
    if without_model:
        lines += [f"{BLOCKS[without_model]} γ is the most drafts of a block; cγ + v is the mean over blocks.", ""]
    if plain_alone:
        lines += ["The target alone decodes without compilation, which is faster for it; so does that call.", ""]
    if greedy[1]:
        lines += [f"Greedy text is the target's own in {greedy[0]} of {greedy[1]} decodings.", ""]
    if rule != RATIO:
        lines += [f"Above temperature 0, drafts are accepted by the rule `{rule}`.", ""]
    if widths:
        padded = ", ".join(f"{count} to {width}" for count, width in sorted(widths.items()))
        lines += [f"Target calls are padded where that is faster on this machine: {padded} tokens.", ""]
    if replaying := [name for name, replays in states.items() if replays]:
        have = "have" if len(replaying) > 1 else "has"
        lines += [
            f"The {' and the '.join(replaying)} {have} states, so that after a rejected draft the accepted tokens "
            f"are read again. cγ + v includes this, as if it happened in every block.",
            "",
        ]
    columns = ["γ", "τ", "v", "cγ + v", "predicted speed-up", "measured"]
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        cells = [
            [
                str(row.gamma),
                f"{row.block_efficiency:.2f}",
                f"{timings.verification(row.gamma):.2f}",
                f"{row.cost:.2f}",
                f"{row.predicted:.2f}",
                with_interval(row.measured) if row.measured else "",
            ]
            for row in of_task
        ]
        table = Table(task, task, columns, cells)
        lines += [f"## {table.title}", "", verdict(of_task), "", table.markdown(), ""]
    return "\n".join(lines)


def verdict(rows: list[GammaRow]) -> str:
    """Return one sentence for one task: the best gamma, or that none pays and why."""
    (value, low, high), best = max(((row.measured, row) for row in rows if row.measured), key=lambda one: one[0])
    speed = f"{value:.2f} [{low:.2f}, {high:.2f}] times as fast as the target alone"
    if value > 1:
        certain = "" if low > 1 else ", within the noise of 1"
        return f"γ = {best.gamma} is best: {speed}{certain}."
    return (
        f"No γ pays on this machine: at the best, γ = {best.gamma}, decoding is {speed}. A block there costs "
        f"{best.cost:.2f} target calls and gives {best.block_efficiency:.2f} tokens: to pay, it would have to give "
        f"more than it costs."
    )
