"""Gather what is known of a drafter: how it was made, how well it drafts, and with how many tokens per block.

An export keeps these facts in its manifest, so that an export of the export has them too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from drafter.artifacts.manifest import MANIFEST, digest, read_manifest
from drafter.decoding.acceptance import RULES
from drafter.models.fingerprints import model_fingerprint
from experiments.exporting.gammas import COMPILED, LOOP, GammaReport, newest, read_engine, read_gamma, with_estimates
from experiments.exporting.recipe import Manifest, describe_training, manifest_of
from experiments.reporting.gamma_page import GammaRow
from experiments.reporting.identity import identity_of
from experiments.reporting.results import POOLED, RATIO, Evaluation, ResultRow, read_evaluations, summarise

DEFAULT_GAMMA = 3  # the paper's gamma, used if nothing was measured
ENGINE_OF = {"hf": LOOP, "gguf": "llama-server", "openvino": "openvino"}  # format -> the engine whose gamma it gets


class Facts(NamedTuple):
    """What is known of a drafter.

    Attributes:
        manifest: of the stage that made it; empty for a drafter from elsewhere.
        training: lines on how it was made.
        by_rule: the results of its evaluation by each acceptance rule that was measured.
        size_ratio: c, the drafter's parameters divided by the target's; None if it was not evaluated.
        reports: what each engine gains at each gamma.
        loss: the name of the loss that it was finetuned with, if it is known.
        temperatures: task, or POOLED -> the temperatures at which its evaluation decoded it; {} if they are not known.
    """

    manifest: Manifest
    training: dict[str, str]
    by_rule: dict[str, list[ResultRow]]
    size_ratio: float | None
    reports: list[GammaReport]
    loss: str | None = None
    temperatures: Mapping[str, list[float]] = MappingProxyType({})

    @property
    def config(self) -> dict[str, Any]:
        """Return the config of the stage that made it."""
        return dict(self.manifest.get("config", {}))

    @property
    def rule(self) -> str:
        """Return the acceptance rule that it was made for."""
        return rule_for(self.loss)

    @property
    def main_rule(self) -> str:
        """Return the rule that it was made for, or else another one that was measured."""
        return self.rule if self.rule in self.by_rule else next(iter(self.by_rule), self.rule)

    @property
    def rows(self) -> list[ResultRow]:
        """Return the results by the main rule."""
        return self.by_rule.get(self.main_rule, [])

    @property
    def is_greedy(self) -> bool:
        """Return whether all tasks were decoded at temperature 0, where the results hold for every rule."""
        return bool(self.temperatures) and not any(any(values) for values in self.temperatures.values())

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
        rows = self.rows if self.is_greedy else self.by_rule.get(rule, [])
        by_gamma = {row.gamma: row for row in rows if row.task == self.best.task}
        return by_gamma.get(gamma) or by_gamma.get(self.best.gamma)

    def report(self, kind: str) -> GammaReport | None:
        """Return the report of the engine that loads a format, or else that of this project's loop.

        Of several by different acceptance rules, it is that by the rule that the drafter was made for; of several in
        different precisions, the first.
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
                {
                    "engine": one.engine,
                    "rows": [row._asdict() for row in one.rows],
                    **_named(one.rule),
                    **({"precision": one.precision} if one.precision else {}),
                }
                for one in self.reports
            ],
            "loss": self.loss,
            "temperatures": dict(self.temperatures),
        }


def gather(drafter: str, engines: Sequence[str] = ()) -> Facts:
    """Return what is known of a drafter. If no stage of this project made it, that is only its manifest, if any.

    Args:
        drafter: its directory, or a hub name.
        engines: files of `benchmarks.engines` with measurements of this drafter (see `read_engine`).

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
    found = choose_evaluations(_directories(config, "evaluate", drafter), rule_for(loss))
    main = next(iter(found.values()), None)
    return Facts(
        manifest,
        describe_training(manifest),
        {rule: summarise([one], base=one.series) for rule, one in found.items()},
        main.size_ratio if main else None,
        newest([read_gamma(folder) for folder in _directories(config, "gamma", drafter)] + measured),
        loss,
        temperatures_of(main) if main else {},
    )


def rule_for(loss: str | None) -> str:
    """Return the acceptance rule that a loss is for: `argmax` for `hit`, and `ratio` for all others."""
    return "argmax" if loss == "hit" else RATIO


def choose_evaluations(folders: Sequence[Path], first: str) -> dict[str, Evaluation]:
    """Return one evaluation of a drafter by each rule that was measured, preferably one with token rates.

    The rules share a table. An evaluation by another rule than the first is therefore left out if it has other prompts
    or another sampling.

    Args:
        folders: the directories of the drafter's evaluations.
        first: the rule whose evaluation is chosen first, and decides about those of the others.
    """
    ways = {folder: _way(folder) for folder in folders}
    parents = dict.fromkeys(folder.parent for folder in folders)
    chosen: dict[str, Evaluation] = {}
    for rule in sorted(RULES, key=lambda rule: rule != first):
        every = [one for parent in parents for one in read_evaluations(parent, rule=rule)]
        known = {ways[one.directory] for one in chosen.values()}
        if found := [one for one in every if one.directory in folders and known <= {ways[one.directory]}]:
            chosen[rule] = min(found, key=lambda one: not one.is_timed)
    return chosen


def temperatures_of(evaluation: Evaluation) -> dict[str, list[float]]:
    """Return task, or POOLED -> the temperatures at which an evaluation decoded it."""
    settings = read_manifest(evaluation.directory, "evaluate")["settings"]
    sampling = settings.get("sampling") or {}
    single = {task: (how | sampling)["temperature"] for task, how in settings["tasks"].items()}
    pooled = sorted({single[task] for task in evaluation.in_domain})
    return {POOLED: pooled} | {task: [value] for task, value in single.items()}


def read_facts(manifest: Manifest, measured: Sequence[GammaReport]) -> Facts:
    """Return the facts that the manifest of an export has (see `Facts.record`), and newly measured ones."""
    known = manifest.get("facts", {})
    by_rule: dict[str, list[ResultRow]] = {}
    for row in known.get("results", []):
        fields = {name: value for name, value in row.items() if name != "rule"}
        by_rule.setdefault(row.get("rule", RATIO), []).append(ResultRow(**with_estimates(fields)))
    reports = [
        GammaReport(
            one["engine"],
            [GammaRow(**with_estimates(row)) for row in one["rows"]],
            one.get("rule", RATIO),
            one.get("precision", ""),
        )
        for one in known.get("gamma", [])
    ]
    found, temperatures = newest([*reports, *measured]), known.get("temperatures", {})
    training, ratio = describe_training(manifest), known.get("size_ratio")
    return Facts(manifest, training, by_rule, ratio, found, known.get("loss"), temperatures)


def _directories(config: dict[str, Any], stage: str, drafter: str) -> list[Path]:
    """Return the directories of a drafter's finished evaluations, or of its gamma reports, in its root."""
    paths = [path.parent for path in sorted(Path(config["root"]).glob(f"{stage}*/*/{MANIFEST}"))]
    fingerprint = model_fingerprint(drafter)
    return [path for path in paths if read_manifest(path, stage)["inputs"]["drafter"] == fingerprint]


def _named(rule: str) -> dict[str, str]:
    """Return the field that names an acceptance rule, which a record has only if it is not the paper's."""
    return {} if rule == RATIO else {"rule": rule}


def _way(folder: Path) -> str:
    """Return how an evaluation decoded its prompts, apart from the draft lengths and the rules."""
    manifest = read_manifest(folder, "evaluate")
    settings = manifest["settings"]
    which = {name: settings.get(name) for name in ("tasks", "sampling", "prompts_per_task", "seed", "target_dtype")}
    return digest({**which, "data": manifest["inputs"].get("data")})
