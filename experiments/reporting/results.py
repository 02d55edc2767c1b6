"""Evaluations on disk -> rows of results: counts summed over prompts and seeds, bootstrap intervals. No torch here."""

import csv
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from drafter.artifacts.manifest import MANIFEST, STARTED, ArtifactError, read_jsonl, read_manifest
from drafter.metrics import Counts, Estimate, by_prompt, estimate, memory_bound_speedup, paired_difference

POOLED = "in domain, all"
Gamma = int | str  # "adaptive"


class Evaluation(NamedTuple):
    """One drafter's counts: its loss and seed, c, the tasks that it was aligned on, (task, gamma, prompt) -> Counts."""

    loss: str
    seed: int
    size_ratio: float
    in_domain: tuple[str, ...]
    counts: dict[tuple[str, Gamma, str], Counts]
    positions: list[tuple[Gamma, list[int], list[int]]]  # accepted and tested drafts at each place of a block
    directory: Path
    step: int | None = None  # of a drafter that was kept along its finetuning


class Row(NamedTuple):
    """One line of the results: a loss on a task at a gamma, over all its seeds."""

    loss: str
    task: str
    gamma: Gamma
    seeds: int
    prompts: int
    block_efficiency: Estimate
    expected: Estimate
    gain: Estimate | None
    speedup: Estimate
    token_rate_ratio: Estimate
    acceptance_rate: Estimate


def read_evaluations(folder: Path, base: str = "pretrained") -> list[Evaluation]:
    """Every finished evaluation, those of the drafter that the others are compared with first."""
    found = []
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        manifest = read_manifest(path.parent, "evaluate")
        summary, tasks = manifest["counts"], manifest["settings"]["tasks"]
        rows = read_jsonl(path.parent / "counts.jsonl")
        counts = {
            (row["task"], row["gamma"], row["prompt"]): Counts(*(row[field] for field in Counts._fields))
            for row in rows
        }
        positions = [(row["gamma"], *row["by_position"]) for row in rows]
        ratio = summary["drafter_parameters"] / summary["target_parameters"]
        in_domain = tuple(task for task, how in tasks.items() if how["in_domain"])
        about = summary["loss"], summary["seed"], ratio, in_domain
        found.append(Evaluation(*about, counts, positions, path.parent, summary.get("step")))
    found = _told_apart(found)
    return sorted(found, key=lambda one: (one.loss != base, one.loss, one.seed, one.step or 0))


def _told_apart(found: list[Evaluation]) -> list[Evaluation]:
    """Evaluations of one loss, seed and step are of different drafters: they are no seeds of one loss to be summed."""
    times = Counter((one.loss, one.seed, one.step) for one in found)
    return [
        one._replace(loss=f"{one.loss} ({one.directory.name})") if times[one.loss, one.seed, one.step] > 1 else one
        for one in found
    ]


def check_evaluations(found: list[Evaluation], folder: Path, base: str) -> None:
    """Refuse to make tables of nothing.

    Raises:
        ArtifactError: there is no evaluation, or none of `base`, unless that is the pretrained drafter.
    """
    if not found:
        raise ArtifactError(f"no finished evaluation under {folder}: run `python -m experiments.evaluate` first")
    if base not in (names := {evaluation.loss for evaluation in found} | {"pretrained"}):
        raise ArtifactError(f"base is '{base}', but what was evaluated under {folder} is {sorted(names)}")


def summarise(evaluations: list[Evaluation], base: str = "pretrained") -> list[Row]:
    """A row for each loss, task and gamma that was run, and one for the tasks in the domain together."""
    rows = []
    for loss in dict.fromkeys(evaluation.loss for evaluation in evaluations):
        of_loss = [evaluation for evaluation in evaluations if evaluation.loss == loss]
        for task, gamma in cells(of_loss[0]):
            counts = cell(of_loss, task, gamma)
            reference = cell([evaluation for evaluation in evaluations if evaluation.loss == base], task, gamma)
            efficiency = estimate(counts, "block_efficiency")
            sums = Counts(*np.sum(list(counts.values()), axis=0))
            drafts = gamma if isinstance(gamma, int) else sums.drafted / sums.target_calls
            speedup = [memory_bound_speedup(value, of_loss[0].size_ratio, drafts) for value in efficiency]
            comparable = loss != base and reference.keys() == counts.keys()
            rows.append(
                Row(
                    loss,
                    task,
                    gamma,
                    len(of_loss),
                    len(counts),
                    efficiency,
                    estimate(counts, "expected_block_efficiency"),
                    paired_difference(counts, reference, "block_efficiency") if comparable else None,
                    Estimate(*speedup),
                    estimate(counts, "token_rate_ratio"),
                    estimate(counts, "acceptance_rate"),
                )
            )
    return rows


def cells(evaluation: Evaluation) -> list[tuple[str, Gamma]]:
    """The tasks and gammas of a drafter, and where it has several tasks in the domain, all of these as one."""
    run = list(dict.fromkeys((task, gamma) for task, gamma, _ in evaluation.counts))
    pooled = {gamma for task, gamma in run if task in evaluation.in_domain}
    several = len({task for task, _ in run if task in evaluation.in_domain}) > 1
    return run + [(POOLED, gamma) for gamma in in_order(pooled) if several]


def cell(evaluations: Iterable[Evaluation], task: str, gamma: Gamma) -> dict[str, np.ndarray]:
    """Counts by prompt of one task (or POOLED) and gamma, summed over the evaluations (seeds)."""
    picked = [
        (prompt, counts)
        for evaluation in evaluations
        for (of_task, of_gamma, prompt), counts in evaluation.counts.items()
        if of_gamma == gamma and (of_task == task or (task == POOLED and of_task in evaluation.in_domain))
    ]
    return by_prompt([prompt for prompt, _ in picked], [counts for _, counts in picked])


def in_order(gammas: Iterable[Gamma]) -> list[Gamma]:
    """Each gamma once, by rank."""
    return sorted(set(gammas), key=rank)


def rank(gamma: Gamma) -> tuple[bool, Gamma]:
    """Numbers ascending, then "adaptive"."""
    return isinstance(gamma, str), gamma


def read_curves(folder: Path) -> dict[str, dict[int, list[dict[str, float]]]]:
    """loss -> seed -> the validation rows (step and val/*) of its finetuning, whether it has ended or not."""
    curves: dict[str, dict[int, list[dict[str, float]]]] = {}
    for path in sorted(folder.glob("*/logs/metrics.csv")):
        records = (path.parent.parent / name for name in (MANIFEST, STARTED))
        settings = json.loads(next(record for record in records if record.exists()).read_text(encoding="utf-8"))[
            "settings"
        ]
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/kld")]
        kept = [
            {key: float(row[key]) for key in row if key == "step" or (key.startswith("val/") and row[key])}
            for row in rows
        ]
        if kept:
            name = settings["name"].rsplit("-seed", 1)[0]
            if settings["seed"] in curves.get(name, {}):
                name = f"{name} ({path.parent.parent.name})"
            curves.setdefault(name, {})[settings["seed"]] = kept
    return curves
