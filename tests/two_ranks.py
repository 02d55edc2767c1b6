"""Train a drafter on fixed batches and save it, in one process or as one of two ranks that share each batch.

python -m tests.two_ranks OUT LOSS      or      torchrun --nproc-per-node=2 -m tests.two_ranks OUT LOSS
"""

import os
import sys

import lightning
import numpy as np
import torch

from drafter.data.batches import Sequence
from drafter.losses import divergences as losses
from drafter.ranks import leave_at_exit
from drafter.training.datamodules import SequenceData
from drafter.training.modules import Distillation
from drafter.training.samples import InMemory
from tests.conftest import answered, small_model


def main(out, loss):
    torch.set_num_threads(1)
    leave_at_exit()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    # Responses of many lengths, and a few texts, so that a rank may have none in a batch.
    samples = [
        Sequence(np.arange(n, n + 9), 1, True) if n % 6 == 0 else answered([n], list(range(1, 2 + n % 5)), n % 2)
        for n in range(24)
    ]
    module = Distillation(
        small_model(1, 32, sharpness=60.0),
        small_model(2).requires_grad_(True).train(),
        getattr(losses, loss),
        0.1,
        1e-2,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_steps=8,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    # 23 samples in batches of 6: the ranks' parts differ in size, and one rank alone has the last validation batch.
    data = SequenceData(InMemory(samples[1:]), InMemory(samples[1:]), 6, seed=0)
    trainer.fit(module, data)
    if trainer.is_global_zero:
        yardsticks = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        torch.save({"drafter": module.drafter.state_dict(), "yardsticks": yardsticks}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
