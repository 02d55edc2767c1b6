"""Samples of the two training stages: packed text (pretraining), and responses of the target (distillation)."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from drafter.artifacts.rows import Rows
from drafter.data.batches import Sequence, check_tokens, cut, response_sequence
from drafter.data.target_cache import restore

CHECKED = 10**9  # bytes of packed text up to which all ids are checked at the start; in larger files, when read


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


class Beyond(NamedTuple):
    """What lies beyond a drafter's context.

    Attributes:
        cut: the number of sequences that are cut at the context.
        left_out: the number of sequences whose prompts alone fill the context.
        sequences: the number of all sequences.
        share: the largest share of the response tokens that may lie there. Given tokens of later turns count as
            response tokens; without later turns it is the exact share.
    """

    cut: int
    left_out: int
    sequences: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.cut} of {self.sequences} responses are cut there, {self.left_out} are left out because their "
            f"prompts fill it, and up to {self.share:.1%} of the response tokens are not trained on"
        )


class Responses:
    """The responses of one split, with the cached target distributions if there are any.

    Sequences that are longer than `context` are cut there, and those whose prompts alone are as long are left out:
    `beyond` has their numbers.

    Args:
        rows: the rows of a distillation set, or of a cache made from one.
        split: "train" or "validation".
        share: the fraction of responses to use. The selection is random, and the same for all seeds.
        kinds: use the responses to instructions of these kinds alone. None means all kinds.
        vocabulary: all ids have to be below it, which is checked when a row is read. None means no check.
        context: the most tokens of a sequence. None means no limit.

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
        context: int | None = None,
    ):
        self.rows, self.vocabulary = rows, vocabulary
        self.context = int(rows.lengths.max()) if context is None else context
        selected = np.flatnonzero(rows.splits == split)
        if len(selected) == 0:
            raise ValueError(f"there are no responses of the split '{split}': generate more (respond.num_responses)")
        if kinds is not None:
            existing = np.unique(rows.kinds[selected])
            selected = selected[np.isin(rows.kinds[selected], list(kinds))]
            if len(selected) == 0:
                raise ValueError(f"finetune.kinds is {list(kinds)}, but the responses have {existing.tolist()}")
        selected = self._within_context(selected)
        count = round(share * len(selected))
        if split == "validation" and share > 0:
            count = max(1, count)  # a small set has something to measure, too
        if not 0 < count <= len(selected):
            name = {"train": "responses_share", "validation": "validation_share"}[split]
            raise ValueError(
                f"finetune.{name} is {share}, which selects {count} of {len(selected)} responses: it must be "
                f"at most 1, and select at least one"
            )
        self.indices = np.sort(np.random.default_rng(0).permutation(selected)[:count])

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each prompt with its response, up to the context."""
        return np.minimum(self.rows.lengths[self.indices], self.context)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: list[int]) -> list[Sequence]:
        read = self.rows.read(self.indices[indices].tolist())
        cached = self.rows.stage == "cache"  # responses may have states too, which belong to the cache made of them
        sequences = [response_sequence(row, restore(row, self.rows.schema) if cached else None) for row in read]
        for row, sequence in zip(read, sequences, strict=True):
            check_tokens(sequence.ids_T, self.vocabulary, f"the row '{row['id']}' of {self.rows.folder}")
        return [cut(sequence, self.context) for sequence in sequences]

    def _within_context(self, selected: np.ndarray) -> np.ndarray:
        """Return the rows whose responses begin within the context, and count what lies beyond it."""
        lengths, in_responses = self.rows.lengths[selected], self.rows.response_lengths[selected]
        beyond = np.minimum(np.maximum(lengths - self.context, 0), in_responses)
        left_out = (beyond > 0) & (beyond == in_responses)
        cut_there = (beyond > 0) & ~left_out
        self.beyond = Beyond(
            int(cut_there.sum()), int(left_out.sum()), len(selected), beyond.sum() / in_responses.sum()
        )
        if left_out.all():
            raise ValueError(f"the prompts of all {len(selected)} responses fill the context of {self.context} tokens")
        return selected[~left_out]


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
