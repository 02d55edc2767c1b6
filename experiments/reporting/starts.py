"""Make the table of starts: what each start is worth with each division of the same number of operations."""

from collections.abc import Sequence
from typing import NamedTuple

from drafter.metrics import Estimate, estimate, memory_bound_speedup, paired_difference
from experiments.reporting.paper import by_seed, difference, domain_task, efficiency, is_outside, of_series
from experiments.reporting.parts import Gamma
from experiments.reporting.results import RATIO, Evaluation, counts_by_prompt, tasks_and_gammas
from experiments.reporting.tabular import Table, with_interval


class Recipe(NamedTuple):
    """A start with a division of the operations, as one seed was run.

    Attributes:
        start: the name of the start.
        share: the share of the operations that pretraining took.
        pretraining_steps: steps of pretraining.
        finetuning_steps: steps of finetuning.
        seconds: wall-clock time of both.
    """

    start: str
    share: float
    pretraining_steps: int
    finetuning_steps: int
    seconds: float


def starts_table(recipes: dict[str, list[Recipe]], evaluations: Sequence[Evaluation], base: str, gamma: Gamma) -> Table:
    """Return a line for each recipe: steps, seconds, τ in and out of the domain, MBSU, and differences to `base`.

    Args:
        recipes: the recipe's name -> its runs, one per seed.
        evaluations: of every recipe and seed, on the same prompts at one gamma.
        base: the name of the recipe to compare with.
        gamma: the draft length of the evaluations.
    """
    inside = domain_task(evaluations)
    outside = [task for task, _ in tasks_and_gammas(evaluations[0]) if is_outside(evaluations, task)]
    columns = ["start", "share of pretraining", "steps", "seconds", "c", f"τ in domain, γ = {gamma}", "seeds"]
    columns.append(f"τ − {base}")
    for task in outside:
        columns += [f"τ on {task.replace('_', ' ')}", f"τ − {base}"]
    columns += ["MBSU in domain", f"MBSU − {base}"]
    rows = []
    for name, runs in recipes.items():
        found, first = of_series(evaluations, name), runs[0]
        row = [first.start, f"{first.share:.0%}", f"{first.pretraining_steps} + {first.finetuning_steps}"]
        row += [f"{sum(run.seconds for run in runs) / len(runs):.0f}", f"{found[0].size_ratio:.3f}"]
        for task in (inside, *outside):
            row.append(efficiency(found, task, gamma))
            if task == inside:
                row.append(by_seed(found, task, gamma))
            row.append(with_interval(difference(evaluations, name, base, task, gamma), signed=True))
        rows.append(row + speedup_cells(evaluations, name, base, inside, gamma))
    note = (
        "Every recipe takes the same number of operations for pretraining and finetuning together, to within half a "
        "step of each. Steps are of pretraining + finetuning; seconds are their time with loading and validation, the "
        "mean over seeds (less where a run was interrupted). Differences are paired by prompt. MBSU is τ / (cγ + 1)."
    )
    if evaluations[0].rule != RATIO:
        note += f" Drafts are accepted by the rule `{evaluations[0].rule}`."
    return Table("starts", "Which start is worth what?", columns, rows, note)


def speedup_cells(evaluations: Sequence[Evaluation], name: str, base: str, task: str, gamma: Gamma) -> list[str]:
    """Return the memory-bound speed-up of a series with its interval, and its difference to another series."""
    ours, theirs = (of_series(evaluations, series) for series in (name, base))
    counts, reference = (counts_by_prompt(found, task, gamma) for found in (ours, theirs))
    factor, other = (memory_bound_speedup(1.0, found[0].size_ratio, float(gamma)) for found in (ours, theirs))
    value = with_interval(Estimate(*(factor * part for part in estimate(counts, "block_efficiency"))))
    if name == base:
        return [value, ""]
    gain = paired_difference(counts, reference, "block_efficiency", factors=(factor, other))
    return [value, with_interval(gain, signed=True)]
