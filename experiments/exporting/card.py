"""Write the model card of an exported drafter: how to serve it, its measured results, and how it was made."""

from collections.abc import Mapping
from pathlib import Path

import jinja2
from omegaconf import DictConfig, OmegaConf

from drafter.artifacts.manifest import write_text
from drafter.artifacts.storage import local_directory
from drafter.models.compatibility import Difference, template
from drafter.models.loading import load_tokenizer
from drafter.models.trimming import read_kept
from experiments.exporting.facts import Facts, GammaReport
from experiments.exporting.recipe import describe_architecture
from experiments.exporting.serving import followed_rule, serving
from experiments.reporting.results import ResultRow
from experiments.reporting.tabular import Table, with_interval
from experiments.running.inputs import target_source


def write_card(folder: Path, cfg: DictConfig, facts: Facts, differences: list[Difference]) -> None:
    """Write the README.md of an exported directory, with the header that the hub reads."""
    tokenizer = load_tokenizer(target_source(cfg))
    base = cfg.export.base_model or (None if local_directory(cfg.target.path) else cfg.target.path)
    gamma, report = facts.gamma(cfg.export.format), facts.report(cfg.export.format)
    header = {
        "library_name": {"hf": "transformers", "gguf": "gguf", "openvino": "openvino"}[cfg.export.format],
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model"],
        **({"base_model": base} if base else {}),
        **({"license": cfg.export.license} if cfg.export.license else {}),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("model_card.md.jinja").render(
        header=OmegaConf.to_yaml(OmegaConf.create(header)).strip(),
        cfg=cfg,
        facts=facts,
        name=base or cfg.target.path,
        training=training_table(cfg.export.drafter, facts.training).markdown(),
        results=results_table(facts.by_rule).markdown() if facts.rows else "",
        gammas=gamma_table(facts.reports).markdown() if facts.reports else "",
        gamma=gamma,
        report=report,
        best=facts.best,
        is_timed=is_timed(facts.by_rule),
        interval=with_interval,
        commands=serving(cfg.export.format, cfg.target.path, str(folder), gamma, facts.rule),
        describe_rule=lambda engine: describe_rule(engine, facts, gamma),
        vocabulary=len(tokenizer.get_vocab()),
        template=template(tokenizer),
        differences=differences,
        kept=read_kept(cfg.export.drafter),
    )
    write_text(folder / "README.md", text)


def describe_rule(engine: str, facts: Facts, gamma: int) -> str:
    """Return a sentence on the acceptance rule that an engine follows, and the τ that was measured by it."""
    rule = followed_rule(engine, facts.rule)
    if rule is None:
        return "Decode greedily: above temperature 0 this engine does not keep the target's distribution."
    row = facts.measured(rule, gamma)
    found = "for which τ was not measured"
    if row:
        found = f"for which τ = {with_interval(row.block_efficiency)} was measured ({row.task}, γ = {row.gamma})"
    return f"Above temperature 0 the acceptance rule is `{rule}`, {found}."


def is_timed(by_rule: Mapping[str, list[ResultRow]]) -> bool:
    """Return whether any of the results have token rates."""
    return any(row.token_rate_ratio for rows in by_rule.values() for row in rows)


def results_table(by_rule: Mapping[str, list[ResultRow]]) -> Table:
    """Return the table of results: one line per acceptance rule, task and gamma."""
    names, timed = list(by_rule) != ["ratio"], is_timed(by_rule)
    columns = [*(["rule"] if names else []), "task", "γ", "prompts", "τ", "MBSU", "acceptance rate"]
    columns += ["token rate"] if timed else []
    lines = []
    for rule, rows in by_rule.items():
        for row in rows:
            figures = [row.block_efficiency, row.speedup, row.acceptance_rate]
            cells = [row.task.replace("_", " "), str(row.gamma), str(row.prompts), *map(with_interval, figures)]
            cells += [with_interval(row.token_rate_ratio) or "not measured"] if timed else []
            lines.append([rule, *cells] if names else cells)
    return Table("results", "Results", columns, lines)


def gamma_table(reports: list[GammaReport]) -> Table:
    """Return the table of the best gamma: one line per engine and task."""
    lines = []
    for report in reports:
        for row in report.best():
            rate = with_interval(row.measured) if row.measured else f"{row.predicted:.2f} (predicted)"
            cells = [str(row.gamma), f"{row.block_efficiency:.2f}", f"{row.cost:.2f}", rate]
            lines.append([report.engine, row.task.replace("_", " "), *cells])
    columns = ["engine", "task", "best γ", "τ", "cost of a block in target calls", "token rate over the target alone"]
    return Table("gamma", "Best gamma", columns, lines)


def training_table(drafter: str, training: dict[str, str]) -> Table:
    """Return the table of how the drafter was made: its architecture, training, data and code."""
    described = describe_architecture(drafter) | training
    return Table("training", "How it was made", ["", ""], [list(row) for row in described.items()])
