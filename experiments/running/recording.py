"""Weights & Biases: online where one is logged in, else offline, and never a reason to fail.

A stage that is interrupted and goes on is one run there: the run's id, and up to which step each value has been logged,
are in a file among the stage's logs. Offline each start has a directory of its own, all of the one id, which
`wandb sync` uploads in order as one run.
"""

import contextlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from drafter.artifacts.manifest import write_json
from experiments.reporting.tabular import Table

log = logging.getLogger(__name__)


class OneRun(WandbLogger):
    """Logs each value of a step once, to the run that the file names, however often the stage was interrupted.

    Args:
        file: where the run's id is, once something has been logged.
        settings: arguments of wandb.init.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self._file, self._run = file, kept.get("run") or secrets.token_hex(4)
        self._logged: dict[str, int] = kept.get("logged", {})  # the last step of each value
        settings = dict(settings)
        super().__init__(save_dir=settings.pop("dir"), id=self._run, resume="allow", **settings)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log what has not been logged of this step; steps that are done again after an interruption have been."""
        if step is not None:
            metrics = {name: value for name, value in metrics.items() if step > self._logged.get(name, -1)}
            self._logged |= dict.fromkeys(metrics, step)
        if metrics:
            super().log_metrics(metrics, step)
            write_json(self._file, {"run": self._run, "logged": self._logged})


@contextlib.contextmanager
def ended_run() -> Iterator[None]:
    """End the run that was begun within, as a failed one where an error or an interruption ends it."""
    status = 1
    try:
        yield
        status = 0
    finally:
        if wandb.run is not None:
            wandb.finish(exit_code=status)


def run_settings(cfg: DictConfig, name: str, job_type: str) -> dict[str, Any]:
    """Arguments of wandb.init: the seeds of one loss and variant share a group, so as to be one line with a band."""
    line = re.sub(r"-seed\d+", "", name)
    folder = Path(cfg.root).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "name": name,
        "dir": str(folder),
        "project": cfg.logger.project,
        "group": cfg.logger.group or line,
        "job_type": job_type,
        "tags": [cfg.scale.name, line],
        "mode": os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline"),
        "settings": wandb.Settings(console="off", silent=True),
        "config": {"drafter": line, "seed": cfg.seed, "scale": cfg.scale.name, "config": OmegaConf.to_container(cfg)},
    }


def record_tables(cfg: DictConfig, tables: list[Table], folder: Path) -> None:
    """A run of its own with each table, and all that the stage wrote as an artifact."""
    logged = {f"tables/{table.name}": wandb.Table(columns=table.columns, data=table.rows) for table in tables}
    record(cfg, "tables", f"results-{cfg.scale.name}", folder, logged)


def record(cfg: DictConfig, kind: str, name: str, path: Path, logged: dict[str, Any] | None = None) -> None:
    """A run of its own with what is logged, and a file or a directory as an artifact."""
    try:
        with wandb.init(**run_settings(cfg, name, kind)) as run:
            run.log(logged or {})
            artifact = wandb.Artifact(name, type=kind)
            (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
            run.log_artifact(artifact)
    except Exception as problem:  # any failure of a third party's logging is worth one line, not the run
        log.warning("Weights & Biases has no record of %s: %s", path, problem)
