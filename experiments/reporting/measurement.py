"""The results of measuring a pair, and the sentences that follow from them: whether it pays, and what would."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from drafter.metrics import Estimate
from experiments.reporting.engine_section import EngineFigures
from experiments.reporting.tabular import with_interval


class MeasuredRow(NamedTuple):
    """A drafter at one γ, greedy.

    Attributes:
        drafter: its name.
        gamma: γ.
        block_efficiency: τ, as it follows from what the target generates alone.
        cost: of a block, in target calls with one token.
        memory_bound: MBSU, which takes c from the numbers of parameters.
        predicted: the token rate relative to the target alone, as it follows from τ, the cost and the prompts' reading.
        measured: the same by decoding; None if this γ was not decoded.
    """

    drafter: str
    gamma: int
    block_efficiency: float
    cost: float
    memory_bound: float
    predicted: Estimate
    measured: Estimate | None

    @property
    def predicted_by_measured(self) -> float | None:
        """Return the predicted speed-up divided by the measured one; None if this γ was not decoded."""
        return self.predicted.value / self.measured.value if self.measured else None


class Calls(NamedTuple):
    """The call timings of a pair.

    Attributes:
        drafter: seconds of a drafter call with one token, or of proposing a block's drafts without a model.
        target: seconds of a target call with one token.
        verification: v(γ) at γ = 1, 2, …
        replays: which of the two models read accepted tokens again after a rejected draft, because they have states.
        widths: number of tokens -> number to which target calls were padded.
        compiled: whether both models were compiled.
    """

    drafter: float
    target: float
    verification: list[float]
    replays: list[str]
    widths: Mapping[int, int]
    compiled: bool

    @property
    def ratio(self) -> float:
        """Return c as it was measured."""
        return self.drafter / self.target


class BatchRow(NamedTuple):
    """The best γ for so many sequences side by side.

    Attributes:
        batch_size: the number of sequences.
        ratio: c, with calls of so many sequences.
        gamma: the best γ; 0 if none pays.
        predicted: its speed-up, without the reading of prompts; that of the best γ also where none pays.
        measured: the same by decoding, with the reading; None if it was not decoded.
    """

    batch_size: int
    ratio: float
    gamma: int
    predicted: float
    measured: float | None = None


class ContextRow(NamedTuple):
    """The timings and predictions for a number of tokens in the cache, without the reading of prompts.

    Attributes:
        tokens: the tokens in the cache.
        ratio: c.
        verification: v(γ) at γ = 1, 2, …
        predicted: the predicted speed-up at γ = 1, 2, …
        roofline: the same by the roofline of the hardware that was named, if any was.
    """

    tokens: int
    ratio: float
    verification: Sequence[float]
    predicted: Sequence[float]
    roofline: "ContextRow | None"

    @property
    def gamma(self) -> int:
        """Return the best γ: 0 if none pays."""
        best = max(self.predicted)
        return self.predicted.index(best) + 1 if best > 1 else 0


class EngineSetting(NamedTuple):
    """How an engine serves the pair.

    Attributes:
        engine: its name.
        rule: the acceptance rule above temperature 0; None if it keeps the target's distribution only at temperature 0.
        gamma: the γ with the highest predicted speed-up, as a mean of greedy and sampled answers.
        greedy: the predicted speed-up of greedy answers.
        sampled: that of sampled answers by the rule.
        lines: the command, or the lines of Python.
    """

    engine: str
    rule: str | None
    gamma: int
    greedy: float
    sampled: float | None
    lines: str


class Measurement(NamedTuple):
    """All that was found about a pair.

    Attributes:
        target: its path or name.
        drafter: the drafter's name on the command line.
        label: its name in the tables.
        has_model: whether it is a draft model alone, and not (or not only) n-grams.
        compatibility: sentences on how the two fit together.
        parameters: sentences on architectures and numbers of parameters.
        size_ratio: c from the numbers of parameters.
        prompts: how many prompts there were, and where they are from.
        lengths: mean numbers of tokens of a prompt and of a greedy answer.
        temperature: of the sampled answers.
        calls: the call timings.
        acceptance_rates: greedy, or the acceptance rule -> mean acceptance rate of a draft of each generated token.
        by_rule: greedy, or the acceptance rule -> τ at γ = 1, 2, …
        rows: all drafters and γ.
        equal: how many greedy decodings gave the target's own text, and of how many.
        needed_rate: the acceptance rate above which a γ would pay; None if none is enough, or it is unknown.
        needed_ratio: the c below which a γ would pay; None if no drafter is cheap enough, or it is unknown.
        rival: the difference in speed-up of the fastest other drafter to this one, each at its best γ.
        batches: the best γ by batch size.
        contexts: the timings and predictions by the number of tokens in the cache.
        hardware: the name of the hardware of their roofline, if any was named.
        engines: how engines serve it.
        differs: whether the two models differ in what engines compare, and an export adjusts.
        export: the command of that export, if it is needed.
        schedule: the best γ by batch size as vLLM lists them, if several sizes were timed.
        speculative_config: vLLM's `--speculative-config` with that list, if a γ pays and vLLM has such a drafter.
        engine: what the counters of an engine that serves the pair say, if one was asked.
    """

    target: str
    drafter: str
    label: str
    has_model: bool
    compatibility: Sequence[str]
    parameters: Sequence[str]
    size_ratio: float
    prompts: str
    lengths: tuple[float, float]
    temperature: float
    calls: Calls
    acceptance_rates: Mapping[str, float]
    by_rule: Mapping[str, Sequence[float]]
    rows: Sequence[MeasuredRow]
    equal: tuple[int, int]
    needed_rate: float | None = None
    needed_ratio: float | None = None
    rival: Estimate | None = None
    batches: Sequence[BatchRow] = ()
    contexts: Sequence[ContextRow] = ()
    hardware: str | None = None
    engines: Sequence[EngineSetting] = ()
    schedule: str | None = None
    speculative_config: Mapping[str, Any] | None = None
    differs: bool = False
    export: str | None = None
    engine: EngineFigures | None = None

    def best(self, drafter: str | None = None) -> MeasuredRow:
        """Return the row of a drafter's highest measured speed-up; by default of the drafter that is measured."""
        return best_row(self.rows, drafter or self.label)

    def best_rival(self) -> MeasuredRow | None:
        """Return the row of the fastest other drafter, or None if there is no other one."""
        return fastest_other(self.rows, self.label)


def best_row(rows: Sequence[MeasuredRow], drafter: str) -> MeasuredRow:
    """Return the row of a drafter's highest measured speed-up."""
    return max((row for row in rows if row.drafter == drafter and row.measured), key=measured_speedup)


def fastest_other(rows: Sequence[MeasuredRow], drafter: str) -> MeasuredRow | None:
    """Return the row of the highest measured speed-up of another drafter, or None if there is none."""
    others = [row for row in rows if row.drafter != drafter and row.measured]
    return max(others, key=measured_speedup) if others else None


def measured_speedup(row: MeasuredRow) -> float:
    """Return the measured speed-up of a row that was decoded."""
    assert row.measured is not None
    return row.measured.value


def accuracy(rows: Sequence[MeasuredRow]) -> str:
    """Return a sentence on how far the predictions are from what was measured, over all γ that were decoded."""
    ratios = [ratio for row in rows if (ratio := row.predicted_by_measured) is not None]
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    if low == high:
        return f"The predicted speed-up is {low} times the measured one."
    return f"Predicted speed-ups are between {low} and {high} times the measured ones."


def outcome(speedup: Estimate) -> str:
    """Return what an interval says: "pays", "no difference" if it includes 1, or "does not pay".

    >>> outcome(Estimate(1.31, 1.22, 1.4)), outcome(Estimate(1.03, 0.97, 1.09)), outcome(Estimate(0.8, 0.7, 0.9))
    ('pays', 'no difference', 'does not pay')
    """
    if speedup.low > 1:
        return "pays"
    return "does not pay" if speedup.high < 1 else "no difference"


def verdict(found: Measurement) -> str:
    """Return one sentence: which γ pays, that no difference was seen, or that no γ pays; with the reason in numbers."""
    best = found.best()
    assert best.measured is not None
    speed = f"{with_interval(best.measured)} times the target's own token rate"
    block = f"a block costs {best.cost:.2f} target calls and gives {best.block_efficiency:.2f} tokens"
    result = outcome(best.measured)
    if result == "pays":
        return f"γ = {best.gamma} pays: {speed} ({block})."
    if result == "no difference":
        return f"No difference seen: γ = {best.gamma}, the best of those decoded, has {speed} ({block})."
    last = f"(γ = {best.gamma}, the best of those decoded, has {speed})"
    if not found.has_model:
        return f"No γ pays: {block} {last}."
    costs, has = f"a draft costs {found.calls.ratio:.2f} target calls", found.acceptance_rates["greedy"]
    if found.needed_rate is None:
        return f"No γ pays: {costs}, so that no acceptance rate is high enough; it has {has:.2f} {last}."
    return f"No γ pays: {costs} and needs an acceptance rate above {found.needed_rate:.2f}; it has {has:.2f} {last}."


def what_would_change(found: Measurement) -> str | None:
    """Return what would make a γ pay, if it is a draft model and none does."""
    best = found.best()
    assert best.measured is not None
    if outcome(best.measured) == "pays" or not found.has_model:
        return None
    cheaper = f"a cheaper drafter: c below {found.needed_ratio:.2f}" if found.needed_ratio else None
    better = f"a better one: an acceptance rate above {found.needed_rate:.2f}" if found.needed_rate else None
    now = f"It has c = {found.calls.ratio:.2f} and an acceptance rate of {found.acceptance_rates['greedy']:.2f}."
    ways = ", or ".join(way for way in (cheaper, better) if way)
    if not ways:
        return f"Neither a cheaper drafter nor a better one alone would pay on this machine. {now}"
    missing = ""
    if not cheaper:
        missing = " At this acceptance rate no drafter is cheap enough: verification alone takes longer than it saves."
    if not better:
        missing = " At this c no acceptance rate is high enough."
    return f"What would have to change: {ways}. {now}{missing}"


def against_rivals(found: Measurement) -> str | None:
    """Return how the fastest other drafter compares, if there is one."""
    rival = found.best_rival()
    if rival is None or rival.measured is None or found.rival is None:
        return None
    known = f"`{rival.drafter}` at γ = {rival.gamma} has {with_interval(rival.measured)}"
    difference = with_interval(found.rival, signed=True)
    if found.rival.low <= 0 <= found.rival.high:
        return f"Of the others, {known}: no difference seen to `{found.label}` ({difference})."
    faster = "faster" if found.rival.value > 0 else "slower"
    return f"Of the others, {known}: it is {faster} than `{found.label}` ({difference})."
