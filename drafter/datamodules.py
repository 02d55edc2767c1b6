"""Batches for the two training stages: packed text (pretraining), and responses of the target (distillation)."""

from pathlib import Path
from typing import Any, Protocol

import lightning
import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from drafter.batches import Sequence, collate, response_sequence

Samples = Any  # a dataset or a list of Sequence: whatever has a length and items


class PackedText(Dataset[Sequence]):
    """A file of packed tokens (see corpus.pack) cut into sequences of `length` tokens; the rest is left out."""

    def __init__(self, path: str | Path, length: int):
        self.tokens = np.load(path, mmap_mode="r")
        self.length = length
        if len(self) == 0:
            raise ValueError(f"{path} has {len(self.tokens)} tokens, less than one sequence of {length}")

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> Sequence:
        ids = self.tokens[index * self.length : (index + 1) * self.length]
        return Sequence(np.asarray(ids), num_context=1, is_text=True)


class States(Protocol):
    """Random access to the cached states of a row."""

    def __getitem__(self, index: int) -> torch.Tensor: ...


class Responses(Dataset[Sequence]):
    """The target's responses of one split, with its cached states where there are any.

    Args:
        rows: every response, in the order on disk (see responses.SCHEMA).
        split: "train" or "validation".
        states: random access to the cached states by row, or None for a live target.
    """

    def __init__(self, rows: list[dict[str, Any]], split: str, states: States | None):
        self.rows, self.states = rows, states
        self.indices = [index for index, row in enumerate(rows) if row["split"] == split]
        if not self.indices:
            raise ValueError(f"there are no responses of the split '{split}': ask for more (respond.num_responses)")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sequence:
        index = self.indices[position]
        return response_sequence(self.rows[index], None if self.states is None else self.states[index])


def mixture(responses: Responses, text: PackedText, text_share: float, seed: int) -> Samples:
    """Responses and packed text, the text being `text_share` of all samples (paper: one in ten)."""
    order = np.random.default_rng(seed).permutation(len(text))
    # np.resize repeats the text where there is too little of it.
    chosen = np.resize(order, text_samples(len(responses), text_share))
    return ConcatDataset([responses, Subset(text, chosen.tolist())])


def text_samples(responses: int, text_share: float) -> int:
    """How many samples of text beside so many responses are `text_share` of all.

    Raises:
        ValueError: the share is not in [0, 1).
    """
    if not 0 <= text_share < 1:
        raise ValueError(f"finetune.text_share is {text_share}, must be at least 0 and below 1")
    return round(responses * text_share / (1 - text_share))


class SequenceData(lightning.LightningDataModule):
    """Two datasets of `Sequence`: training, reshuffled each epoch from the seed, and validation."""

    def __init__(self, train: Samples, validation: Samples, batch_size: int, seed: int):
        super().__init__()
        self.train, self.validation, self.batch_size, self.seed = train, validation, batch_size, seed

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=collate, generator=generator
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, self.batch_size, collate_fn=collate)
