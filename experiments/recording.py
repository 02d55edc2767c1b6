"""Weights & Biases: online where one is logged in, else offline, and never a reason to fail."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import wandb
from omegaconf import DictConfig, OmegaConf

from experiments.tabular import Table

log = logging.getLogger(__name__)


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
