"""Stage 5: make tables (Markdown and LaTeX), figures and the HTML report from counts. Config: conf/tables.yaml.

Every number is computed from the counts of the evaluations, summed over prompts and seeds. Intervals are 95% bootstrap
intervals over prompts. What was not run is left blank. runs.json describes the runs behind the numbers, and
counts.parquet has the counts themselves.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from drafter.artifacts.manifest import MANIFEST, fingerprint, read_jsonl, read_manifest, write_json, write_text
from drafter.artifacts.provenance import describe_machine
from drafter.artifacts.storage import local_directory
from drafter.metrics import conversation_and_turn
from experiments.reporting import paper
from experiments.reporting.breakdown import breakdown_tables
from experiments.reporting.by_rule import rule_table
from experiments.reporting.counts import write_counts
from experiments.reporting.cut_answers import describe_cut_answers
from experiments.reporting.figures import draw_along, draw_curves, draw_efficiency
from experiments.reporting.identity import PRETRAINED, read_record_of_run
from experiments.reporting.page import write_html
from experiments.reporting.results import (
    RATIO,
    Evaluation,
    ResultRow,
    active_parameters,
    check_evaluations,
    measured_rules,
    read_curves,
    read_evaluations,
    rows_by_rule,
    seed_and_step,
    sorted_gammas,
    summarise,
)
from experiments.reporting.tabular import Table, with_interval
from experiments.running.commands import command

log = logging.getLogger(__name__)
GENERATED = {
    "tables": (".md", ".tex"),
    "figures": (".png", ".svg"),
}  # folder -> the kinds of files that this stage writes there
CONVENTION = (
    "τ is tokens per target call and counts the bonus token of each block (1: autoregressive; at most γ + 1). "
    "Expected τ uses the probability of each acceptance instead of its outcome: the same mean, less noise. "
    "MBSU is τ / (cγ + 1), with c = drafter / target parameters. Token rate is tokens per second with the drafter / "
    "without, same prompts, same machine, one run. In brackets: 95% bootstrap intervals over prompts."
)


@command("tables")
def main(cfg: DictConfig) -> None:
    """Read every finished evaluation under the root, and write the tables, the figures, the report and the counts."""
    if cfg.dry_run:
        return log.info("tables reads what evaluate has written, so there is nothing to check")
    root, out = Path(cfg.root), Path(cfg.out)
    evaluations, variants, steps = (
        read_evaluations(root / name, cfg.base, cfg.acceptance_rule)
        for name in ("evaluate", "evaluate_variants", "evaluate_steps")
    )
    check_evaluations(evaluations, root / "evaluate", cfg.base, cfg.acceptance_rule)
    rows, curves = summarise(evaluations, cfg.base), read_curves(root / "finetune")
    last = max((row["step"] for seeds in curves.values() for lines in seeds.values() for row in lines), default=0)
    remove_generated(out)
    figures = {
        "block_efficiency": draw_efficiency(rows, out / "figures" / "block_efficiency"),
        "curves": draw_curves(curves, out / "figures" / "curves"),
    }
    if steps:
        found = paper.efficiency_by_step(steps, evaluations, int(last))
        figures["checkpoints"] = draw_along(found, out / "figures" / "checkpoints")
    rules = measured_rules(root / "evaluate")
    by_rule = {rule: read_evaluations(root / "evaluate", cfg.base, rule) for rule in rules} if len(rules) > 1 else {}
    questions = [*question_tables(cfg, evaluations, variants), *rule_table(by_rule)]
    tables = [*questions, *detail_tables(rows, evaluations, cfg.base)]
    notes = [
        CONVENTION,
        *([] if cfg.acceptance_rule == RATIO else [f"Drafts are accepted by the rule `{cfg.acceptance_rule}`."]),
        describe_prompts(evaluations),
        *describe_cut_answers(evaluations),
        describe_time(evaluations),
        describe_machines([*evaluations, *variants, *steps]),
    ]
    for table in tables:
        table.write(out / "tables")
    sections = [f"### {table.title}\n\n{table.markdown()}\n" for table in tables]
    traced = "runs.json has each run behind these numbers: its command, commit, versions, settings and inputs."
    text = "\n".join([*sections, *(f"{note}\n" for note in [*notes, traced])])
    news = not (out / "results.md").exists() or (out / "results.md").read_text(encoding="utf-8") != text
    write_text(out / "results.md", text)
    write_json(out / "runs.json", describe_runs(root))
    write_counts(out / "counts.parquet", [*evaluations, *variants, *steps])
    samples = {
        one.directory.name: rows_by_rule(read_jsonl(one.directory / "samples.jsonl"), cfg.acceptance_rule)
        for one in evaluations
        if one is min(paper.of_series(evaluations, one.series), key=seed_and_step)
    }
    write_html(out / "report.html", tables, curves, figures, samples, notes)
    print("\n".join([*sections, *notes, f"report: {out / 'report.html'}"]))
    if cfg.logger.wandb and news:
        from experiments.running.recording import record_tables  # the import takes a second

        record_tables(cfg, tables, out)
    if cfg.publish:
        publish(out, Path(cfg.publish))


def question_tables(cfg: DictConfig, evaluations: list[Evaluation], variants: list[Evaluation]) -> list[Table]:
    """Return the tables that answer the paper's questions, if their experiments were run."""
    gamma = sorted_gammas(gamma for one in evaluations for _, gamma, _ in one.counts)[0]
    tables = [architecture_table(cfg, evaluations)]
    if len({one.series for one in evaluations} - {PRETRAINED}) > 1:
        tables.append(paper.losses(evaluations))
    tables.append(paper.out_of_domain(evaluations, gamma))
    if any(not one.drafter.kinds for one in variants):
        tables.append(paper.data(evaluations, variants))
    if any(one.drafter.kinds for one in variants):
        tables.append(paper.transfer(evaluations, variants))
    return [table for table in tables if table.rows]


def architecture_table(cfg: DictConfig, evaluations: list[Evaluation]) -> Table:
    """Return the table of the models of these evaluations whose configs are on this machine."""
    with_model = [one for one in evaluations if one.size_ratio]  # others have no drafter of this architecture
    if not with_model:
        return paper.models({}, {}, {})
    counts = read_manifest(with_model[0].directory, "evaluate")["counts"]
    found = {name: (local_directory(path) or Path(path)) / "config.json" for name, path in cfg.models.items()}
    configs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}
    return paper.models(configs, {name: counts[f"{name}_parameters"] for name in cfg.models}, active_parameters(counts))


def detail_tables(rows: list[ResultRow], evaluations: list[Evaluation], base: str) -> list[Table]:
    """Return a table for each gamma with every task and drafter, and the tables of parts of the decodings."""
    tables = [
        task_table([row for row in rows if row.gamma == gamma], f"gamma_{gamma}", f"γ = {gamma}", base)
        for gamma in sorted_gammas(row.gamma for row in rows)
    ]
    return [*tables, *position_tables(evaluations), *breakdown_tables(evaluations)]


def task_table(rows: list[ResultRow], name: str, title: str, base: str = PRETRAINED) -> Table:
    """Return a table with one line per task and series; the highest τ of each task is bold."""
    is_timed = any(row.token_rate_ratio for row in rows)
    rate = ["token rate"] if is_timed else []
    columns = ["task", "drafter", "τ", "expected τ", f"τ − {base}", "MBSU", *rate, "acceptance rate"]
    lines = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        best = max(row.block_efficiency.value for row in of_task)
        for row in of_task:
            value = with_interval(row.block_efficiency)
            cells = [f"**{value}**" if row.block_efficiency.value == best else value]
            cells += [with_interval(row.expected), with_interval(row.gain, signed=True)]
            cells.append(with_interval(row.speedup))
            if is_timed:
                cells.append(with_interval(row.token_rate_ratio) or "not measured")
            cells.append(with_interval(row.acceptance_rate))
            lines.append([task.replace("_", " "), row.series, *cells])
    return Table(name, title, columns, lines)


def describe_runs(root: Path) -> dict[str, Any]:
    """Return, for each finished directory under the root, its manifest without files and config, and its fingerprint.

    The fingerprint is what other manifests name the directory by among their inputs.
    """
    found = {}
    for path in sorted(root.rglob(MANIFEST)):
        record = read_record_of_run(path)
        found[str(path.parent)] = {**record, "fingerprint": fingerprint(path.parent, record["stage"])}
    return found


def remove_generated(folder: Path) -> None:
    """Create tables/ and figures/ in a folder, and remove the files that an earlier run of this stage left there."""
    for name, kinds in GENERATED.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in (folder / name).iterdir():
            if path.suffix in kinds:
                path.unlink()


def publish(out: Path, folder: Path) -> None:
    """Copy the results into a folder of a repository, without the large files: report, counts and vector figures."""
    remove_generated(folder)
    for name in ("results.md", "runs.json"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / name, folder / name)
    for name in ("tables", "figures"):
        shutil.copytree(out / name, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.svg"))


def describe_prompts(evaluations: list[Evaluation]) -> str:
    """Return a note on the numbers of prompts and seeds, c, and how often greedy text was the target's own."""
    manifests = [read_manifest(evaluation.directory, "evaluate")["counts"] for evaluation in evaluations]
    unlike = sum(counts["greedy_outputs_unlike_the_target"] for counts in manifests)
    greedy = sum(counts["greedy_outputs"] for counts in manifests)
    turns = {(task, prompt) for evaluation in evaluations for task, _, prompt in evaluation.counts}
    prompts = {(task, conversation_and_turn(prompt)[0]) for task, prompt in turns}
    seeds = {evaluation.drafter.seed for evaluation in evaluations if evaluation.drafter.loss}
    ratios, plural = [one.size_ratio for one in evaluations if one.size_ratio], "s" * (len(seeds) != 1)
    asked = f"{len(prompts)} prompts"
    if len(turns) > len(prompts):
        asked = f"{len(prompts)} prompts and conversations with {len(turns)} turns, resampled as wholes"
    described = f"{asked}, {len(seeds)} seed{plural} per loss, c = {ratios[0] if ratios else 0:.4f}."
    if any("target_active_parameters" in counts for counts in manifests):
        described += " Of a mixture of experts, c counts the parameters that a token meets."
    if any(one.drafted_by_model for one in evaluations):
        described += " Drafts without a model cost nothing in MBSU: there cγ is c times the model's drafts per block."
    if greedy:
        described += f" Greedy text equal to the target's own in {greedy - unlike} of {greedy} decodings."
    return described


def describe_time(evaluations: list[Evaluation]) -> str:
    """Return a note on the shares of drafting, verification and the rest in decoding's time, at each gamma.

    It names the series whose times were not measured.
    """
    shares: list[str] = []
    untimed = ", ".join(dict.fromkeys(one.series for one in evaluations if not one.is_timed))
    evaluations = [one for one in evaluations if one.is_timed]
    for gamma in sorted_gammas(gamma for one in evaluations for _, gamma, _ in one.counts):
        counts = [counts for one in evaluations for (_, of_gamma, _), counts in one.counts.items() if of_gamma == gamma]
        total, drafting, verifying = (
            sum(getattr(row, name) for row in counts) for name in ("seconds", "drafting_seconds", "verifying_seconds")
        )
        rest = total - drafting - verifying
        parts = ((drafting, "drafting"), (verifying, "verification"), (rest, "the rest"))
        shares.append(f"at γ = {gamma} " + ", ".join(f"{100 * part / total:.0f}% {name}" for part, name in parts))
    notes = [f"Decoding's time: {'; '.join(shares)}."] if shares else []
    if untimed:
        notes.append(f"Times and token rates were not measured where prompts were decoded side by side: {untimed}.")
    return " ".join(notes)


def describe_machines(evaluations: list[Evaluation]) -> str:
    """Return a note on the machines and commits of this project that the evaluations' manifests name."""
    environments = [read_manifest(evaluation.directory, "evaluate")["environment"] for evaluation in evaluations]
    machines = "; ".join(sorted({describe_machine(recorded) for recorded in environments}))
    commits = ", ".join(sorted({recorded["commit"] for recorded in environments}))
    return f"Measured on {machines}, commit {commits}."


def position_tables(evaluations: list[Evaluation]) -> list[Table]:
    """Return the table of acceptance rates at each position of a block, over all tasks and seeds.

    It is made for the largest fixed gamma; there is no table if only the adaptive length was run.
    """
    largest = max((gamma for one in evaluations for gamma, *_ in one.positions if isinstance(gamma, int)), default=0)
    lines = []
    for series in dict.fromkeys(one.series for one in evaluations):
        sums = np.zeros((2, largest))
        for one in evaluations:
            for gamma, *counts in one.positions:
                if one.series == series and gamma == largest:
                    sums[:, : len(counts[0])] += np.array(counts)
        lines.append([series, *(f"{accepted / tested:.2f}" if tested else "" for accepted, tested in sums.T)])
    columns = ["drafter", *(f"draft {position}" for position in range(1, largest + 1))]
    title = f"Acceptance rate by position in the block, all tasks, γ = {largest}"
    return [Table("positions", title, columns, lines)] if largest else []


if __name__ == "__main__":
    main()
