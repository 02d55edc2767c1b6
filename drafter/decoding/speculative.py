"""Speculative decoding, and the autoregressive decoding that it is compared with, of one sequence or several at once.

In each block the drafter proposes gamma tokens, one target call scores them all, `verify` accepts a prefix such that
the output keeps the target's distribution exactly, and the target adds one bonus token (Leviathan et al., arXiv
2211.17192, algorithm 1). Both models' logits are warped (temperature, top-k, top-p) before verification. What is
drafted and what is accepted depends on the acceptance rule (see `acceptance`).

The number of drafted tokens may depend on the drafter's confidence in the tokens of the block so far (`Adaptive`).
Decoding remains lossless: whether a token is drafted depends on the earlier drafts alone, and each drafted token is
verified, against the distribution that it was drawn from if the acceptance rule uses it.

Shapes: B sequences, G drafted tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from drafter.decoding.acceptance import Block, Verification, truncate_block, verify, verify_greedy
from drafter.decoding.batched import RaggedDecoder
from drafter.decoding.capabilities import check_side_by_side, decoder_of
from drafter.decoding.clock import Clock
from drafter.decoding.decoders import CachedModel, Decodable, plain_model
from drafter.decoding.generation import Decoded, Generation
from drafter.decoding.options import Adaptive, DecodingOptions, check_draft_length, check_prompt, max_draft_length
from drafter.models.loading import context_length
from drafter.warping import Sampling, draw, warp


def speculative_decode(
    target: Decodable,
    drafter: Decodable,
    prompt: list[int],
    num_speculative_tokens: int | Adaptive,
    options: DecodingOptions,
    generator: torch.Generator | None = None,
    on_block: Callable[[Block], None] | None = None,
) -> Decoded:
    """Continue a prompt with the target's distribution, in blocks that the drafter drafts.

    The target reads the prompt in the call of the first block, so the number of blocks is the number of target calls.

    The sequence ends at the latest where the context of one of the two models does.

    Args:
        target: the model whose distribution the result has.
        drafter: the model that proposes tokens.
        prompt: the prompt's token ids.
        num_speculative_tokens: gamma, the number of drafted tokens per block, or the rule that chooses it.
        options: length limit, sampling, stop tokens and acceptance rule.
        generator: the source of random numbers; None for PyTorch's default.
        on_block: is called with each block as soon as it is verified, for example to show its text.

    Raises:
        ValueError: num_speculative_tokens is below 1, the prompt is empty or fills the context, or a model cannot be
            decoded with (see capabilities.check_decodes).
    """
    check_draft_length(num_speculative_tokens)
    check_prompt(prompt)
    pair = decoder_of(target), decoder_of(drafter)
    return _decode(*pair, [prompt], 1, num_speculative_tokens, options, generator, on_block)[0]


def speculative_decode_batch(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompts: list[list[int]],
    num_speculative_tokens: int | Adaptive,
    options: DecodingOptions,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> list[Decoded]:
    """Decode several prompts in one batch, in which each sequence advances by the tokens that it accepts.

    At most `batch_size` sequences are decoded at a time (None: all). When one ends, the next prompt takes its row.

    Raises:
        ValueError: as for `speculative_decode`; batch_size is below 1; or a model does not support batches (see
            capabilities.check_side_by_side).
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    check_draft_length(num_speculative_tokens)
    for prompt in prompts:
        check_prompt(prompt)
    longest = max((max_length(prompt, options, target, drafter) for prompt in prompts), default=0)
    capacity = longest + max_draft_length(num_speculative_tokens) + 1
    for model in (target, drafter):
        check_side_by_side(model, capacity)
    return _decode(
        RaggedDecoder(target, capacity),
        RaggedDecoder(drafter, capacity),
        prompts,
        batch_size or len(prompts),
        num_speculative_tokens,
        options,
        generator,
    )


@torch.inference_mode()
def autoregressive_decode(
    target: Decodable,
    prompt: list[int],
    options: DecodingOptions,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Continue a prompt by one token per target call: the baseline, with the same cache and the same sampling.

    The sequence ends at the latest where the target's context does.

    Raises:
        ValueError: the prompt is empty or fills the context, or the target cannot be decoded with (see
            capabilities.check_decodes).
    """
    check_prompt(prompt)
    most = max_length(prompt, options, target) - len(prompt)
    model, sequence = decoder_of(target), list(prompt)
    clock = Clock(target.device)
    blocks: list[Block] = []
    new_tokens, cached_length = sequence[:], 0
    while len(blocks) < most and not (blocks and sequence[-1] in options.stop_ids):
        logits_1V = model.forward([new_tokens], [cached_length], 1)[:, -1]
        if options.sampling.temperature == 0:
            token = int(logits_1V.argmax())
        else:
            token = int(draw(warp(logits_1V, options.sampling), generator))
        cached_length += len(new_tokens)
        new_tokens = [token]
        sequence.append(token)
        blocks.append(Block([], 0, [token]))
    return Decoded(sequence[len(prompt) :], blocks, clock.seconds(1))


def max_length(prompt: list[int], options: DecodingOptions, *models: Decodable) -> int:
    """Return the number of tokens at which a sequence ends: by its options, or by the shortest context of the models.

    Raises:
        ValueError: the prompt fills the context.
    """
    context = min(context_length(plain_model(model)) for model in models)
    if len(prompt) >= context:
        raise ValueError(f"the prompt has {len(prompt)} tokens, and the context of the models is {context}: shorten it")
    return min(len(prompt) + options.max_new_tokens, context)


class _Drafts(NamedTuple):
    """The drafted tokens (B, G), and the distribution that each was drawn from where the verification needs it."""

    tokens_BG: torch.Tensor
    p_GBV: list[torch.Tensor]


@torch.inference_mode()
def _decode(
    target: CachedModel,
    drafter: CachedModel,
    prompts: list[list[int]],
    batch_size: int,
    num_speculative_tokens: int | Adaptive,
    options: DecodingOptions,
    generator: torch.Generator | None,
    on_block: Callable[[Block], None] | None = None,
) -> list[Decoded]:
    """Draft and verify blocks until every sequence has ended."""
    clock = Clock(target.model.device)
    generations = [
        Generation(list(prompt), len(prompt), max_length(prompt, options, target.model, drafter.model))
        for prompt in prompts
    ]
    active, waiting = generations[:batch_size], generations[batch_size:][::-1]
    lengths = _prefill(target, active), _prefill(drafter, active)
    for generation, target_cached, drafter_cached in zip(active, *lengths, strict=True):
        generation.target_cached, generation.drafter_cached = target_cached, drafter_cached
    while active:
        # The last token of a sequence is always a bonus token, so a draft never goes beyond the limit.
        most = min(max_draft_length(num_speculative_tokens), max(one.remaining for one in active) - 1)
        threshold = num_speculative_tokens.threshold if isinstance(num_speculative_tokens, Adaptive) else None
        drafts = _draft(drafter, active, most, threshold, options, generator)
        clock.add_drafting()
        drafted = drafts.tokens_BG.tolist()
        found = _verify(target, active, drafted, drafts, options, generator)
        clock.add_verifying()
        for generation, tokens, accepted, bonus, probabilities in zip(
            active, drafted, found.accepted, found.bonus, found.acceptance_probabilities, strict=True
        ):
            block = truncate_block(tokens, accepted, bonus, probabilities, generation.remaining, options.stop_ids)
            generation.append(block, len(tokens))
            if on_block:
                on_block(block)
        active = _replace_finished(target, drafter, active, waiting, options.stop_ids)
        # A call has equally many tokens in each row, so some rows repeat tokens that are cached already.
        missing = max((len(one.tokens) - one.drafter_cached for one in active), default=0)
        for generation in active:
            generation.drafter_cached = len(generation.tokens) - missing
    seconds = clock.seconds(len(prompts))
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
    drafter: CachedModel,
    active: list[Generation],
    count: int,
    threshold: float | None,
    options: DecodingOptions,
    generator: torch.Generator | None,
) -> _Drafts:
    """Draft `count` tokens per sequence, or until no sequence's drafts have a probability of at least `threshold`."""
    ids, starts = [one.tokens[one.drafter_cached :] for one in active], [one.drafter_cached for one in active]
    tokens, probabilities, confidence_B = [], [], torch.ones(len(active))
    is_greedy = options.sampling.temperature == 0
    for step in range(count):
        logits_BV = drafter.forward(ids, starts, 1)[:, -1]
        if is_greedy or options.rule == "argmax":
            drafted_B = logits_BV.argmax(-1)
            # Greedy decoding has no distribution: the drafter's confidence is then that at temperature 1.
            p_BV = None if threshold is None else warp(logits_BV, Sampling(1.0) if is_greedy else options.sampling)
        else:
            p_BV = warp(logits_BV, options.sampling)
            if options.rule == "ratio":
                probabilities.append(p_BV)
            drafted_B = draw(p_BV, generator)
        tokens.append(drafted_B)
        if threshold is not None and p_BV is not None:
            confidence_B = confidence_B.to(p_BV) * p_BV.gather(1, drafted_B[:, None])[:, 0]
            if confidence_B.max() < threshold:
                break
        ids, starts = [[token] for token in drafted_B.tolist()], [len(one.tokens) + step for one in active]
    if not tokens:
        return _Drafts(torch.zeros(len(active), 0, dtype=torch.long, device=drafter.model.device), [])
    return _Drafts(torch.stack(tokens, 1), probabilities)


def _verify(
    target: CachedModel,
    active: list[Generation],
    drafted: list[list[int]],
    drafts: _Drafts,
    options: DecodingOptions,
    generator: torch.Generator | None,
) -> Verification:
    """Score the drafts with one target call, and apply the acceptance rule."""
    count = drafts.tokens_BG.shape[1]
    ids = [one.tokens[one.target_cached :] + tokens for one, tokens in zip(active, drafted, strict=True)]
    logits_BGV = target.forward(ids, [one.target_cached for one in active], count + 1)
    if options.sampling.temperature == 0:
        return verify_greedy(drafted, logits_BGV.argmax(-1).tolist())
    q_BGV, p_BGV = warp(logits_BGV, options.sampling), None
    if options.rule == "ratio":
        p_BGV = torch.stack(drafts.p_GBV, 1) if count else q_BGV[:, :0]
    return verify(drafts.tokens_BG, p_BGV, q_BGV, generator).to_lists()


def _replace_finished(
    target: CachedModel,
    drafter: CachedModel,
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
            for model in (target, drafter):
                model.replace_row(row, generation.tokens[:-1])
            generation.target_cached = generation.drafter_cached = len(generation.tokens) - 1
        kept_rows.append(row)
        kept.append(generation)
    if len(kept_rows) < len(active) and kept_rows:
        target.keep_rows(kept_rows)
        drafter.keep_rows(kept_rows)
    return kept
