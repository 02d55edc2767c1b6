"""Exact resumption of a training run that may be killed at any moment.

After each validation, the complete state is written to last.ckpt: model, optimizer, schedule, step, and the curve so
far. The samples and the random numbers of a step depend on its number alone (see `datamodules.Order`), so a resumed run
has the losses of an uninterrupted one, to the last bit on a CPU. Ctrl-C or SIGTERM ends the run after the current step
or validation. The steps since the last validation are then repeated when the run is resumed.
"""

import csv
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from drafter import interruptions
from drafter.artifacts.storage import whole_file


class AtomicCheckpoints(TorchCheckpointIO):
    """Write Lightning's checkpoints to a temporary name in the same directory, then rename them.

    Lightning itself writes to the system's temporary directory first. The move from there to another file system can
    be interrupted and leave a part of the file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)


class Resuming(lightning.Callback):
    """Write the checkpoint after each validation, seed each step, and keep the curve when a run is resumed.

    Within `interruptions.defer_signals`, this callback ends the run after a signal.

    Args:
        path: the checkpoint's path.
        curve: the logger that writes the curve. Lightning's logger starts a new file in each process.
        seed: the seed of the random numbers of all steps.
    """

    def __init__(self, path: Path, curve: CSVLogger, seed: int):
        self.path, self.curve, self.seed = path, curve, seed
        self._before: list[dict[str, str]] = []
        self._saved = 0  # the step at which the last checkpoint was written

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        interruptions.restore_handlers()
        self._saved = trainer.global_step
        if self._before and trainer.is_global_zero:
            for row in self._before:
                metrics = {name: _number(value) for name, value in row.items() if value and name != "step"}
                self.curve.experiment.log_metrics(metrics, int(row["step"]))
            self.curve.save()

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._end_if_asked(trainer)
        torch.manual_seed(hash((self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)) % 2**63)

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        interruptions.restore_handlers()

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if (
            trainer.state.fn == "fit" and trainer.global_step < trainer.max_steps
        ):  # after the last step nothing remains to resume
            self.curve.save()
            trainer.save_checkpoint(self.path)
            self._saved = trainer.global_step

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._end_if_asked(trainer)

    def state_dict(self) -> dict[str, Any]:
        file = Path(self.curve.log_dir) / "metrics.csv"
        if rank_zero_only.rank > 0 or not file.exists():  # rank 0 writes the curve and the checkpoint
            return {"curve": []}
        with file.open(newline="", encoding="utf-8") as rows:
            return {"curve": list(csv.DictReader(rows))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = state["curve"]

    def _end_if_asked(self, trainer: lightning.Trainer) -> None:
        """Raise the exception of a signal that has been received, with the number of steps that are lost."""
        done, lost = trainer.global_step, trainer.global_step - self._saved
        again = f"; the last {lost} will be repeated, from the last validation on" if lost else ""
        interruptions.raise_deferred(f"ended after {done} of {trainer.max_steps} steps{again}")


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)
