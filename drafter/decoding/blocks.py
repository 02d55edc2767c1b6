"""The blocks of speculative decoding: draft, verify, and advance each sequence of a batch by the tokens it accepts.

A sequence does not depend on those that are decoded beside it, except for rounding: it drafts as many tokens as it
would alone, and with a generator of its own it draws the same random numbers. What a row drafts beyond that, because
another one drafts more, is not verified. What proposes the drafts is in `drafting`.

Shapes: B sequences, G drafted tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from drafter.decoding.acceptance import Block, Verification, truncate_block, verify, verify_greedy
from drafter.decoding.clock import Clock
from drafter.decoding.decoders import CachedModel, aligned_starts
from drafter.decoding.drafting import Drafting, Drafts, generators_of
from drafter.decoding.generation import Decoded, Generation
from drafter.decoding.options import Adaptive, DecodingOptions, max_draft_length
from drafter.warping import warp


@torch.inference_mode()
def decode_blocks(
    target: CachedModel,
    drafting: Drafting,
    generations: list[Generation],
    batch_size: int,
    num_speculative_tokens: int | Adaptive,
    options: DecodingOptions,
    on_block: Callable[[Block], None] | None = None,
) -> list[Decoded]:
    """Draft and verify blocks until every sequence has ended.

    Args:
        target: the target.
        drafting: what proposes the drafts.
        generations: the sequences.
        batch_size: the most sequences that are decoded at a time.
        num_speculative_tokens: gamma, or the rule that chooses it; 0 without a drafter.
        options: sampling, stop tokens and acceptance rule.
        on_block: is called with each block.
    """
    clock = Clock(target.model.device)
    active, waiting = generations[:batch_size], generations[batch_size:][::-1]
    while active:
        # The last token of a sequence is always a bonus token, so a draft never goes beyond the limit.
        lengths = [min(max_draft_length(num_speculative_tokens), one.remaining - 1) for one in active]
        drafts = drafting.draft(active, lengths)
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
        active = _replace_finished(target, drafting, active, waiting, options.stop_ids)
    seconds = clock.seconds(len(generations))
    return [Decoded(one.tokens[one.prompt_length :], one.blocks, seconds, one.drafted_by_model) for one in generations]


def _verify(target: CachedModel, active: list[Generation], drafts: Drafts, options: DecodingOptions) -> Verification:
    """Score the drafts with one target call, and apply the acceptance rule."""
    starts = aligned_starts(target, [one.tokens for one in active], [one.target_cached for one in active])
    ids = [one.tokens[start:] + tokens for one, start, tokens in zip(active, starts, drafts.rows, strict=True)]
    logits_BGV = target.forward(ids, starts, drafts.tokens_BG.shape[1] + 1)
    if options.sampling.temperature == 0:
        counted = [tokens[:length] for tokens, length in zip(drafts.rows, drafts.lengths, strict=True)]
        return verify_greedy(counted, logits_BGV.argmax(-1).tolist())
    q_BGV = warp(logits_BGV, options.sampling)
    tokens_BG = drafts.tokens_BG.to(q_BGV.device)
    return verify(tokens_BG, drafts.p_BGV, q_BGV, generators_of(active), drafts.lengths).to_lists()


def _replace_finished(
    target: CachedModel,
    drafting: Drafting,
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
            target.replace_row(row, generation.tokens[:-1])
            generation.target_cached = len(generation.tokens) - 1
            drafting.replace_row(row, generation)
        kept_rows.append(row)
        kept.append(generation)
    if len(kept_rows) < len(active) and kept_rows:
        target.keep_rows(kept_rows)
        drafting.keep_rows(kept_rows)
    return kept
