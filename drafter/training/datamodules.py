"""Batches for the two training stages: packed text (pretraining), and responses of the target (distillation).

Which samples a step sees is a function of the seed and the step's number, and of nothing else: not of the number of
ranks or loader processes, and there is no state to lose. Each epoch is a new permutation of all samples, cut into
batches whose sizes differ by one at the most, so that every sample is seen once an epoch, and every rank has a part of
every batch. Samples of like length share a batch.
"""

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from drafter.artifacts.rows import Rows
from drafter.data.batches import Sequence, check_tokens, collate, response_sequence
from drafter.data.target_cache import restore

CHECKED = 10**9  # bytes of packed text whose ids are all checked at the start; of more, those that are read
POOL = 32  # batches whose samples are sorted by length together: neighbours for speed, and still at random


class Samples(Protocol):
    """Random access to samples, several at once, and their lengths in tokens."""

    @property
    def lengths(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> list[Sequence]: ...


class InMemory:
    """Samples of a list."""

    def __init__(self, samples: list[Sequence]):
        self.samples = samples

    @property
    def lengths(self) -> np.ndarray:
        """Of each."""
        return np.array([len(sample.ids_T) for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> list[Sequence]:
        return [self.samples[index] for index in indices]


class PackedText:
    """A file of packed tokens (see corpus.pack) cut into sequences of `length` tokens; the rest is left out.

    Raises:
        ValueError: there is no whole sequence; or the file has ids that are not below `vocabulary`. Those of a file
            below a gigabyte are looked at here, those of a larger one when they are read.
    """

    def __init__(self, path: str | Path, length: int, vocabulary: int | None = None):
        self.tokens = np.load(path, mmap_mode="r")
        self.path, self.length, self.vocabulary = path, length, vocabulary
        if len(self) == 0:
            raise ValueError(f"{path} has {len(self.tokens)} tokens, less than one sequence of {length}")
        if self.tokens.nbytes < CHECKED:
            check_tokens(self.tokens, vocabulary, path)

    @property
    def lengths(self) -> np.ndarray:
        """All alike."""
        return np.full(len(self), self.length)

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitems__(self, indices: list[int]) -> list[Sequence]:
        parts = [np.asarray(self.tokens[index * self.length : (index + 1) * self.length]) for index in indices]
        for ids in parts:
            check_tokens(ids, self.vocabulary, self.path)
        return [Sequence(ids, num_context=1, is_text=True) for ids in parts]


class Responses:
    """The responses of one split ("train" or "validation"), with what is cached of the target, if anything.

    Args:
        rows: of a distillation set or its cache.
        split: which.
        share: how much of them is taken, at random and for all seeds alike.
        kinds: those to instructions of these kinds alone; None: all.
        vocabulary: the rows' ids have to be below it, which is looked at when they are read; None: any.

    Raises:
        ValueError: there is none.
    """

    def __init__(
        self,
        rows: Rows,
        split: str,
        share: float = 1.0,
        kinds: Collection[str] | None = None,
        vocabulary: int | None = None,
    ):
        self.rows, self.vocabulary = rows, vocabulary
        chosen = np.flatnonzero(rows.splits == split)
        if len(chosen) == 0:
            raise ValueError(f"there are no responses of the split '{split}': ask for more (respond.num_responses)")
        if kinds is not None:
            known = np.unique(rows.kinds[chosen])
            chosen = chosen[np.isin(rows.kinds[chosen], list(kinds))]
            if len(chosen) == 0:
                raise ValueError(f"finetune.kinds is {list(kinds)}, but the responses are of {known.tolist()}")
        count = round(share * len(chosen))
        if not 0 < count <= len(chosen):
            raise ValueError(f"finetune.responses_share is {share}: it takes {count} of {len(chosen)} responses")
        self.indices = np.sort(np.random.default_rng(0).permutation(chosen)[:count])

    @property
    def lengths(self) -> np.ndarray:
        """Of prompt and response."""
        return self.rows.lengths[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: list[int]) -> list[Sequence]:
        read = self.rows.read(self.indices[indices].tolist())
        sequences = [response_sequence(row, restore(row, self.rows.schema)) for row in read]
        for row, sequence in zip(read, sequences, strict=True):
            check_tokens(sequence.ids_T, self.vocabulary, f"the row '{row['id']}' of {self.rows.folder}")
        return sequences


class Mixture:
    """Responses and packed text, the text being `text_share` of all samples (paper: one in ten)."""

    def __init__(self, responses: Samples, text: Samples, text_share: float, seed: int):
        self.responses, self.text = responses, text
        order = np.random.default_rng(seed).permutation(len(text))
        # np.resize repeats the text where there is too little of it.
        self.chosen = np.resize(order, text_samples(len(responses), text_share))

    @property
    def lengths(self) -> np.ndarray:
        """Of all responses, then of the chosen text."""
        return np.concatenate([self.responses.lengths, self.text.lengths[self.chosen]])

    def __len__(self) -> int:
        return len(self.responses) + len(self.chosen)

    def __getitems__(self, indices: list[int]) -> list[Sequence]:
        count = len(self.responses)
        responses = [index for index in indices if index < count]
        text = [int(self.chosen[index - count]) for index in indices if index >= count]
        found = self.responses.__getitems__(responses) if responses else []
        return found + (self.text.__getitems__(text) if text else [])


def text_samples(responses: int, text_share: float) -> int:
    """How many samples of text beside so many responses are `text_share` of all.

    Raises:
        ValueError: the share is not in [0, 1).
    """
    if not 0 <= text_share < 1:
        raise ValueError(f"finetune.text_share is {text_share}, must be at least 0 and below 1")
    return round(responses * text_share / (1 - text_share))


class Order:
    """A rank's part of each training batch: lists of indices, from the batch `start` to the batch `end`.

    Args:
        lengths: tokens of each sample.
        batch_size: samples a batch, of all ranks together.
        seed, rank, world_size: see the head of this file.

    Raises:
        ValueError: there are fewer samples in a batch than ranks.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.lengths, self.seed, self.rank, self.world_size = lengths, seed, rank, world_size
        self.batches_per_epoch = max(1, round(len(lengths) / batch_size))
        if len(lengths) // self.batches_per_epoch < world_size:
            raise ValueError(
                f"batches of {batch_size} of {len(lengths)} samples have less than one for each of {world_size} ranks: "
                f"raise batch_size (it counts all ranks together), or use fewer ranks"
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
        """The batches of an epoch, of all ranks."""
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
    """A loader that needs no state of its own to resume, and tells Lightning so."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SequenceData(lightning.LightningDataModule):
    """Training batches without end, and validation batches in order of length.

    Args:
        train, validation: samples.
        batch_size: samples a batch, of all ranks together.
        seed: of the order of training.
        num_workers: loader processes of each rank; 0 loads in the training process.
    """

    def __init__(self, train: Samples, validation: Samples, batch_size: int, seed: int, num_workers: int = 0):
        super().__init__()
        self.train, self.validation, self.batch_size, self.seed = train, validation, batch_size, seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """All batches of the run as one long epoch, from the trainer's step on."""
        rank, world_size = self._ranks()
        order = Order(self.train.lengths, self.batch_size, self.seed, rank, world_size)
        if self.trainer is not None:
            order.start = self.trainer.global_step * self.trainer.accumulate_grad_batches
            order.end = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return self._loader(self.train, order)

    def val_dataloader(self) -> DataLoader:
        """Each sample on one rank, and as many batches on each rank: a model that is split over them needs all of them.

        Raises:
            ValueError: there are fewer samples than ranks.
        """
        rank, world_size = self._ranks()
        count = len(self.validation)
        if count < world_size:
            raise ValueError(f"{count} validation samples are too few for {world_size} ranks: use fewer")
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
