"""Read evaluations from disk and summarise them: counts summed over prompts and seeds, with bootstrap intervals."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drafter.artifacts.manifest import MANIFEST, STARTED, ArtifactError, read_jsonl, read_manifest
from drafter.metrics import Counts, Estimate, by_prompt, estimate, memory_bound_speedup, paired_difference, read_row
from experiments.reporting.identity import PRETRAINED, DrafterIdentity, read_fields, read_record, with_distinct_series
from experiments.reporting.parts import Gamma, Part, parts_of

POOLED = "in domain, all"
Key = tuple[str, Gamma, str]  # task, gamma, prompt
RATIO = "ratio"  # the paper's acceptance rule
KEY = itemgetter("task", "gamma", "prompt")  # of a row of counts.jsonl


class Evaluation(NamedTuple):
    """One drafter's evaluation.

    Attributes:
        drafter: which drafter it is.
        size_ratio: c, the drafter's parameters divided by the target's; of mixtures of experts, the active ones.
        in_domain: the tasks whose kind of prompts the drafters are finetuned on.
        counts: (task, gamma, prompt) -> counts.
        positions: for each row of counts, its gamma, and the accepted and tested drafts at each position of a block.
        directory: the directory that it was read from.
        rule: the acceptance rule of the counts. Those at temperature 0 hold for every rule.
        parts: the parts of each decoding; none if an earlier version of this project made or began the evaluation.
        drafted_by_model: the key of `counts` -> drafts by the model, where others were drafted without a model.
    """

    drafter: DrafterIdentity
    size_ratio: float
    in_domain: tuple[str, ...]
    counts: dict[Key, Counts]
    positions: list[tuple[Gamma, list[int], list[int]]]
    directory: Path
    parts: Sequence[Part] = ()
    rule: str = RATIO
    drafted_by_model: Mapping[Key, int] = {}

    @property
    def series(self) -> str:
        """Return the drafter's name in tables and figures."""
        return self.drafter.series

    @property
    def is_timed(self) -> bool:
        """Return whether times were measured: they are not if prompts were decoded side by side."""
        return not any(np.isnan(counts.seconds) for counts in self.counts.values())


class ResultRow(NamedTuple):
    """One line of the results: a series on a task at a gamma, over all its seeds."""

    series: str
    task: str
    gamma: Gamma
    seeds: int
    prompts: int
    block_efficiency: Estimate
    expected: Estimate
    gain: Estimate | None
    speedup: Estimate
    token_rate_ratio: Estimate | None  # None: not measured
    acceptance_rate: Estimate


def read_evaluations(folder: Path, base: str = PRETRAINED, rule: str = RATIO) -> list[Evaluation]:
    """Return every finished evaluation by an acceptance rule in a folder, sorted by series, seed and step.

    Args:
        folder: has a directory for each evaluation.
        base: the series that the others are compared with; it comes first.
        rule: the acceptance rule. An evaluation by several is read as if it were by this one alone.

    Raises:
        ArtifactError: an earlier version of this project made one of them.
    """
    found = []
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        manifest = read_manifest(path.parent, "evaluate")
        summary, tasks = manifest["counts"], manifest["settings"]["tasks"]
        if rule not in rules_of(manifest):
            continue
        rows = rows_by_rule(read_jsonl(path.parent / "counts.jsonl"), rule)
        counts = {KEY(row): read_row(row) for row in rows}
        positions = [(row["gamma"], *row["by_position"]) for row in rows]
        # An earlier version may have begun an evaluation that this one has finished.
        parts = [part for row in rows for part in parts_of(row)] if all("turn" in row for row in rows) else []
        sizes = active_parameters(summary)
        in_domain = tuple(task for task, how in tasks.items() if how["in_domain"])
        drafter = read_fields(summary, path.parent)
        by_model = {KEY(row): row["drafted_by_model"] for row in rows if "drafted_by_model" in row}
        ratio = sizes["drafter"] / sizes["target"]
        found.append(Evaluation(drafter, ratio, in_domain, counts, positions, path.parent, parts, rule, by_model))
    identities = with_distinct_series([one.drafter for one in found], [one.directory for one in found])
    named = [one._replace(drafter=drafter) for one, drafter in zip(found, identities, strict=True)]
    return sorted(named, key=lambda one: (one.series != base, one.series, *seed_and_step(one)))


def active_parameters(summary: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of parameters of drafter and target that a token meets, given an evaluation's counts.

    These are all, but in a mixture of experts.

    >>> active_parameters({"drafter_parameters": 4, "target_parameters": 100})
    {'drafter': 4, 'target': 100}
    """
    return {
        model: summary.get(f"{model}_active_parameters", summary[f"{model}_parameters"])
        for model in ("drafter", "target")
    }


def rules_of(manifest: Mapping[str, Any]) -> list[str]:
    """Return the acceptance rules of an evaluation, given its manifest."""
    rules: list[str] = manifest["settings"].get("acceptance_rules", [RATIO])
    return rules


def measured_rules(folder: Path) -> list[str]:
    """Return the acceptance rules of all finished evaluations in a folder."""
    manifests = [read_manifest(path.parent, "evaluate") for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    return list(dict.fromkeys(rule for manifest in manifests for rule in rules_of(manifest)))


def rows_by_rule(rows: Iterable[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
    """Return the rows of counts.jsonl or samples.jsonl that hold for an acceptance rule.

    A row that names no rule is by `ratio`, or at temperature 0, where it holds for every rule.

    >>> rows_by_rule([{"n": 1, "greedy": True}, {"n": 2, "greedy": False}, {"n": 3, "rule": "argmax"}], "argmax")
    [{'n': 1, 'greedy': True}, {'n': 3, 'rule': 'argmax'}]
    """
    return [row for row in rows if row.get("rule", RATIO) == rule or row.get("greedy", False)]


def seed_and_step(evaluation: Evaluation) -> tuple[int, int]:
    """Return a sort key: the seed, then the step. A drafter without a seed comes first."""
    seed, step = evaluation.drafter.seed, evaluation.drafter.step
    return -1 if seed is None else seed, step or 0


def check_evaluations(found: list[Evaluation], folder: Path, base: str, rule: str = RATIO) -> None:
    """Check that there are evaluations to make tables from.

    Raises:
        ArtifactError: there is no evaluation by the acceptance rule, or none of the series `base`. The pretrained
            drafter may be missing.
    """
    if not found and (measured := measured_rules(folder)):
        raise ArtifactError(
            f"acceptance_rule is '{rule}', but the rules evaluated under {folder} are {measured}: give one of these, "
            f"or evaluate with evaluate.acceptance_rules=[{rule}]"
        )
    if not found:
        raise ArtifactError(f"no finished evaluation under {folder}: run `python -m experiments.evaluate` first")
    if base not in (names := {one.series for one in found} | {PRETRAINED}):
        raise ArtifactError(f"base is '{base}', but the series evaluated under {folder} are {sorted(names)}")


def summarise(evaluations: list[Evaluation], base: str = PRETRAINED) -> list[ResultRow]:
    """Return a row for each series, task and gamma that was run, and one for all tasks in the domain together."""
    rows = []
    for series in dict.fromkeys(one.series for one in evaluations):
        of_series = [one for one in evaluations if one.series == series]
        for task, gamma in tasks_and_gammas(of_series[0]):
            counts = counts_by_prompt(of_series, task, gamma)
            reference = counts_by_prompt([one for one in evaluations if one.series == base], task, gamma)
            efficiency = estimate(counts, "block_efficiency")
            cost = of_series[0].size_ratio, mean_drafts(of_series, task, gamma)
            comparable = series != base and reference.keys() == counts.keys()
            rows.append(
                ResultRow(
                    series,
                    task,
                    gamma,
                    len(of_series),
                    len(counts),
                    efficiency,
                    estimate(counts, "expected_block_efficiency"),
                    paired_difference(counts, reference, "block_efficiency") if comparable else None,
                    Estimate(*(memory_bound_speedup(value, *cost) for value in efficiency)),
                    token_rate(counts),
                    estimate(counts, "acceptance_rate"),
                )
            )
    return rows


def token_rate(counts: dict[str, np.ndarray]) -> Estimate | None:
    """Return the ratio of token rates; None if times are missing, be it of one seed alone: they make the sum NaN."""
    total = Counts(*np.sum(list(counts.values()), axis=0))
    return None if np.isnan(total.seconds + total.baseline_seconds) else estimate(counts, "token_rate_ratio")


def tasks_and_gammas(evaluation: Evaluation) -> list[tuple[str, Gamma]]:
    """Return the tasks and gammas of an evaluation; if several tasks are in the domain, also POOLED for all of them."""
    run = list(dict.fromkeys((task, gamma) for task, gamma, _ in evaluation.counts))
    pooled = {gamma for task, gamma in run if task in evaluation.in_domain}
    several = len({task for task, _ in run if task in evaluation.in_domain}) > 1
    return run + [(POOLED, gamma) for gamma in sorted_gammas(pooled) if several]


def counts_by_prompt(evaluations: Iterable[Evaluation], task: str, gamma: Gamma) -> dict[str, np.ndarray]:
    """Return the counts by prompt of one task (or POOLED) and gamma, summed over the evaluations (seeds)."""
    keys = keys_of(evaluations, task, gamma)
    return by_prompt([prompt for _, (_, _, prompt) in keys], [one.counts[key] for one, key in keys])


def keys_of(evaluations: Iterable[Evaluation], task: str, gamma: Gamma) -> list[tuple[Evaluation, Key]]:
    """Return the evaluations with each key of their counts of one task (or POOLED) and gamma."""
    return [
        (one, key)
        for one in evaluations
        for key in one.counts
        if key[1] == gamma and (key[0] == task or (task == POOLED and key[0] in one.in_domain))
    ]


def mean_drafts(evaluations: Sequence[Evaluation], task: str, gamma: Gamma) -> float:
    """Return gamma or, where it varies, how many tokens a draft model has drafted per block."""
    if isinstance(gamma, int) and not any(one.drafted_by_model for one in evaluations):
        return gamma
    keys = keys_of(evaluations, task, gamma)
    drafted = sum(one.drafted_by_model.get(key, one.counts[key].drafted) for one, key in keys)
    return drafted / sum(one.counts[key].target_calls for one, key in keys)


def sorted_gammas(gammas: Iterable[Gamma]) -> list[Gamma]:
    """Return each gamma once, sorted by `gamma_sort_key`."""
    return sorted(set(gammas), key=gamma_sort_key)


def gamma_sort_key(gamma: Gamma) -> tuple[bool, Gamma]:
    """Return a sort key that puts numbers in ascending order, and "adaptive" after them."""
    return isinstance(gamma, str), gamma


def read_curves(folder: Path) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Return the validation curves of the finetunings in a folder, whether they have finished or not.

    Returns:
        series -> seed -> the rows of the log that have validation values: the step and each val/*.

    Raises:
        ArtifactError: an earlier version of this project made one of them.
    """
    curves: dict[str, dict[int, list[dict[str, float]]]] = {}
    for path in sorted(folder.glob("*/logs/metrics.csv")):
        records = (path.parent.parent / name for name in (MANIFEST, STARTED))
        record = json.loads(next(record for record in records if record.exists()).read_text(encoding="utf-8"))
        drafter = read_record(record, path.parent.parent)
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/acceptance_rate")]
        kept = [
            {key: float(row[key]) for key in row if key == "step" or (key.startswith("val/") and row[key])}
            for row in rows
        ]
        if kept:
            series, seed = drafter.series, drafter.seed or 0
            if seed in curves.get(series, {}):
                series = f"{series} ({path.parent.parent.name})"
            curves.setdefault(series, {})[seed] = kept
    return curves
