"""Make the table of block efficiency by acceptance rule."""

from collections.abc import Mapping, Sequence

from experiments.reporting.paper import efficiency, of_series
from experiments.reporting.results import Evaluation, sorted_gammas, tasks_and_gammas
from experiments.reporting.tabular import Table


def rule_table(by_rule: Mapping[str, Sequence[Evaluation]]) -> list[Table]:
    """Return the table with a column for each acceptance rule, at the smallest γ; none if there is one rule alone.

    Args:
        by_rule: rule -> the evaluations by this rule.
    """
    measured = {rule: evaluations for rule, evaluations in by_rule.items() if evaluations}
    if len(measured) < 2:
        return []
    every = [one for evaluations in measured.values() for one in evaluations]
    gamma = sorted_gammas(gamma for one in every for _, gamma, _ in one.counts)[0]
    tasks = dict.fromkeys(task for one in every for task, of_gamma in tasks_and_gammas(one) if of_gamma == gamma)
    rows = [
        [task.replace("_", " "), series]
        + [efficiency(of_series(evaluations, series), task, gamma) for evaluations in measured.values()]
        for task in tasks
        for series in dict.fromkeys(one.series for one in every)
    ]
    note = "A column has one acceptance rule, and its own decodings. At temperature 0 the rules are the same."
    return [Table("rules", f"τ by acceptance rule, γ = {gamma}", ["task", "drafter", *measured], rows, note)]
