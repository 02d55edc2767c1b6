"""Read the reports on which gamma is fastest: of `experiments.gamma`, and of `benchmarks.engines` in other engines."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from drafter.artifacts.manifest import read_jsonl, read_manifest
from drafter.metrics import Estimate
from experiments.reporting.gamma_page import GammaRow
from experiments.reporting.results import RATIO

LOOP, COMPILED = "this project's loop", "this project's loop, both models compiled"


class GammaReport(NamedTuple):
    """What an engine gains at each gamma: a report of `experiments.gamma`, or of `benchmarks.engines`.

    Attributes:
        engine: its name; this project's loop, with and without compiled models, counts as two.
        rows: a row for each task and gamma.
        rule: the acceptance rule by which this project's loop decoded above temperature 0.
        precision: in which precision the engine had the models, such as "8 bits, 8 bits"; "" if it is not known.
    """

    engine: str
    rows: list[GammaRow]
    rule: str = RATIO
    precision: str = ""

    def best(self) -> list[GammaRow]:
        """Return the row of the best gamma for each task: by measurement if several were decoded, else predicted."""
        best: dict[str, tuple[GammaRow, float]] = {}
        for row, value in self._compared():
            if row.task not in best or value > best[row.task][1]:
                best[row.task] = row, value
        return [row for row, _ in best.values()]

    @property
    def gamma(self) -> int:
        """Return the gamma with the highest speed-up, as a mean over the tasks."""
        by_gamma: dict[int, list[float]] = {}
        for row, value in self._compared():
            by_gamma.setdefault(row.gamma, []).append(value)
        return max(by_gamma, key=lambda gamma: sum(by_gamma[gamma]) / len(by_gamma[gamma]))

    @property
    def speedup(self) -> float:
        """Return the speed-up at the best gamma, as a mean over the tasks: measured, or else predicted."""
        rows = self._at_best()
        return sum(row.measured.value if row.measured else row.predicted for row in rows) / len(rows)

    @property
    def is_measured(self) -> bool:
        """Return whether the speed-up at the best gamma was measured, and not predicted from timed calls."""
        return all(row.measured for row in self._at_best())

    @property
    def chosen_by_measurement(self) -> bool:
        """Return whether several gammas were decoded, so that their token rates were compared."""
        return len({row.gamma for row in self.rows if row.measured}) > 1

    def _at_best(self) -> list[GammaRow]:
        gamma = self.gamma
        return [row for row in self.rows if row.gamma == gamma]

    def _compared(self) -> list[tuple[GammaRow, float]]:
        """Return the rows among which the best is chosen, each with its speed-up, measured or predicted in all."""
        if self.chosen_by_measurement:
            return [(row, row.measured.value) for row in self.rows if row.measured]
        return [(row, row.predicted) for row in self.rows]


def read_gamma(folder: Path) -> GammaReport:
    """Read the report of `experiments.gamma`: the tasks in the domain, or all if none is."""
    settings = read_manifest(folder, "gamma")["settings"]
    rows = [GammaRow(**with_estimates(row)) for row in read_jsonl(folder / "gamma.jsonl")]
    inside = [row for row in rows if settings["tasks"][row.task]["in_domain"]]
    engine, rule = COMPILED if settings["compile"] else LOOP, settings.get("acceptance_rule", RATIO)
    prompts, dtype = decoded_prompts(folder), settings.get("target_dtype")
    rows = [row._replace(prompts=len(prompts.get((row.task, row.gamma), [])) or None) for row in inside or rows]
    return GammaReport(engine, rows, rule, f"{dtype}, float32" if dtype else "")  # a drafter is loaded in float32


def decoded_prompts(folder: Path) -> dict[tuple[str, int], set[str]]:
    """Return the prompts that a report of `experiments.gamma` decoded, by task and gamma; {} of one without counts."""
    found: dict[tuple[str, int], set[str]] = {}
    for row in read_jsonl(folder / "counts.jsonl") if (folder / "counts.jsonl").exists() else []:
        found.setdefault((row["task"], row["gamma"]), set()).add(row["prompt"])
    return found


def read_engine(given: str) -> GammaReport:
    """Read a file of `benchmarks.engines`: the single tasks, or all prompts if they have no task.

    Args:
        given: the file's path; or PRECISION=PATH, where PRECISION is a text for the card, that of the target first.

    Raises:
        ValueError: it is not such a file.
    """
    precision, _, path = ("", "", given) if Path(given).exists() else given.rpartition("=")
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
                one["prompts"],
            )
            for one in found["summaries"]
        ]
        engine = str(found["arguments"]["engine"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(
            f"export.engines has {path}, must be a file that benchmarks.engines wrote: {problem}"
        ) from None
    tasks = {row.task for row in rows}
    rows = [row for row in rows if row.task != "all" or len(tasks) == 1]
    return GammaReport(engine, rows, precision=precision)


def newest(reports: Iterable[GammaReport]) -> list[GammaReport]:
    """Return the last report of each engine by each rule and in each precision."""
    return list({(report.engine, report.rule, report.precision): report for report in reports}.values())


def with_estimates(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row that was read from JSON, in which each list was an estimate."""
    return {name: Estimate(*value) if isinstance(value, list) else value for name, value in row.items()}
