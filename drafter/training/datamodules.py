"""Batches of samples for the two training stages.

The samples of a step are a function of the seed and of the step's number alone. They do not depend on the number of
ranks or loader processes, and there is no state that a resumed run would need. Each epoch is a new permutation of all
samples, divided into batches whose sizes differ by one at most, so that every sample occurs once per epoch and every
rank has a part of every batch. Samples of similar length share a batch.
"""

import math
from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from drafter.data.batches import collate
from drafter.training.samples import Samples

POOL = 32  # batches whose samples are sorted by length together: little padding, and still a random order


class Order:
    """Iterate over one rank's part of each training batch, as lists of sample indices.

    The iteration goes from the batch with the number `start` to the one before `end`; both may be set.

    Args:
        lengths: tokens of each sample.
        batch_size: samples per batch, of all ranks together.
        seed: the seed of the permutations.
        rank, world_size: which part of each batch to yield, and the number of parts.

    Raises:
        ValueError: a batch has fewer samples than there are ranks.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.lengths, self.seed, self.rank, self.world_size = lengths, seed, rank, world_size
        self.batches_per_epoch = max(1, round(len(lengths) / batch_size))
        if len(lengths) // self.batches_per_epoch < world_size:
            raise ValueError(
                f"with batch_size {batch_size} and {len(lengths)} samples, a batch has less than one for each of "
                f"{world_size} ranks: raise batch_size (it counts all ranks together), or use fewer ranks"
            )
        self.start, self.end = 0, self.batches_per_epoch

    def __len__(self) -> int:
        return self.end

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.start, self.end):
            epoch, index = divmod(number, self.batches_per_epoch)
            if number == self.start or index == 0:
                batches = self.epoch(epoch)
            yield batches[index][self.rank :: self.world_size].tolist()

    def epoch(self, number: int) -> list[np.ndarray]:
        """Return all batches of an epoch, each with the samples of all ranks."""
        random = np.random.default_rng([self.seed, number])
        batches = np.array_split(random.permutation(len(self.lengths)), self.batches_per_epoch)
        ordered: list[np.ndarray] = []
        for first in range(0, len(batches), POOL):
            pool = batches[first : first + POOL]
            members = np.concatenate(pool)
            members = members[np.argsort(self.lengths[members], kind="stable")]
            ordered += np.split(members, np.cumsum([len(batch) for batch in pool])[:-1])
        return [ordered[i] for i in random.permutation(len(ordered))]


class _Loader(DataLoader):
    """A loader without state: `Order` resumes from the step alone. Lightning warns about one without these methods."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SequenceData(lightning.LightningDataModule):
    """Training batches in random order for any number of epochs, and validation batches in order of length.

    Args:
        train, validation: the samples.
        batch_size: samples per batch, of all ranks together.
        seed: the seed of the training order.
        num_workers: loader processes per rank; 0 loads in the training process.
    """

    def __init__(self, train: Samples, validation: Samples, batch_size: int, seed: int, num_workers: int = 0):
        super().__init__()
        self.train, self.validation, self.batch_size, self.seed = train, validation, batch_size, seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """Return a loader of the remaining batches of the run, from the trainer's step on, as one epoch."""
        rank, world_size = self._ranks()
        order = Order(self.train.lengths, self.batch_size, self.seed, rank, world_size)
        if self.trainer is not None:
            order.start = self.trainer.global_step * self.trainer.accumulate_grad_batches
            order.end = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return self._loader(self.train, order)

    def val_dataloader(self) -> DataLoader:
        """Return a loader of this rank's validation batches.

        Each sample is on one rank, and all ranks have equally many batches, because a sharded model needs every rank in
        each forward pass.

        Raises:
            ValueError: there are fewer samples than ranks.
        """
        rank, world_size = self._ranks()
        count = len(self.validation)
        if count < world_size:
            raise ValueError(f"{count} validation samples are too few for {world_size} ranks: use fewer ranks")
        rounds = math.ceil(count / self.batch_size)
        batches = world_size * min(rounds, count // world_size)
        ordered = np.argsort(self.validation.lengths, kind="stable")
        parts = np.array_split(ordered, batches)[rank::world_size]
        return self._loader(self.validation, [part.tolist() for part in parts])

    def _ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, samples: Samples, batches: Any) -> DataLoader:
        return _Loader(
            samples,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
