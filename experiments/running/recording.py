"""Record runs, tables and files in Weights & Biases: online if the user is logged in, else offline.

A failure of Weights & Biases is logged, and never ends a stage. A stage that is interrupted and resumed is one run
there: a file among the stage's logs has the run's id and the last step at which each value was logged. Offline, each
start writes a directory of its own with that id, and `wandb sync` uploads them in order as one run.
"""

import contextlib
import json
import logging
import os
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
    """A logger that continues the run named in a file, and logs each value of a step once.

    Args:
        file: has the run's id and what was logged; it is written with the first value.
        settings: the arguments of wandb.init.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self._file, self._run = file, kept.get("run") or secrets.token_hex(4)
        self._logged: dict[str, int] = kept.get("logged", {})  # value -> the last step at which it was logged
        settings = dict(settings)
        super().__init__(save_dir=settings.pop("dir"), id=self._run, resume="allow", **settings)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the values that have not been logged for this step: a resumed stage repeats some steps."""
        if step is not None:
            metrics = {name: value for name, value in metrics.items() if step > self._logged.get(name, -1)}
            self._logged |= dict.fromkeys(metrics, step)
        if metrics:
            super().log_metrics(metrics, step)
            write_json(self._file, {"run": self._run, "logged": self._logged})


@contextlib.contextmanager
def finish_run() -> Iterator[None]:
    """End the run that is started inside this context; an error or an interruption marks it as failed."""
    status = 1
    try:
        yield
        status = 0
    finally:
        if wandb.run is not None:
            wandb.finish(exit_code=status)


def run_settings(cfg: DictConfig, name: str, job_type: str, series: str) -> dict[str, Any]:
    """Return the arguments of wandb.init.

    Args:
        cfg: a stage's config.
        name: the run's name.
        job_type: the stage, or the kind of what is recorded.
        series: the group of the run; the seeds of one series are drawn as one line with a band.
    """
    folder = Path(cfg.root).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "name": name,
        "dir": str(folder),
        "project": cfg.logger.project,
        "group": cfg.logger.group or series,
        "job_type": job_type,
        "tags": [cfg.scale.name, series],
        "mode": os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline"),
        "settings": wandb.Settings(console="off", silent=True),
        "config": {"drafter": series, "seed": cfg.seed, "scale": cfg.scale.name, "config": OmegaConf.to_container(cfg)},
    }


def record_tables(cfg: DictConfig, tables: list[Table], folder: Path) -> None:
    """Record each table, and the folder with all that the stage wrote as an artifact, as a run."""
    logged = {f"tables/{table.name}": wandb.Table(columns=table.columns, data=table.rows) for table in tables}
    record(cfg, "tables", f"results-{cfg.scale.name}", folder, logged)


def record(
    cfg: DictConfig,
    kind: str,
    name: str,
    path: Path,
    logged: dict[str, Any] | None = None,
    series: str | None = None,
) -> None:
    """Record values, and a file or a directory as an artifact, as a run.

    Args:
        cfg: the config of the stage that made what is recorded.
        kind: the type of the run and of the artifact.
        name: the name of both.
        path: the file or directory.
        logged: the values.
        series: the group of the run; None means the name.
    """
    try:
        with wandb.init(**run_settings(cfg, name, kind, series or name)) as run:
            run.log(logged or {})
            artifact = wandb.Artifact(name, type=kind)
            (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
            run.log_artifact(artifact)
    except Exception as problem:  # a failure to record must not end the stage
        log.warning("Weights & Biases has no record of %s: %s", path, problem)
