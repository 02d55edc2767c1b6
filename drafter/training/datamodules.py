"""Batches for the two training stages: packed text (pretraining), and responses of the target (distillation).

The samples of a step are a function of the seed and of the step's number alone. They do not depend on the number of
ranks or loader processes, and there is no state that a resumed run would need. Each epoch is a new permutation of all
samples, divided into batches whose sizes differ by one at most, so that every sample occurs once per epoch and every
rank has a part of every batch. Samples of similar length share a batch.
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

CHECKED = 10**9  # bytes of packed text up to which all ids are checked at the start; in larger files, when read
POOL = 32  # batches whose samples are sorted by length together: little padding, and still a random order


class Samples(Protocol):
    """Random access to samples, several at once, and their lengths in tokens."""

    @property
    def lengths(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> list[Sequence]: ...


class InMemory:
    """Samples that are stored in a list."""

    def __init__(self, samples: list[Sequence]):
        self.samples = samples

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each sample."""
        return np.array([len(sample.ids_T) for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> list[Sequence]:
        return [self.samples[index] for index in indices]


class PackedText:
    """A file of packed tokens (see `corpus.pack`), divided into sequences of `length` tokens. The rest is left out.

    Raises:
        ValueError: the file is shorter than one sequence, or has ids that are not below `vocabulary`. The ids of a file
            below one gigabyte are checked here, those of a larger file when they are read.
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
        """Return the tokens of each sample, which are equal."""
        return np.full(len(self), self.length)

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitems__(self, indices: list[int]) -> list[Sequence]:
        parts = [np.asarray(self.tokens[index * self.length : (index + 1) * self.length]) for index in indices]
        for ids in parts:
            check_tokens(ids, self.vocabulary, self.path)
        return [Sequence(ids, num_context=1, is_text=True) for ids in parts]


class Responses:
    """The responses of one split, with the cached target distributions if there are any.

    Args:
        rows: the rows of a distillation set, or of a cache made from one.
        split: "train" or "validation".
        share: the fraction of responses to use. The selection is random, and the same for all seeds.
        kinds: use the responses to instructions of these kinds alone. None means all kinds.
        vocabulary: all ids have to be below it, which is checked when a row is read. None means no check.

    Raises:
        ValueError: no responses are left.
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
        selected = np.flatnonzero(rows.splits == split)
        if len(selected) == 0:
            raise ValueError(f"there are no responses of the split '{split}': generate more (respond.num_responses)")
        if kinds is not None:
            existing = np.unique(rows.kinds[selected])
            selected = selected[np.isin(rows.kinds[selected], list(kinds))]
            if len(selected) == 0:
                raise ValueError(f"finetune.kinds is {list(kinds)}, but the responses have {existing.tolist()}")
        count = round(share * len(selected))
        if not 0 < count <= len(selected):
            raise ValueError(
                f"finetune.responses_share is {share}, which selects {count} of {len(selected)} responses: it must be "
                f"at most 1, and select at least one"
            )
        self.indices = np.sort(np.random.default_rng(0).permutation(selected)[:count])

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each prompt with its response."""
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
    """Responses and packed text, with text as the fraction `text_share` of all samples (a tenth in the paper)."""

    def __init__(self, responses: Samples, text: Samples, text_share: float, seed: int):
        self.responses, self.text = responses, text
        order = np.random.default_rng(seed).permutation(len(text))
        # np.resize repeats the text if there is too little.
        self.selected = np.resize(order, text_samples(len(responses), text_share))

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of all responses, then of the selected text."""
        return np.concatenate([self.responses.lengths, self.text.lengths[self.selected]])

    def __len__(self) -> int:
        return len(self.responses) + len(self.selected)

    def __getitems__(self, indices: list[int]) -> list[Sequence]:
        count = len(self.responses)
        responses = [index for index in indices if index < count]
        text = [int(self.selected[index - count]) for index in indices if index >= count]
        found = self.responses.__getitems__(responses) if responses else []
        return found + (self.text.__getitems__(text) if text else [])


def text_samples(responses: int, text_share: float) -> int:
    """Return the number of text samples that, added to the responses, are the fraction `text_share` of all samples.

    Raises:
        ValueError: the share is not in [0, 1).
    """
    if not 0 <= text_share < 1:
        raise ValueError(f"finetune.text_share is {text_share}, must be at least 0 and below 1")
    return round(responses * text_share / (1 - text_share))


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
