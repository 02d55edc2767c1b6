"""Gather what is known of a drafter: how it was made, how well it drafts, and with how many tokens per block.

An export keeps these facts in its manifest, so that an export of the export has them too.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drafter.artifacts.manifest import MANIFEST, read_jsonl, read_manifest
from drafter.decoding.acceptance import RULES
from drafter.metrics import Estimate
from drafter.models.fingerprints import model_fingerprint
from experiments.exporting.recipe import Manifest, describe_training, manifest_of
from experiments.reporting.gamma_page import GammaRow
from experiments.reporting.identity import identity_of
from experiments.reporting.results import POOLED, RATIO, ResultRow, read_evaluations, summarise

DEFAULT_GAMMA = 3  # the paper's gamma, used if nothing was measured
LOOP, COMPILED = "this project's loop", "this project's loop, both models compiled"
ENGINE_OF = {"hf": LOOP, "gguf": "llama-server", "openvino": "openvino"}  # format -> the engine whose gamma it gets


class GammaReport(NamedTuple):
    """What an engine gains at each gamma: a report of `experiments.gamma`, or of `benchmarks.engines`.

    Attributes:
        engine: its name; this project's loop, with and without compiled models, counts as two.
        rows: a row for each task and gamma.
        rule: the acceptance rule by which this project's loop decoded above temperature 0.
    """

    engine: str
    rows: list[GammaRow]
    rule: str = RATIO

    def best(self) -> list[GammaRow]:
        """Return the row of the best gamma for each task: by measurement if several were decoded, else predicted."""
        tasks = dict.fromkeys(row.task for row in self.rows)
        return [max((row for row in self._compared() if row.task == task), key=speedup) for task in tasks]

    @property
    def gamma(self) -> int:
        """Return the gamma with the highest speed-up, as a mean over the tasks."""
        by_gamma: dict[int, list[float]] = {}
        for row in self._compared():
            by_gamma.setdefault(row.gamma, []).append(speedup(row))
        return max(by_gamma, key=lambda gamma: sum(by_gamma[gamma]) / len(by_gamma[gamma]))

    def _compared(self) -> list[GammaRow]:
        measured = [row for row in self.rows if row.measured]
        if len({row.gamma for row in measured}) > 1:
            return measured
        return [row._replace(measured=None) for row in self.rows]


class Facts(NamedTuple):
    """What is known of a drafter.

    Attributes:
        manifest: of the stage that made it; empty for a drafter from elsewhere.
        training: lines on how it was made.
        by_rule: the results of its evaluation by each acceptance rule that was measured.
        size_ratio: c, the drafter's parameters divided by the target's; None if it was not evaluated.
        reports: what each engine gains at each gamma.
        loss: the name of the loss that it was finetuned with, if it is known.
    """

    manifest: Manifest
    training: dict[str, str]
    by_rule: dict[str, list[ResultRow]]
    size_ratio: float | None
    reports: list[GammaReport]
    loss: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Return the config of the stage that made it."""
        return dict(self.manifest.get("config", {}))

    @property
    def rule(self) -> str:
        """Return the acceptance rule that it was made for: all losses but `hit` are for `ratio`."""
        return "argmax" if self.loss == "hit" else RATIO

    @property
    def rows(self) -> list[ResultRow]:
        """Return the results by the rule that it was made for, or else by another one."""
        return self.by_rule.get(self.rule) or next(iter(self.by_rule.values()), [])

    @property
    def best(self) -> ResultRow | None:
        """Return the result with the highest MBSU over the tasks in the domain; None if nothing was measured."""
        fixed = [row for row in self.rows if isinstance(row.gamma, int)]
        pooled = [row for row in fixed if row.task == POOLED] or fixed
        return max(pooled, key=lambda row: row.speedup.value, default=None)

    def measured(self, rule: str, gamma: int) -> ResultRow | None:
        """Return the result by a rule on the tasks of the best result; None if it was not measured.

        It is that at this gamma, or else that at the gamma of the best result.
        """
        if not self.best:
            return None
        by_gamma = {row.gamma: row for row in self.by_rule.get(rule, []) if row.task == self.best.task}
        return by_gamma.get(gamma) or by_gamma.get(self.best.gamma)

    def report(self, kind: str) -> GammaReport | None:
        """Return the report of the engine that loads a format, or else that of this project's loop.

        Of several by different acceptance rules, it is that by the rule that the drafter was made for.
        """
        engines = (ENGINE_OF[kind], LOOP, COMPILED)
        found = [one for one in self.reports if one.engine in engines]
        return min(found, key=lambda one: (engines.index(one.engine), one.rule != self.rule), default=None)

    def gamma(self, kind: str) -> int:
        """Return the number of tokens to draft per block: the best in wall-clock time, or else by MBSU."""
        if report := self.report(kind):
            return report.gamma
        return int(self.best.gamma) if self.best else DEFAULT_GAMMA

    def record(self) -> dict[str, Any]:
        """Return the facts as they lie in the manifest of an export."""
        return {
            "training": self.training,
            "results": [row._asdict() | _named(rule) for rule, rows in self.by_rule.items() for row in rows],
            "size_ratio": self.size_ratio,
            "gamma": [
                {"engine": one.engine, "rows": [row._asdict() for row in one.rows], **_named(one.rule)}
                for one in self.reports
            ],
            "loss": self.loss,
        }


def speedup(row: GammaRow) -> float:
    """Return the measured token rate relative to the target alone, or else the predicted one."""
    return row.measured.value if row.measured else row.predicted


def gather(drafter: str, engines: Sequence[str] = ()) -> Facts:
    """Return what is known of a drafter. If no stage of this project made it, that is only its manifest, if any.

    Args:
        drafter: its directory, or a hub name.
        engines: files of `benchmarks.engines` with measurements of this drafter.

    Raises:
        ArtifactError: an earlier version of this project made it.
        ValueError: a file of `engines` is not one of benchmarks.engines.
    """
    manifest, measured = manifest_of(drafter), [read_engine(path) for path in engines]
    config = manifest.get("config", {})
    if not config:
        return Facts(manifest, {}, {}, None, measured)
    loss = identity_of(drafter).loss
    if manifest["stage"] == "export":
        return read_facts(manifest, measured)
    by_rule, size_ratio = {}, None
    folders = _directories(config, "evaluate", drafter)
    for rule in RULES:
        every = [
            one for parent in _distinct(path.parent for path in folders) for one in read_evaluations(parent, rule=rule)
        ]
        if found := [one for one in every if one.directory in folders]:
            chosen = min(found, key=lambda one: not one.is_timed)
            by_rule[rule], size_ratio = summarise([chosen], base=chosen.series), chosen.size_ratio
    reports = [read_gamma(folder) for folder in _directories(config, "gamma", drafter)]
    return Facts(manifest, describe_training(manifest), by_rule, size_ratio, _newest(reports + measured), loss)


def read_facts(manifest: Manifest, measured: Sequence[GammaReport]) -> Facts:
    """Return the facts that the manifest of an export has (see `Facts.record`), and newly measured ones."""
    known = manifest.get("facts", {})
    by_rule: dict[str, list[ResultRow]] = {}
    for row in known.get("results", []):
        fields = {name: value for name, value in row.items() if name != "rule"}
        by_rule.setdefault(row.get("rule", RATIO), []).append(ResultRow(**_with_estimates(fields)))
    reports = [
        GammaReport(one["engine"], [GammaRow(**_with_estimates(row)) for row in one["rows"]], one.get("rule", RATIO))
        for one in known.get("gamma", [])
    ]
    training, ratio = describe_training(manifest), known.get("size_ratio")
    return Facts(manifest, training, by_rule, ratio, _newest([*reports, *measured]), known.get("loss"))


def read_gamma(folder: Path) -> GammaReport:
    """Read the report of `experiments.gamma`: the tasks in the domain, or all if none is."""
    settings = read_manifest(folder, "gamma")["settings"]
    rows = [GammaRow(**_with_estimates(row)) for row in read_jsonl(folder / "gamma.jsonl")]
    inside = [row for row in rows if settings["tasks"][row.task]["in_domain"]]
    engine, rule = COMPILED if settings["compile"] else LOOP, settings.get("acceptance_rule", RATIO)
    return GammaReport(engine, inside or rows, rule)


def read_engine(path: str) -> GammaReport:
    """Read a file of `benchmarks.engines`: the single tasks, or all prompts if they have no task.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [
            GammaRow(
                one["task"],
                one["gamma"],
                Estimate(**one["tau"]).value,
                one["block_cost"],
                one["ratio"]["value"],
                Estimate(**one["ratio"]),
            )
            for one in found["summaries"]
        ]
        engine = str(found["arguments"]["engine"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(
            f"export.engines has {path}, must be a file that benchmarks.engines wrote: {problem}"
        ) from None
    tasks = {row.task for row in rows}
    return GammaReport(engine, [row for row in rows if row.task != "all" or len(tasks) == 1])


def _directories(config: dict[str, Any], stage: str, drafter: str) -> list[Path]:
    """Return the directories of a drafter's finished evaluations, or of its gamma reports, in its root."""
    paths = [path.parent for path in sorted(Path(config["root"]).glob(f"{stage}*/*/{MANIFEST}"))]
    fingerprint = model_fingerprint(drafter)
    return [path for path in paths if read_manifest(path, stage)["inputs"]["drafter"] == fingerprint]


def _newest(reports: Iterable[GammaReport]) -> list[GammaReport]:
    """Return the last report of each engine by each rule."""
    return list({(report.engine, report.rule): report for report in reports}.values())


def _named(rule: str) -> dict[str, str]:
    """Return the field that names an acceptance rule, which a record has only if it is not the paper's."""
    return {} if rule == RATIO else {"rule": rule}


def _distinct(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))


def _with_estimates(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row that was read from JSON, in which each list was an estimate."""
    return {name: Estimate(*value) if isinstance(value, list) else value for name, value in row.items()}
