"""A Hydra multirun: what its cells are named by, their ranks on a cluster, and at the end which of them failed."""

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
    """Notes each failed job in a file, whichever process or machine it ran on, and names them all at the end."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Tell each cell which keys are swept, and forget the sweep before."""
        # As they are written: an override may hold an interpolation that means something in a job alone.
        given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        sweeper: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        if not any(override.startswith("swept=") for override in given):
            with read_write(config):
                config.hydra.overrides.task.append(f"swept=[{','.join(swept_keys([*params, *given]))}]")
        if int(os.environ.get("RANK", 0)) == 0:
            shutil.rmtree(_folder(config), ignore_errors=True)
            # Hydra raises the first failed job's error before it would call on_multirun_end.
            atexit.register(_tell, _folder(config))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Make a rank of each task of a job on a cluster (conf/cluster)."""
        as_under_torchrun()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Keep its overrides and its error; those of a job that was requeued and then succeeded are forgotten."""
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
            except Exception as error:  # whatever it was, it is to be told
                (folder / str(config.hydra.job.num)).write_text(
                    f"{cell}: {type(error).__name__}: {error}\n", encoding="utf-8"
                )


def _folder(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir) / "failed"


def _tell(folder: Path) -> None:
    failed = sorted(folder.glob("*"), key=lambda path: int(path.name))
    if failed:
        print(f"{len(failed)} cells of the sweep failed; all others are finished:", file=sys.stderr)
        for path in failed:
            print(f"  {path.read_text(encoding='utf-8').strip()}", file=sys.stderr)
