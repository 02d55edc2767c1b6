"""Summarise a pipeline's results in three lines: the best drafter, whether it pays on this machine, what to do next."""

from collections.abc import Iterable

from drafter.metrics import Estimate, estimate
from experiments.reporting.identity import PRETRAINED
from experiments.reporting.results import (
    POOLED,
    Evaluation,
    counts_by_prompt,
    sorted_gammas,
    tasks_and_gammas,
    token_rate,
)
from experiments.reporting.tabular import with_interval


def conclusions(evaluations: list[Evaluation], report: str) -> list[str]:
    """Return the lines about the best drafter at the smallest γ, on the tasks in the domain together.

    The pretrained drafter is the best only if there is no other one. If the best has no model, one more line is about
    the best that has one.
    """
    measured = tasks_and_gammas(evaluations[0])
    gamma = sorted_gammas(gamma for _, gamma in measured)[0]
    tasks = [task for task, its_gamma in measured if its_gamma == gamma]
    inside = [task for task in tasks if task in evaluations[0].in_domain]
    task = POOLED if POOLED in tasks else (inside or tasks)[0]
    names = dict.fromkeys(one.series for one in evaluations)
    counts = {
        series: counts_by_prompt([one for one in evaluations if one.series == series], task, gamma) for series in names
    }
    efficiency = {series: estimate(found, "block_efficiency") for series, found in counts.items()}
    where = "the tasks in the domain" if task == POOLED else f"the task {task}"

    def best(among: Iterable[str]) -> str | None:
        finetuned = [series for series in among if series != PRETRAINED] or list(among)
        return max(finetuned, key=lambda series: efficiency[series].value, default=None)

    def describe(series: str) -> str:
        before = efficiency.get(PRETRAINED) if series in with_model and series != PRETRAINED else None
        than = f" against {with_interval(before)} pretrained" if before else ""
        return f"{series}, block efficiency {with_interval(efficiency[series])}{than} (γ = {gamma}, {where})."

    with_model = list(dict.fromkeys(one.series for one in evaluations if one.size_ratio))
    first, other = best(names) or "", best(with_model)
    lines = [f"Best drafter: {describe(first)}", verdict(token_rate(counts[first]))]
    if first not in with_model and other:
        lines[0] += " It has no model."
        lines.append(f"Best drafter with a model: {describe(other)} {verdict(token_rate(counts[other]))}")
    return [
        *lines,
        f"Next: open {report}/report.html. For a target of your own: "
        f'make demo ARGS="target.path=path/to/your-chat-model root=runs/mine"',
    ]


def verdict(rate: Estimate | None) -> str:
    """Return the sentence on whether a drafter pays on this machine, by its ratio of token rates."""
    if rate is None:
        return "Whether it pays on this machine was not measured: evaluate with evaluate.batch_size=1."
    found = "It is undecided whether it pays on this machine"
    if rate.low > 1:
        found = "It pays on this machine"
    elif rate.high < 1:
        found = "It does not pay on this machine"
    return f"{found}: it generates {with_interval(rate)} times as many tokens per second as the target alone."
