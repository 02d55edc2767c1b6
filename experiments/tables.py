"""Stage 5: counts -> Markdown tables, figures and the HTML report. Config: conf/tables.yaml. No torch here.

Every figure is computed from the counts of the evaluations, summed over prompts and seeds; intervals are bootstrap 95%
intervals over prompts. A cell that was not run is left blank.
"""

import csv
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
from omegaconf import DictConfig

from drafter.artifacts import MANIFEST, ArtifactError, environment, read_jsonl, read_manifest
from drafter.metrics import Counts, Estimate, by_prompt, estimate, memory_bound_speedup, paired_difference
from experiments.figures import draw_curves, draw_efficiency
from experiments.report import write_html

log = logging.getLogger(__name__)
POOLED = "in domain, all"
CONVENTION = (
    "τ is tokens per target call and counts the target's own token of each block (1: autoregressive; at most γ + 1). "
    "Expected τ has each accept test's chance in the place of its coin: the same mean, less noise. "
    "MBSU is τ / (cγ + 1), c drafter / target parameters. Token rate is tokens per second with the drafter / without, "
    "same prompts, same machine, one run. In brackets: 95% bootstrap intervals over prompts."
)


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


@hydra.main(version_base="1.3", config_path="../conf", config_name="tables")
def main(cfg: DictConfig) -> None:
    """Read every finished evaluation under the root, write results.md, figures/ and report.html."""
    out = Path(cfg.out)
    evaluations = read_evaluations(Path(cfg.root) / "evaluate", cfg.base)
    rows = summarise(evaluations, cfg.base)
    curves = read_curves(Path(cfg.root) / "finetune")
    (out / "figures").mkdir(parents=True, exist_ok=True)
    figures = {
        "block_efficiency": draw_efficiency(rows, out / "figures" / "block_efficiency"),
        "curves": draw_curves(curves, out / "figures" / "curves"),
    }
    notes = [CONVENTION, describe(evaluations), f"Measured on {machine()}, commit {commits(evaluations)}."]
    tables = {
        f"γ = {gamma}": markdown([row for row in rows if row.gamma == gamma], cfg.base)
        for gamma in in_order(row.gamma for row in rows)
    }
    tables["Acceptance rate by place in the block, all tasks, at the largest γ"] = positions_table(evaluations)
    sections = [f"### {title}\n\n{table}\n" for title, table in tables.items() if table]
    (out / "results.md").write_text("\n".join([*sections, *(f"{note}\n" for note in notes)]))
    samples = {
        evaluation.directory.name: read_jsonl(evaluation.directory / "samples.jsonl")
        for evaluation in evaluations
        if evaluation.seed == min(other.seed for other in evaluations if other.loss == evaluation.loss)
    }
    write_html(out / "report.html", rows, figures, samples, notes, cfg.base)
    print("\n".join([*sections, *notes, f"report: {out / 'report.html'}"]))


def read_evaluations(folder: Path, base: str = "pretrained") -> list[Evaluation]:
    """Every finished evaluation, those of the drafter that the others are compared with first.

    Raises:
        ArtifactError: there is none, or none of `base`, unless that is the pretrained drafter.
    """
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
        found.append(Evaluation(summary["loss"], summary["seed"], ratio, in_domain, counts, positions, path.parent))
    if not found:
        raise ArtifactError(f"no finished evaluation under {folder}: run `python -m experiments.evaluate` first")
    if base not in (names := {evaluation.loss for evaluation in found} | {"pretrained"}):
        raise ArtifactError(f"base is '{base}', but what was evaluated under {folder} is {sorted(names)}")
    return sorted(found, key=lambda evaluation: (evaluation.loss != base, evaluation.loss, evaluation.seed))


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


def markdown(rows: list[Row], base: str = "pretrained") -> str:
    """One line a task and loss."""
    lines = [
        f"| task | drafter | τ | expected τ | τ − {base} | MBSU | token rate | acceptance rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(row.task for row in rows):
        for row in (row for row in rows if row.task == task):
            gain = with_interval(row.gain, signed=True) if row.gain else ""
            cells = [task, row.loss, with_interval(row.block_efficiency), with_interval(row.expected), gain]
            cells += map(with_interval, (row.speedup, row.token_rate_ratio, row.acceptance_rate))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_interval(value: Estimate, signed: bool = False) -> str:
    """2.31 [2.20, 2.44]"""
    sign = "+" if signed else ""
    return f"{value.value:{sign}.2f} [{value.low:{sign}.2f}, {value.high:{sign}.2f}]"


def describe(evaluations: list[Evaluation]) -> str:
    """Prompts, seeds, c, and whether greedy text was the target's own."""
    manifests = [read_manifest(evaluation.directory, "evaluate")["counts"] for evaluation in evaluations]
    unlike = sum(counts["greedy_outputs_unlike_the_target"] for counts in manifests)
    greedy = sum(counts["greedy_outputs"] for counts in manifests)
    prompts = {(key[0], key[2]) for evaluation in evaluations for key in evaluation.counts}
    seeds = {evaluation.seed for evaluation in evaluations if evaluation.loss != "pretrained"}
    ratio, plural = evaluations[0].size_ratio, "s" * (len(seeds) != 1)
    described = f"{len(prompts)} prompts, {len(seeds)} seed{plural} a loss, c = {ratio:.4f}."
    if greedy:
        described += f" Greedy text equal to the target's own in {greedy - unlike} of {greedy} decodings."
    return described


def commits(evaluations: list[Evaluation]) -> str:
    """The commits of this project that the evaluations ran at."""
    manifests = (read_manifest(evaluation.directory, "evaluate") for evaluation in evaluations)
    return ", ".join(sorted({manifest["environment"]["commit"] for manifest in manifests}))


def in_order(gammas: Iterable[Gamma]) -> list[Gamma]:
    """Each gamma once: numbers ascending, then "adaptive"."""
    return sorted(set(gammas), key=lambda gamma: (isinstance(gamma, str), gamma))


def positions_table(evaluations: list[Evaluation]) -> str:
    """The acceptance rate at each place of a block, over all tasks and seeds, at the largest gamma."""
    largest = max((gamma for one in evaluations for gamma, *_ in one.positions if isinstance(gamma, int)), default=0)
    lines = [
        "| drafter | " + " | ".join(f"draft {place}" for place in range(1, largest + 1)) + " |",
        "| --- |" + " --- |" * largest,
    ]
    for loss in dict.fromkeys(one.loss for one in evaluations):
        sums = np.zeros((2, largest))
        for one in evaluations:
            for gamma, *counts in one.positions:
                if one.loss == loss and gamma == largest:
                    sums[:, : len(counts[0])] += np.array(counts)
        rates = [f"{accepted / tested:.2f}" if tested else "" for accepted, tested in sums.T]
        lines.append(f"| {loss} | " + " | ".join(rates) + " |")
    return "\n".join(lines) if largest else ""


def read_curves(folder: Path) -> dict[str, dict[int, list[dict[str, float]]]]:
    """loss -> seed -> the validation rows (step and val/*) of its finetuning."""
    curves: dict[str, dict[int, list[dict[str, float]]]] = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        settings = read_manifest(path.parent, "finetune")["settings"]
        with (path.parent / "logs" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/kld")]
        kept = [{key: float(row[key]) for key in row if key == "step" or key.startswith("val/")} for row in rows]
        curves.setdefault(settings["name"].rsplit("-seed", 1)[0], {})[settings["seed"]] = kept
    return curves


def machine() -> str:
    """The processor's name and cores."""
    description: dict[str, Any] = environment()
    info = Path("/proc/cpuinfo")
    model = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{description['cpus']} CPU cores" + (f" ({model[0]})" if model else "")


if __name__ == "__main__":
    main()
