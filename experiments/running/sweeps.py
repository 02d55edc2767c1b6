"""A Hydra callback that names the cells of a sweep, makes cluster tasks ranks, and reports failed cells."""

import atexit
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from drafter.ranks import as_under_torchrun
from experiments.running.composing import swept_keys


class Failures(Callback):
    """Writes a note for each failed job, whichever process or machine it ran on, and prints all at the end."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Tell each cell which keys are swept, and delete the notes of the previous sweep."""
        # Unresolved: an override may contain an interpolation that can be resolved only in a job.
        given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        sweeper: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        if not any(override.startswith("swept=") for override in given):
            with read_write(config):
                config.hydra.overrides.task.append(f"swept=[{','.join(swept_keys([*params, *given]))}]")
        if int(os.environ.get("RANK", 0)) == 0:
            shutil.rmtree(_folder(config), ignore_errors=True)
            # Hydra raises the first failed job's error before it would call on_multirun_end.
            atexit.register(_print_failures, _folder(config))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Make each task of a cluster job (conf/cluster) a rank."""
        as_under_torchrun()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Note the overrides and the error of a failed job; delete the note of one that succeeded after a requeue."""
        if not str(config.hydra.mode).endswith("MULTIRUN"):
            return
        folder = _folder(config)
        if job_return.status == JobStatus.COMPLETED:
            (folder / str(config.hydra.job.num)).unlink(missing_ok=True)
        if job_return.status == JobStatus.FAILED:
            folder.mkdir(parents=True, exist_ok=True)
            cell = " ".join(job_return.overrides or [])
            try:
                _ = job_return.return_value
            except Exception as error:  # every kind of error is reported
                (folder / str(config.hydra.job.num)).write_text(
                    f"{cell}: {type(error).__name__}: {error}\n", encoding="utf-8"
                )


def _folder(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir) / "failed"


def _print_failures(folder: Path) -> None:
    failed = sorted(folder.glob("*"), key=lambda path: int(path.name))
    if failed:
        print(f"{len(failed)} cells of the sweep failed; all others are finished:", file=sys.stderr)
        for path in failed:
            print(f"  {path.read_text(encoding='utf-8').strip()}", file=sys.stderr)
