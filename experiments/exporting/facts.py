"""Gather what is known of a drafter: how it was made, how well it drafts, and with how many tokens per block.

An export keeps these facts in its manifest, so that an export of the export has them too.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drafter.artifacts.manifest import MANIFEST, read_jsonl, read_manifest
from drafter.metrics import Estimate
from drafter.models.fingerprints import model_fingerprint
from experiments.exporting.recipe import Manifest, describe_training, manifest_of
from experiments.reporting.gamma_page import GammaRow
from experiments.reporting.identity import identity_of
from experiments.reporting.results import POOLED, ResultRow, read_evaluations, summarise

DEFAULT_GAMMA = 3  # the paper's gamma, used if nothing was measured
LOOP, COMPILED = "this project's loop", "this project's loop, both models compiled"
ENGINE_OF = {"hf": LOOP, "gguf": "llama-server", "openvino": "openvino"}  # format -> the engine whose gamma it gets


class GammaReport(NamedTuple):
    """What an engine gains at each gamma: a report of `experiments.gamma`, or of `benchmarks.engines`."""

    engine: str
    rows: list[GammaRow]

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
        rows: the results of its evaluation.
        size_ratio: c, the drafter's parameters divided by the target's; None if it was not evaluated.
        reports: what each engine gains at each gamma.
    """

    manifest: Manifest
    training: dict[str, str]
    rows: list[ResultRow]
    size_ratio: float | None
    reports: list[GammaReport]

    @property
    def config(self) -> dict[str, Any]:
        """Return the config of the stage that made it."""
        return dict(self.manifest.get("config", {}))

    @property
    def best(self) -> ResultRow | None:
        """The result with the highest MBSU over the tasks in the domain; None if nothing was measured."""
        fixed = [row for row in self.rows if isinstance(row.gamma, int)]
        pooled = [row for row in fixed if row.task == POOLED] or fixed
        return max(pooled, key=lambda row: row.speedup.value, default=None)

    def report(self, kind: str) -> GammaReport | None:
        """Return the report of the engine that loads a format, or else that of this project's loop."""
        by_engine = {report.engine: report for report in self.reports}
        return next((by_engine[one] for one in (ENGINE_OF[kind], LOOP, COMPILED) if one in by_engine), None)

    def gamma(self, kind: str) -> int:
        """Return the number of tokens to draft per block: the best in wall-clock time, or else by MBSU."""
        if report := self.report(kind):
            return report.gamma
        return int(self.best.gamma) if self.best else DEFAULT_GAMMA

    def record(self) -> dict[str, Any]:
        """Return the facts as they lie in the manifest of an export."""
        return {
            "training": self.training,
            "results": [row._asdict() for row in self.rows],
            "size_ratio": self.size_ratio,
            "gamma": [{"engine": one.engine, "rows": [row._asdict() for row in one.rows]} for one in self.reports],
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
        return Facts(manifest, {}, [], None, measured)
    identity_of(drafter)
    if manifest["stage"] == "export":
        known = manifest.get("facts", {})
        reports = [
            GammaReport(one["engine"], [_gamma_row(row) for row in one["rows"]]) for one in known.get("gamma", [])
        ]
        rows = [_result_row(row) for row in known.get("results", [])]
        return Facts(manifest, describe_training(manifest), rows, known.get("size_ratio"), _newest(reports + measured))
    found = []
    for ours in _manifests(config, "evaluate", drafter):
        found += [one for one in read_evaluations(ours.parent) if one.directory == ours]
    rows = summarise(found[:1], base=found[0].series) if found else []
    reports = [read_gamma(folder) for folder in _manifests(config, "gamma", drafter)]
    ratio = found[0].size_ratio if found else None
    return Facts(manifest, describe_training(manifest), rows, ratio, _newest(reports + measured))


def read_gamma(folder: Path) -> GammaReport:
    """Read the report of `experiments.gamma`: the tasks in the domain, or all if none is."""
    settings = read_manifest(folder, "gamma")["settings"]
    rows = [_gamma_row(row) for row in read_jsonl(folder / "gamma.jsonl")]
    inside = [row for row in rows if settings["tasks"][row.task]["in_domain"]]
    return GammaReport(COMPILED if settings["compile"] else LOOP, inside or rows)


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


def _manifests(config: dict[str, Any], stage: str, drafter: str) -> list[Path]:
    """Return the directories of a drafter's finished evaluations, or of its gamma reports, in its root."""
    paths = [path.parent for path in sorted(Path(config["root"]).glob(f"{stage}*/*/{MANIFEST}"))]
    fingerprint = model_fingerprint(drafter)
    return [path for path in paths if read_manifest(path, stage)["inputs"]["drafter"] == fingerprint]


def _newest(reports: Iterable[GammaReport]) -> list[GammaReport]:
    """Return the last report of each engine."""
    return list({report.engine: report for report in reports}.values())


def _gamma_row(row: dict[str, Any]) -> GammaRow:
    return GammaRow(**_with_estimates(row))


def _result_row(row: dict[str, Any]) -> ResultRow:
    return ResultRow(**_with_estimates(row))


def _with_estimates(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row that was read from JSON, in which each list was an estimate."""
    return {name: Estimate(*value) if isinstance(value, list) else value for name, value in row.items()}
