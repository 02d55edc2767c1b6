"""Write the model card of an exported drafter: how to serve it, its measured results, and how it was made."""

from pathlib import Path

import jinja2
from omegaconf import DictConfig, OmegaConf

from drafter.artifacts.manifest import write_text
from drafter.artifacts.storage import local_directory
from drafter.models.compatibility import Difference, template
from drafter.models.loading import load_tokenizer
from drafter.models.trimming import read_kept
from experiments.exporting.facts import Facts
from experiments.exporting.gammas import GammaReport
from experiments.exporting.recipe import describe_architecture
from experiments.exporting.serving import followed_rule, serving
from experiments.reporting.results import POOLED, RATIO
from experiments.reporting.tabular import LEAST_PROMPTS, Table, with_interval, with_interval_of
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
        results=results_table(facts).markdown() if facts.rows else "",
        gammas=gamma_table(facts.reports).markdown() if facts.reports else "",
        gamma=gamma,
        tokens="token" if gamma == 1 else "tokens",
        report=report,
        best=facts.best,
        several=len({row.gamma for row in facts.rows}) > 1,
        is_timed=is_timed(facts),
        temperature=shared_temperature(facts),
        pooled=POOLED if any(row.task == POOLED for row in facts.rows) else None,
        interval=with_interval,
        least=LEAST_PROMPTS,
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
    start, row = f"Above temperature 0 the acceptance rule is `{rule}`", facts.measured(rule, gamma)
    if row is None:
        return f"{start}, for which τ was not measured."
    where = "; ".join([row.task.replace("_", " "), f"γ = {row.gamma}"])
    tau = f"τ = {with_interval(row.block_efficiency)}"
    if facts.is_greedy:
        return f"{start}. At temperature 0, where all rules are the same, {tau} was measured ({where})."
    at = f"; temperature {known}" if (known := temperature(facts, row.task)) else ""
    return f"{start}, for which {tau} was measured ({where}{at})."


def temperature(facts: Facts, task: str) -> str:
    """Return the temperatures at which a task was decoded, as text; "" if they are not known."""
    return " and ".join(f"{value:g}" for value in facts.temperatures.get(task, []))


def shared_temperature(facts: Facts) -> str:
    """Return the temperature of all rows of the results, as text; "" if they differ or are not known."""
    values = {temperature(facts, row.task) for row in facts.rows}
    return values.pop() if len(values) == 1 else ""


def is_timed(facts: Facts) -> bool:
    """Return whether any of the results have token rates."""
    return any(row.token_rate_ratio for row in facts.rows)


def results_table(facts: Facts) -> Table:
    """Return the table of results: one line per task and gamma, with τ by each acceptance rule that was measured.

    The other columns are about the main rule. The temperature is a column if it differs.
    """
    rules = [facts.main_rule] if facts.is_greedy else list(facts.by_rule)
    by_rule = {rule: {(row.task, row.gamma): row for row in facts.by_rule[rule]} for rule in rules}
    differs, timed = len({temperature(facts, row.task) for row in facts.rows}) > 1, is_timed(facts)
    named = rules != [RATIO] and not facts.is_greedy
    columns = ["task", *(["temperature"] if differs else []), "γ", "prompts"]
    columns += [f"τ, `{rule}`" if named else "τ" for rule in rules]
    columns += ["MBSU", "acceptance rate", *(["token rate"] if timed else [])]
    lines = []
    for row in facts.rows:
        others = [by_rule[rule].get((row.task, row.gamma)) for rule in rules]
        line = [row.task.replace("_", " "), *([temperature(facts, row.task)] if differs else [])]
        line += [str(row.gamma), str(row.prompts)]
        line += [with_interval(other.block_efficiency) if other else "not measured" for other in others]
        line += [with_interval(row.speedup), with_interval(row.acceptance_rate)]
        lines.append([*line, *([with_interval(row.token_rate_ratio) or "not measured"] if timed else [])])
    return Table("results", "Results", columns, lines)


def gamma_table(reports: list[GammaReport]) -> Table:
    """Return the table of the best gamma: one line per engine, precision and task.

    The precision and the number of prompts are columns if they are known of a report. The rate of few prompts has no
    interval.
    """
    differs = any(report.precision for report in reports)
    counted = any(row.prompts for report in reports for row in report.rows)
    lines = []
    for report in reports:
        engine = report.engine if report.rule == RATIO else f"{report.engine}, by `{report.rule}`"
        for row in report.best():
            rate = f"{row.predicted:.2f} (predicted)"
            if row.measured:
                rate = with_interval_of(row.measured, row.prompts)
            line = [engine, *([report.precision] if differs else []), row.task.replace("_", " ")]
            line += [str(row.prompts or "")] if counted else []
            lines.append([*line, str(row.gamma), f"{row.block_efficiency:.2f}", f"{row.cost:.2f}", rate])
    columns = ["engine", *(["target, drafter in"] if differs else []), "task", *(["prompts"] if counted else [])]
    columns += ["best γ", "τ", "cost of a block in target calls", "token rate over the target alone"]
    return Table("gamma", "Best gamma", columns, lines)


def training_table(drafter: str, training: dict[str, str]) -> Table:
    """Return the table of how the drafter was made: its architecture, training, data and code."""
    described = describe_architecture(drafter) | training
    return Table("training", "How it was made", ["", ""], [list(row) for row in described.items()])
