"""How the drafts of a block come about: the interface between the loop over blocks and what proposes tokens.

Shapes: B sequences, G drafted tokens, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch

from drafter.decoding.decoders import CachedModel, aligned_starts
from drafter.decoding.generation import Generation
from drafter.decoding.options import Adaptive, DecodingOptions
from drafter.warping import Random, Sampling, draw, warp


class Drafts(NamedTuple):
    """The drafts of a block.

    Attributes:
        tokens_BG: the drafted tokens, padded to equally many per row.
        rows: the same as lists.
        lengths: how many of each row's tokens count.
        p_BGV: the distributions that the tokens were drawn from; None if each draft counts as certain.
    """

    tokens_BG: torch.Tensor
    rows: list[list[int]]
    lengths: list[int]
    p_BGV: torch.Tensor | None

    @classmethod
    def certain(cls, rows: list[list[int]]) -> "Drafts":
        """Return drafts that count as certain, of any lengths."""
        width = max(map(len, rows), default=0)
        padded = [row + [0] * (width - len(row)) for row in rows]
        tokens_BG = torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)
        return cls(tokens_BG, padded, [len(row) for row in rows], None)


class Drafting(Protocol):
    """Drafts the blocks of several sequences, each of which has a row."""

    def draft(
        self,
        active: list[Generation],
        lengths: list[int],
        num_speculative_tokens: int | Adaptive,
        options: DecodingOptions,
    ) -> Drafts:
        """Propose at most so many tokens per sequence; none where that is 0."""

    def replace_row(self, row: int, generation: Generation) -> None:
        """Give a row to another sequence."""

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all other rows."""


class NoDrafting:
    """Drafts nothing: each block is the target's bonus token alone, which is autoregressive decoding."""

    def draft(self, active: list[Generation], *_: object) -> Drafts:
        """Return no drafts."""
        return Drafts.certain([[] for _ in active])

    def replace_row(self, row: int, generation: Generation) -> None:
        """Do nothing: there is no state."""

    def keep_rows(self, rows: list[int]) -> None:
        """Do nothing: there is no state."""


class ModelDrafting:
    """A draft model with its cache drafts one token per call.

    Args:
        model: the draft model.
    """

    def __init__(self, model: CachedModel):
        self.model, self.was_called = model, False

    def draft(
        self,
        active: list[Generation],
        lengths: list[int],
        num_speculative_tokens: int | Adaptive,
        options: DecodingOptions,
    ) -> Drafts:
        """Draft until each sequence has as many tokens as it would have alone. The rows have equally many."""
        threshold = num_speculative_tokens.threshold if isinstance(num_speculative_tokens, Adaptive) else None
        tokens: list[torch.Tensor] = []
        probabilities: list[torch.Tensor] = []
        if not max(lengths):
            return Drafts.certain([[] for _ in active])
        starts = aligned_starts(self.model, [one.tokens for one in active], [one.drafter_cached for one in active])
        ids = [one.tokens[start:] for one, start in zip(active, starts, strict=True)]
        confidence_B = torch.ones(len(active))
        is_greedy = options.sampling.temperature == 0
        while len(tokens) < max(lengths):
            logits_BV = self.model.forward(ids, starts, 1)[:, -1]
            if is_greedy or options.rule == "argmax":
                drafted_B = logits_BV.argmax(-1)
                # Greedy decoding has no distribution: the drafter's confidence is then that at temperature 1.
                p_BV = None if threshold is None else warp(logits_BV, Sampling(1.0) if is_greedy else options.sampling)
            else:
                p_BV = warp(logits_BV, options.sampling)
                if options.rule == "ratio":
                    probabilities.append(p_BV)
                drafted_B = draw(p_BV, generators_of(active, [len(tokens) < length for length in lengths]))
            ids, starts = [[token] for token in drafted_B.tolist()], [len(one.tokens) + len(tokens) for one in active]
            tokens.append(drafted_B)
            if threshold is not None and p_BV is not None:
                confidence_B = confidence_B.to(p_BV) * p_BV.gather(1, drafted_B[:, None])[:, 0]
                ended = (confidence_B < threshold).tolist()
                lengths = [
                    min(length, len(tokens)) if end else length for length, end in zip(lengths, ended, strict=True)
                ]
        self.was_called = True
        for one, length in zip(active, lengths, strict=True):
            one.drafter_cached = len(one.tokens) + max(length - 1, 0)  # the last draft has not been read
        tokens_BG = torch.stack(tokens, 1)
        return Drafts(tokens_BG, tokens_BG.tolist(), lengths, torch.stack(probabilities, 1) if probabilities else None)

    def replace_row(self, row: int, generation: Generation) -> None:
        """Give a row to another sequence, and cache all of its tokens but the last."""
        if self.was_called:  # before, there is no cache, and the first call reads all tokens
            self.model.replace_row(row, generation.tokens[:-1])
            generation.drafter_cached = len(generation.tokens) - 1

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all other rows."""
        if self.was_called:
            self.model.keep_rows(rows)


def generators_of(active: list[Generation], drawing: list[bool] | None = None) -> Random:
    """Return the sequences' generators, None for those that do not draw; or the only one, if all have the same."""
    first = active[0].generator
    if all(one.generator is first for one in active):
        return first
    return [
        one.generator if draws else None for one, draws in zip(active, drawing or [True] * len(active), strict=True)
    ]
