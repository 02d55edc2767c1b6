"""A training run that may be killed at any moment, and goes on as if it had not been.

After each validation the whole state is written to last.ckpt: model, optimizer, schedule, step, and the curve so far.
Which samples a step sees depends on its number alone (datamodules.Order), and so do its random numbers, so that a
resumed run's losses are those of an uninterrupted one, to the last bit on a CPU. Ctrl-C or SIGTERM ends the run after
the step that it comes in, or the validation; the steps since the last validation are done again.
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
    """Lightning's checkpoints, written beside their place and renamed into it.

    Its own go by the temporary directory, from where a move to another file system can be cut in half.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)


class Resuming(lightning.Callback):
    """Writes `path` after each validation; gives each step its own random numbers; keeps the curve through a resume.

    Within `interruptions.defer_signals`, it is what ends the run after a signal.

    Args:
        path: of the checkpoint.
        curve: the logger whose file is the curve; Lightning's starts anew in each process.
        seed: of the steps' random numbers.
    """

    def __init__(self, path: Path, curve: CSVLogger, seed: int):
        self.path, self.curve, self.seed = path, curve, seed
        self._before: list[dict[str, str]] = []
        self._saved = 0  # the step of the checkpoint

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        interruptions.restore_handlers()
        self._saved = trainer.global_step
        if self._before and trainer.is_global_zero:
            for row in self._before:
                known = {name: _number(value) for name, value in row.items() if value and name != "step"}
                self.curve.experiment.log_metrics(known, int(row["step"]))
            self.curve.save()

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._end_if_asked(trainer)
        torch.manual_seed(hash((self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)) % 2**63)

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        interruptions.restore_handlers()

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.global_step < trainer.max_steps:  # else there is nothing to go on with
            self.curve.save()
            trainer.save_checkpoint(self.path)
            self._saved = trainer.global_step

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._end_if_asked(trainer)

    def state_dict(self) -> dict[str, Any]:
        file = Path(self.curve.log_dir) / "metrics.csv"
        if rank_zero_only.rank > 0 or not file.exists():  # the first rank writes the curve, and the checkpoint
            return {"curve": []}
        with file.open(newline="", encoding="utf-8") as rows:
            return {"curve": list(csv.DictReader(rows))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = state["curve"]

    def _end_if_asked(self, trainer: lightning.Trainer) -> None:
        """Raise what signal has come, with what is lost by it."""
        done, lost = trainer.global_step, trainer.global_step - self._saved
        again = f"; the last {lost} will be done again, from the last validation on" if lost else ""
        interruptions.raise_deferred(f"ended after {done} of {trainer.max_steps} steps{again}")


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)
