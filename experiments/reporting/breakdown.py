"""Make the tables of block efficiency by turn, by role of the span and by position in the answer."""

from collections.abc import Sequence

from drafter.decoding.roles import ROLES
from drafter.metrics import Counts, by_prompt, estimate
from experiments.reporting.parts import Gamma, Part
from experiments.reporting.results import Evaluation, sorted_gammas
from experiments.reporting.tabular import Table, with_interval

TITLES = {"turn": "τ by turn", "role": "τ by role", "position": "τ by position in the answer"}
NOTE = (
    "A block counts with all its tokens where its first token is, so that the tokens and target calls of a line add up "
    "to those of the task."
)


def breakdown_tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return a table for each kind of part, with a line per task and series, at the largest fixed γ.

    A task has no line if all of its decodings are one part, such as prompts of one turn; a table without lines is left
    out, and so is a series of which an evaluation has no parts. Intervals come from resampling the conversations that
    have the part.
    """
    partial = {one.series for one in evaluations if not one.parts}
    evaluations = [one for one in evaluations if one.series not in partial]
    gammas = sorted_gammas(part.gamma for one in evaluations for part in one.parts)
    if not gammas:
        return []
    gamma = next((gamma for gamma in reversed(gammas) if isinstance(gamma, int)), gammas[0])
    tables = [_table(evaluations, kind, gamma) for kind in TITLES]
    return [table for table in tables if table.rows]


def _table(evaluations: Sequence[Evaluation], kind: str, gamma: Gamma) -> Table:
    found: dict[tuple[str, str], dict[str, list[Part]]] = {}
    for one in evaluations:
        for part in one.parts:
            if (part.kind, part.gamma) == (kind, gamma):
                found.setdefault((part.task, one.series), {}).setdefault(part.label, []).append(part)
    labels: dict[str, set[str]] = {}
    for (task, _), by_label in found.items():
        labels.setdefault(task, set()).update(by_label)
    shown = {task for task in labels if len(labels[task]) > 1}
    columns = sorted({label for task in shown for label in labels[task]}, key=_order)
    rows = [
        [task.replace("_", " "), series, *(_efficiency(found[task, series].get(label, [])) for label in columns)]
        for task in labels
        for series in dict.fromkeys(one.series for one in evaluations)
        if task in shown and (task, series) in found
    ]
    named = [f"turn {label}" if kind == "turn" else label.replace("-", "–") for label in columns]
    return Table(f"by_{kind}", f"{TITLES[kind]}, γ = {gamma}", ["task", "drafter", *named], rows, NOTE)


def _order(label: str) -> tuple[int, str]:
    """Return a sort key: roles in their order, turns and ranges by their first number."""
    return (ROLES.index(label) if label in ROLES else int(label.split("-")[0].rstrip("+"))), label


def _efficiency(parts: Sequence[Part]) -> str:
    """Return τ of these parts with its interval; "" if there is none."""
    if not parts:
        return ""
    nothing = Counts(0, 0, 0, 0, 0.0, 0, 0.0)
    counts = [nothing._replace(tokens=part.tokens, target_calls=part.target_calls) for part in parts]
    return with_interval(estimate(by_prompt([part.prompt for part in parts], counts), "block_efficiency"))
