"""The blocks of speculative decoding: draft, verify, and advance each sequence of a batch by the tokens it accepts.

A sequence does not depend on those that are decoded beside it, except for rounding: it drafts as many tokens as it
would alone, and with a generator of its own it draws the same random numbers. What a row drafts beyond that, because
another one drafts more, is not verified.

Shapes: B sequences, G drafted tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from drafter.decoding.acceptance import Block, Verification, truncate_block, verify, verify_greedy
from drafter.decoding.clock import Clock
from drafter.decoding.decoders import CachedModel
from drafter.decoding.generation import Decoded, Generation
from drafter.decoding.options import Adaptive, DecodingOptions, max_draft_length
from drafter.warping import Random, Sampling, draw, warp


class _Drafts(NamedTuple):
    """The drafted tokens (B, G), also as lists, how many of each row count, and the distributions they are from."""

    tokens_BG: torch.Tensor
    rows: list[list[int]]
    lengths: list[int]
    p_GBV: list[torch.Tensor]


@torch.inference_mode()
def decode_blocks(
    target: CachedModel,
    drafter: CachedModel | None,
    generations: list[Generation],
    batch_size: int,
    num_speculative_tokens: int | Adaptive,
    options: DecodingOptions,
    on_block: Callable[[Block], None] | None = None,
) -> list[Decoded]:
    """Draft and verify blocks until every sequence has ended.

    Args:
        target: the target.
        drafter: the drafter; None for blocks without drafts, which are autoregressive decoding.
        generations: the sequences.
        batch_size: the most sequences that are decoded at a time.
        num_speculative_tokens: gamma, or the rule that chooses it; 0 without a drafter.
        options: sampling, stop tokens and acceptance rule.
        on_block: is called with each block.
    """
    clock = Clock(target.model.device)
    active, waiting = generations[:batch_size], generations[batch_size:][::-1]
    for generation, target_cached in zip(active, _prefill(target, active), strict=True):
        generation.target_cached = target_cached
    if drafter:
        for generation, drafter_cached in zip(active, _prefill(drafter, active), strict=True):
            generation.drafter_cached = drafter_cached
    while active:
        drafts = _draft(drafter, active, num_speculative_tokens, options)
        clock.add_drafting()
        found = _verify(target, active, drafts, options)
        clock.add_verifying()
        for generation, tokens, length, accepted, bonus, probabilities in zip(
            active, drafts.rows, drafts.lengths, *found, strict=True
        ):
            block = truncate_block(tokens[:length], accepted, bonus, probabilities, options.stop_ids)
            generation.append(block)
            if on_block:
                on_block(block)
        active = _replace_finished([target, drafter] if drafter else [target], active, waiting, options.stop_ids)
        # A call has equally many tokens in each row, so some rows repeat tokens that are cached already.
        missing = max((len(one.tokens) - one.drafter_cached for one in active), default=0)
        for generation in active:
            generation.drafter_cached = len(generation.tokens) - missing
    seconds = clock.seconds(len(generations))
    return [Decoded(one.tokens[one.prompt_length :], one.blocks, seconds) for one in generations]


def _prefill(model: CachedModel, active: list[Generation]) -> list[int]:
    """Cache the prompts if their lengths differ, and return how many tokens of each are cached.

    All but the last token of each prompt are cached, so that the next call has one token per row. Prompts of equal
    length need no such call: they are part of the first block's.
    """
    lengths = [len(one.tokens) for one in active]
    if len(set(lengths)) <= 1:
        return [0] * len(active)
    width = max(lengths) - 1
    model.forward([one.tokens[:-1] + [0] * (width - len(one.tokens) + 1) for one in active], [0] * len(active), 1)
    return [length - 1 for length in lengths]


def _draft(
    drafter: CachedModel | None,
    active: list[Generation],
    num_speculative_tokens: int | Adaptive,
    options: DecodingOptions,
) -> _Drafts:
    """Draft until each sequence has as many tokens as it would have alone. The rows have equally many, so some more."""
    threshold = num_speculative_tokens.threshold if isinstance(num_speculative_tokens, Adaptive) else None
    # The last token of a sequence is always a bonus token, so a draft never goes beyond the limit.
    lengths = [min(max_draft_length(num_speculative_tokens), one.remaining - 1) for one in active]
    ids, starts = [one.tokens[one.drafter_cached :] for one in active], [one.drafter_cached for one in active]
    tokens: list[torch.Tensor] = []
    probabilities: list[torch.Tensor] = []
    confidence_B = torch.ones(len(active))
    is_greedy = options.sampling.temperature == 0
    while drafter and len(tokens) < max(lengths):
        logits_BV = drafter.forward(ids, starts, 1)[:, -1]
        if is_greedy or options.rule == "argmax":
            drafted_B = logits_BV.argmax(-1)
            # Greedy decoding has no distribution: the drafter's confidence is then that at temperature 1.
            p_BV = None if threshold is None else warp(logits_BV, Sampling(1.0) if is_greedy else options.sampling)
        else:
            p_BV = warp(logits_BV, options.sampling)
            if options.rule == "ratio":
                probabilities.append(p_BV)
            drafted_B = draw(p_BV, _generators(active, [len(tokens) < length for length in lengths]))
        ids, starts = [[token] for token in drafted_B.tolist()], [len(one.tokens) + len(tokens) for one in active]
        tokens.append(drafted_B)
        if threshold is not None and p_BV is not None:
            confidence_B = confidence_B.to(p_BV) * p_BV.gather(1, drafted_B[:, None])[:, 0]
            ended = (confidence_B < threshold).tolist()
            lengths = [min(length, len(tokens)) if end else length for length, end in zip(lengths, ended, strict=True)]
    tokens_BG = torch.stack(tokens, 1) if tokens else torch.zeros(len(active), 0, dtype=torch.long)
    return _Drafts(tokens_BG, tokens_BG.tolist(), lengths, probabilities)


def _generators(active: list[Generation], drawing: list[bool] | None = None) -> Random:
    """Return the sequences' generators, None for those that do not draw; or the only one, if all have the same."""
    first = active[0].generator
    if all(one.generator is first for one in active):
        return first
    return [
        one.generator if draws else None for one, draws in zip(active, drawing or [True] * len(active), strict=True)
    ]


def _verify(target: CachedModel, active: list[Generation], drafts: _Drafts, options: DecodingOptions) -> Verification:
    """Score the drafts with one target call, and apply the acceptance rule."""
    count = drafts.tokens_BG.shape[1]
    ids = [one.tokens[one.target_cached :] + tokens for one, tokens in zip(active, drafts.rows, strict=True)]
    logits_BGV = target.forward(ids, [one.target_cached for one in active], count + 1)
    if options.sampling.temperature == 0:
        counted = [tokens[:length] for tokens, length in zip(drafts.rows, drafts.lengths, strict=True)]
        return verify_greedy(counted, logits_BGV.argmax(-1).tolist())
    q_BGV, p_BGV = warp(logits_BGV, options.sampling), None
    if options.rule == "ratio":
        p_BGV = torch.stack(drafts.p_GBV, 1) if count else q_BGV[:, :0]
    tokens_BG = drafts.tokens_BG.to(q_BGV.device)
    return verify(tokens_BG, p_BGV, q_BGV, _generators(active), drafts.lengths).to_lists()


def _replace_finished(
    models: Sequence[CachedModel],
    active: list[Generation],
    waiting: list[Generation],
    stop_ids: Sequence[int],
) -> list[Generation]:
    """Give the rows of finished sequences to waiting ones, drop the other such rows, and return the active ones."""
    kept_rows, kept = [], []
    for row, current in enumerate(active):
        generation = current
        if current.is_finished(stop_ids):
            if not waiting:
                continue
            generation = waiting.pop()
            for model in models:
                model.replace_row(row, generation.tokens[:-1])
            generation.target_cached = generation.drafter_cached = len(generation.tokens) - 1
        kept_rows.append(row)
        kept.append(generation)
    if len(kept_rows) < len(active) and kept_rows:
        for model in models:
            model.keep_rows(kept_rows)
    return kept
