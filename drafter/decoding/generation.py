"""A sequence while it is being generated, and the result."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from drafter.decoding.acceptance import Block
from drafter.decoding.clock import Seconds


class Decoded(NamedTuple):
    """The generated tokens, the blocks that they came in, and the time that it took.

    `drafted_by_model` is the number of drafted tokens that a draft model proposed: its calls.
    """

    tokens: list[int]
    blocks: list[Block]
    seconds: Seconds
    drafted_by_model: int = 0


@dataclass
class Generation:
    """A sequence that is being generated.

    Attributes:
        tokens: the prompt and the tokens so far.
        prompt_length: the number of tokens of the prompt.
        max_length: the number of tokens at which it ends, the prompt included.
        generator: the source of its random numbers; None for PyTorch's default.
        blocks: the blocks so far.
        target_cached: the number of tokens, from the first on, that the target has cached.
        drafter_cached: the number of tokens, from the first on, that the drafter has cached; while a block is verified,
            with its drafts.
        drafted_by_model: the number of drafted tokens so far that a draft model proposed.
        notes: what drafters without a model remember of the sequence, each under its own key.
    """

    tokens: list[int]
    prompt_length: int
    max_length: int
    generator: torch.Generator | None = None
    blocks: list[Block] = field(default_factory=list)
    target_cached: int = 0
    drafter_cached: int = 0
    drafted_by_model: int = 0
    notes: dict[Any, Any] = field(default_factory=dict)

    @property
    def remaining(self) -> int:
        """The number of tokens that may still be generated."""
        return self.max_length - len(self.tokens)

    def append(self, block: Block) -> None:
        """Append the tokens of a block, and update the cached lengths."""
        self.blocks.append(block)
        self.tokens += block.emitted
        self.target_cached = len(self.tokens) - 1
        self.drafter_cached = min(self.drafter_cached, len(self.tokens) - 1)

    def is_finished(self, stop_ids: Sequence[int]) -> bool:
        """Return whether the last block ended the sequence."""
        return self.remaining <= 0 or self.blocks[-1].emitted[-1] in stop_ids


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the position of the first difference, which may be the end of the shorter sequence; None if equal.

    >>> first_difference([1, 2, 3], [1, 5, 3]), first_difference([1], [1, 2]), first_difference([1], [1])
    (1, 1, None)
    """
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((position for position, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
