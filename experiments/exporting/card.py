"""Write the model card of an exported drafter: how to serve it, its measured results, and how it was made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from omegaconf import DictConfig, OmegaConf

from drafter.artifacts.manifest import MANIFEST, read_manifest, write_text
from drafter.artifacts.storage import local_directory
from drafter.decoding.acceptance import RULES
from drafter.models.compatibility import Difference, template
from drafter.models.fingerprints import model_fingerprint
from drafter.models.loading import load_config, load_tokenizer
from drafter.models.trimming import read_kept
from experiments.exporting.serving import followed_rule, serving
from experiments.reporting.identity import identity_of, read_record
from experiments.reporting.results import POOLED, ResultRow, read_evaluations, summarise
from experiments.reporting.tabular import Table, with_interval
from experiments.running.inputs import target_source

DEFAULT_GAMMA = 3  # the paper's gamma, used if nothing was measured


class Facts(NamedTuple):
    """What is known of a drafter.

    Attributes:
        manifest: of the stage that made it; empty for a drafter from elsewhere.
        config: of that stage.
        by_rule: the results of its evaluation by each acceptance rule that was measured.
        size_ratio: c, the drafter's parameters divided by the target's; None if it was not evaluated.
        loss: the name of the loss that it was finetuned with, if it is known.
    """

    manifest: dict[str, Any]
    config: dict[str, Any]
    by_rule: dict[str, list[ResultRow]]
    size_ratio: float | None
    loss: str | None = None

    @property
    def rule(self) -> str:
        """The acceptance rule that it was made for: all losses but `hit` are of `ratio`."""
        return "argmax" if self.loss == "hit" else "ratio"

    @property
    def rows(self) -> list[ResultRow]:
        """The results by the rule that it was made for, or else by another one."""
        return self.by_rule.get(self.rule) or next(iter(self.by_rule.values()), [])

    def measured(self, rule: str) -> ResultRow | None:
        """Return the result by another rule on the tasks, and at the gamma, of the best one; None if not measured."""
        where = self.best and (self.best.task, self.best.gamma)
        return next((row for row in self.by_rule.get(rule, []) if (row.task, row.gamma) == where), None)

    @property
    def best(self) -> ResultRow | None:
        """The result with the highest MBSU over the tasks in the domain; None if nothing was measured."""
        fixed = [row for row in self.rows if isinstance(row.gamma, int)]
        pooled = [row for row in fixed if row.task == POOLED] or fixed
        return max(pooled, key=lambda row: row.speedup.value, default=None)

    @property
    def gamma(self) -> int:
        """The number of tokens to draft per block."""
        return int(self.best.gamma) if self.best else DEFAULT_GAMMA


def manifest_of(folder: str) -> dict[str, Any]:
    """Return a directory's manifest; {} if no stage of this project made it."""
    path = Path(folder) / MANIFEST
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def gather(drafter: str) -> Facts:
    """Return what is known of a drafter. If no stage of this project made it, that is only its manifest, if any.

    Raises:
        ArtifactError: an earlier version of this project made it.
    """
    manifest = manifest_of(drafter)
    config = manifest.get("config", {})
    if not config:
        return Facts(manifest, config, {}, None)
    loss, ours = identity_of(drafter).loss, model_fingerprint(drafter)
    folders = [path.parent for path in sorted(Path(config["root"]).glob(f"evaluate*/*/{MANIFEST}"))]
    folders = [path for path in folders if read_manifest(path, "evaluate")["inputs"]["drafter"] == ours]
    by_rule, size_ratio = {}, None
    for rule in RULES:
        found = [one for path in folders for one in read_evaluations(path.parent, rule=rule) if one.directory == path]
        if found:
            chosen = min(found, key=lambda one: not one.is_timed)
            by_rule[rule], size_ratio = summarise([chosen], base=chosen.series), chosen.size_ratio
    return Facts(manifest, config, by_rule, size_ratio, loss)


def write_card(folder: Path, cfg: DictConfig, facts: Facts, differences: list[Difference]) -> None:
    """Write the README.md of an exported directory, with the header that the hub reads."""
    tokenizer = load_tokenizer(target_source(cfg))
    is_path = local_directory(cfg.target.path) is not None
    header = {
        "library_name": {"hf": "transformers", "gguf": "gguf", "openvino": "openvino"}[cfg.export.format],
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model"],
        **({} if is_path else {"base_model": cfg.target.path}),
        **({"license": cfg.export.license} if cfg.export.license else {}),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("model_card.md.jinja").render(
        header=OmegaConf.to_yaml(OmegaConf.create(header)).strip(),
        cfg=cfg,
        facts=facts,
        training=training_table(cfg.export.drafter, facts.manifest).markdown() if facts.manifest else "",
        results=results_table(facts.by_rule).markdown() if facts.rows else "",
        best=facts.best,
        is_timed=is_timed(facts.by_rule),
        interval=with_interval,
        commands=serving(cfg.export.format, cfg.target.path, str(folder), facts.gamma, facts.rule),
        describe_rule=lambda engine: describe_rule(engine, facts),
        vocabulary=len(tokenizer.get_vocab()),
        template=template(tokenizer),
        differences=differences,
        kept=read_kept(cfg.export.drafter),
    )
    write_text(folder / "README.md", text)


def describe_rule(engine: str, facts: Facts) -> str:
    """Return a sentence on the acceptance rule that an engine follows, and the τ that was measured by it."""
    rule = followed_rule(engine, facts.rule)
    if rule is None:
        return "Decode greedily: above temperature 0 this engine does not keep the target's distribution."
    row = facts.measured(rule)
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


def training_table(drafter: str, manifest: dict[str, Any]) -> Table:
    """Return the table of how the drafter was made: its architecture, training, data and code."""
    described = describe_architecture(drafter) | describe_training(manifest)
    return Table("training", "How it was made", ["", ""], [list(row) for row in described.items()])


def describe_architecture(drafter: str) -> dict[str, str]:
    """Return a line that describes the drafter's architecture."""
    config = load_config(drafter)
    shape = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads"
    tied = "tied" if config.tie_word_embeddings else "untied"
    return {"architecture": f"{config.model_type}: {shape}, {config.vocab_size:,} rows of embedding, {tied}"}


def describe_training(manifest: dict[str, Any]) -> dict[str, str]:
    """Return lines on how the drafter was made, from its manifest and those of its inputs that are on this machine.

    Raises:
        ArtifactError: an earlier version of this project made the drafter.
    """
    config = manifest.get("config", {})
    if not config:
        return {}
    if manifest["stage"] == "trim":
        head = f"{manifest['counts']['kept']} of {manifest['counts']['vocabulary']} tokens kept"
        return {"head": head} | describe_training(manifest_of(config["trim"]["drafter"]))
    rows = {"seed": str(config["seed"]), "command": f"`{manifest['command']}`"}
    if manifest["stage"] == "finetune":
        settings, drafter = manifest["settings"], read_record(manifest, config["out"])
        values = {key: value for key, value in settings["loss_settings"].items() if key != "name"}
        rows["distillation loss"] = ", ".join([str(drafter.loss), *(f"{key} {one}" for key, one in values.items())])
        rows["distillation"] = (
            f"{settings['max_steps']} steps of {settings['batch_size']} samples, "
            f"{settings['text_share']:.0%} of them text; {manifest['seconds']:.0f} s"
        )
        rows |= describe_responses(config)
        rows |= describe_pretraining(config["inputs"].get("drafter", ""))
    else:
        rows |= describe_pretraining(str(config["out"]))
    rows["data"] = ", ".join(data_names(config["data"]))
    environment = manifest["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return rows | {"code": f"commit {environment['commit']}; {versions}"}


def describe_responses(config: dict[str, Any]) -> dict[str, str]:
    """Return a line on the responses that the drafter was trained on."""
    folder = config["inputs"].get("cache") or config["inputs"].get("responses") or ""
    if not (manifest := manifest_of(folder)):
        return {}
    counts = manifest["counts"]
    if manifest["stage"] == "cache":
        size = f"{counts['rows']} responses of {counts['tokens']} tokens"
    else:
        size = f"{counts['written']} responses"
    how = config["distillation"]
    return {"responses": f"{size}, written by: {how['by']}, at temperatures {how['temperatures']}"}


def describe_pretraining(folder: str) -> dict[str, str]:
    """Return a line on the pretraining that the drafter started from."""
    manifest = manifest_of(folder)
    if manifest.get("stage") != "pretrain":
        return {}
    settings = manifest["settings"]
    tokens = settings["max_steps"] * settings["batch_size"] * settings["sequence_length"]
    return {"pretraining": f"{settings['max_steps']} steps, {tokens:,} tokens, {manifest['seconds']:.0f} s"}


def data_names(data: dict[str, Any]) -> list[str]:
    """Return the names of the data sets, with the revision if one is given."""
    if data["kind"] == "docstrings":
        return ["docstrings and code of " + ", ".join(data["packages"])]
    found = [data["pretraining"], *data["instructions"].values()]
    return [str(one["path"]) + (f" ({one['revision']})" if one.get("revision") else "") for one in found]
