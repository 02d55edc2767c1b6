"""Stage 5: counts -> Markdown tables, figures and the HTML report. Config: conf/tables.yaml. No torch here.

Every figure is computed from the counts of the evaluations, summed over prompts and seeds; intervals are bootstrap 95%
intervals over prompts. A cell that was not run is left blank.
"""

import logging
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig

from drafter.artifacts import environment, read_jsonl, read_manifest
from drafter.metrics import Estimate
from experiments.figures import draw_curves, draw_efficiency
from experiments.report import write_html
from experiments.results import Evaluation, Row, in_order, read_curves, read_evaluations, summarise

log = logging.getLogger(__name__)
CONVENTION = (
    "τ is tokens per target call and counts the target's own token of each block (1: autoregressive; at most γ + 1). "
    "Expected τ has each accept test's chance in the place of its coin: the same mean, less noise. "
    "MBSU is τ / (cγ + 1), c drafter / target parameters. Token rate is tokens per second with the drafter / without, "
    "same prompts, same machine, one run. In brackets: 95% bootstrap intervals over prompts."
)


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
    notes = [
        CONVENTION,
        describe(evaluations),
        where_the_time_goes(evaluations),
        f"Measured on {machine()}, commit {commits(evaluations)}.",
    ]
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


def where_the_time_goes(evaluations: list[Evaluation]) -> str:
    """The shares of drafting, verifying and the rest, at each gamma."""
    shares = []
    for gamma in in_order(gamma for one in evaluations for _, gamma, _ in one.counts):
        counts = [counts for one in evaluations for (_, of_gamma, _), counts in one.counts.items() if of_gamma == gamma]
        total, drafting, verifying = (
            sum(getattr(row, name) for row in counts) for name in ("seconds", "drafting_seconds", "verifying_seconds")
        )
        rest = total - drafting - verifying
        parts = ((drafting, "drafting"), (verifying, "verifying"), (rest, "the rest"))
        shares.append(f"at γ = {gamma} " + ", ".join(f"{100 * part / total:.0f}% {name}" for part, name in parts))
    return f"Decoding's time: {'; '.join(shares)}."


def commits(evaluations: list[Evaluation]) -> str:
    """The commits of this project that the evaluations ran at."""
    manifests = (read_manifest(evaluation.directory, "evaluate") for evaluation in evaluations)
    return ", ".join(sorted({manifest["environment"]["commit"] for manifest in manifests}))


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
