"""How the drafts of a block come about: the interface between the loop over blocks and what proposes tokens.

Shapes: B sequences, G drafted tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from drafter.decoding.decoders import (
    CachedModel,
    Decodable,
    Padded,
    aligned_starts,
    compiled_model,
    compiled_widths,
)
from drafter.decoding.generation import Generation
from drafter.decoding.ngrams import Lookup, NgramTable, TextDrafter
from drafter.decoding.options import Adaptive, DecodingOptions
from drafter.warping import Random, Sampling, draw, warp


@dataclass(frozen=True)
class Combined:
    """A drafter without a model and, for blocks in which it finds nothing, another drafter.

    Attributes:
        first: proposes from the tokens so far.
        otherwise: a draft model, or another one of these.
    """

    first: TextDrafter
    otherwise: "Drafter"


Drafter: TypeAlias = Decodable | TextDrafter | Combined


def models_of(drafter: Drafter) -> list[Any]:
    """Return the draft model of a drafter, a Decodable, or nothing if it has none."""
    if isinstance(drafter, Combined):
        return models_of(drafter.otherwise)
    return [] if isinstance(drafter, Lookup | NgramTable) else [drafter]


def without_model(drafter: Drafter) -> list[TextDrafter]:
    """Return the drafters without a model, in the order in which they are asked."""
    if isinstance(drafter, Combined):
        return [drafter.first, *without_model(drafter.otherwise)]
    return [drafter] if isinstance(drafter, Lookup | NgramTable) else []


def with_models(drafter: Drafter, change: Callable[[Any], Any]) -> Drafter:
    """Return a drafter with its model changed, for example moved to a device."""
    if isinstance(drafter, Combined):
        return Combined(drafter.first, with_models(drafter.otherwise, change))
    if isinstance(drafter, Lookup | NgramTable):
        return drafter
    changed: Decodable = change(drafter)
    return changed


def compiled_with(
    target: PreTrainedModel, drafter: Drafter, longest: int, gammas: Iterable[int]
) -> tuple[Padded, Drafter]:
    """Return the target and the drafter's model, if it has one, compiled for sequences of `longest` tokens."""
    widths = compiled_widths(gammas)
    of_target = compiled_model(target, longest, widths)
    # A drafter reads two tokens after each block whose drafts were all accepted.
    return of_target, with_models(drafter, lambda model: compiled_model(model, longest, widths | {2: 2}))


def drafting_of(
    drafter: Drafter,
    cached: Callable[[Decodable], CachedModel],
    num_speculative_tokens: int | Adaptive,
    options: DecodingOptions,
) -> "Drafting":
    """Return what drafts the blocks of new sequences.

    Args:
        drafter: the drafter.
        cached: gives a model its cache.
        num_speculative_tokens: gamma, or the rule that chooses it.
        options: sampling and acceptance rule.
    """
    if isinstance(drafter, Combined):
        otherwise = drafting_of(drafter.otherwise, cached, num_speculative_tokens, options)
        return CombinedDrafting(drafter.first, otherwise)
    if isinstance(drafter, Lookup | NgramTable):
        return TextDrafting(drafter)
    return ModelDrafting(cached(drafter), num_speculative_tokens, options)


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

    def draft(self, active: list[Generation], lengths: list[int]) -> Drafts:
        """Propose at most so many tokens per sequence; none where that is 0."""

    def replace_row(self, row: int, generation: Generation) -> None:
        """Give a row to another sequence."""

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all other rows."""


class ModelDrafting:
    """A draft model with its cache drafts one token per call.

    Args:
        model: the draft model.
        num_speculative_tokens: gamma, or the rule that chooses it.
        options: sampling and acceptance rule.
    """

    def __init__(self, model: CachedModel, num_speculative_tokens: int | Adaptive, options: DecodingOptions):
        self.model, self.options, self.was_called = model, options, False
        chosen = num_speculative_tokens
        self.threshold = chosen.threshold if isinstance(chosen, Adaptive) else None

    def draft(self, active: list[Generation], lengths: list[int]) -> Drafts:
        """Draft until each sequence has as many tokens as it would have alone. The rows have equally many."""
        threshold, options = self.threshold, self.options
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
            one.drafter_cached = len(one.tokens) + max(length - 1, 0)  # the last draft was not read
            one.drafted_by_model += length
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


class TextDrafting:
    """A drafter without a model proposes from the tokens of each sequence.

    With an adaptive draft length it proposes up to the limit, because the probability of its drafts is 1.

    Args:
        drafter: the drafter; None to draft nothing, so that each block is the target's bonus token alone.
    """

    def __init__(self, drafter: TextDrafter | None):
        self.drafter = drafter

    def draft(self, active: list[Generation], lengths: list[int]) -> Drafts:
        """Propose at most so many tokens per sequence."""
        if self.drafter is None:
            return Drafts.certain([[] for _ in active])
        return Drafts.certain([propose(self.drafter, *pair) for pair in zip(active, lengths, strict=True)])

    def replace_row(self, row: int, generation: Generation) -> None:
        """Do nothing: what is remembered of a sequence belongs to the sequence."""

    def keep_rows(self, rows: list[int]) -> None:
        """Do nothing, for the same reason."""


def propose(drafter: TextDrafter, sequence: Generation, count: int) -> list[int]:
    """Return at most `count` drafts."""
    return drafter.propose(sequence, count) if count else []


class CombinedDrafting:
    """In each block of a sequence, one drafter proposes and, if it finds nothing, the other one drafts.

    The draft model is called for the sequences in whose blocks it drafts; the tokens of other blocks are read in its
    next call.

    Args:
        first: the drafter without a model.
        otherwise: what drafts where it finds nothing.
    """

    def __init__(self, first: TextDrafter, otherwise: Drafting):
        self.first, self.otherwise = first, otherwise

    def draft(self, active: list[Generation], lengths: list[int]) -> Drafts:
        """Propose at most so many tokens per sequence."""
        found = [propose(self.first, *pair) for pair in zip(active, lengths, strict=True)]
        rest = [0 if drafts else length for drafts, length in zip(found, lengths, strict=True)]
        drafted = self.otherwise.draft(active, rest)
        if not any(found):
            return drafted
        pairs = zip(drafted.rows, drafted.lengths, found, strict=True)
        drafts = Drafts.certain([of_first or tokens[:length] for tokens, length, of_first in pairs])
        if drafted.p_BGV is None:
            return drafts
        tokens_BG = drafts.tokens_BG.to(drafted.p_BGV.device)
        p_BGV = one_hot(tokens_BG, drafted.p_BGV.shape[-1]).to(drafted.p_BGV)
        for row, (length, of_first) in enumerate(zip(drafts.lengths, found, strict=True)):
            if not of_first:
                p_BGV[row, :length] = drafted.p_BGV[row, :length]
        return drafts._replace(p_BGV=p_BGV)

    def replace_row(self, row: int, generation: Generation) -> None:
        """Give a row to another sequence."""
        self.otherwise.replace_row(row, generation)

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.otherwise.keep_rows(rows)


def generators_of(active: list[Generation], drawing: list[bool] | None = None) -> Random:
    """Return the sequences' generators, None for those that do not draw; or the only one, if all have the same."""
    first = active[0].generator
    if all(one.generator is first for one in active):
        return first
    return [
        one.generator if draws else None for one, draws in zip(active, drawing or [True] * len(active), strict=True)
    ]
