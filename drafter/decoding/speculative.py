"""Speculative decoding, and the autoregressive decoding that it is compared with, of one sequence or several at once.

In each block the drafter proposes gamma tokens, one target call scores them all, `verify` accepts a prefix such that
the output keeps the target's distribution exactly, and the target adds one bonus token (Leviathan et al., arXiv
2211.17192, algorithm 1). Both models' logits are warped (temperature, top-k, top-p) before verification. What is
drafted and what is accepted depends on the acceptance rule (see `acceptance`). The loop over blocks is in `blocks`.

The number of drafted tokens may depend on the drafter's confidence in the tokens of the block so far (`Adaptive`).
Decoding remains lossless: whether a token is drafted depends on the earlier drafts alone, and each drafted token is
verified, against the distribution that it was drawn from if the acceptance rule uses it.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from drafter.decoding.acceptance import Block
from drafter.decoding.batched import RaggedDecoder
from drafter.decoding.blocks import decode_blocks
from drafter.decoding.capabilities import check_side_by_side, decoder_of
from drafter.decoding.clock import Clock
from drafter.decoding.decoders import Decodable, plain_model
from drafter.decoding.drafting import Drafter, Drafting, TextDrafting, drafting_of, models_of
from drafter.decoding.generation import Decoded, Generation
from drafter.decoding.options import Adaptive, DecodingOptions, check_draft_length, check_prompt, max_draft_length
from drafter.models.loading import context_length
from drafter.warping import Random, draw, warp


def speculative_decode(
    target: Decodable,
    drafter: Drafter,
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
        drafter: the model that proposes tokens, or a drafter without a model (see `ngrams` and `drafting.Combined`).
            In a block for which such a drafter finds nothing, the target adds its bonus token alone.
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
    pair = decoder_of(target), drafting_of(drafter, decoder_of, num_speculative_tokens, options)
    most = max_length(prompt, options, target, *models_of(drafter))
    generation = Generation(list(prompt), len(prompt), most, generator)
    return decode_blocks(*pair, [generation], 1, num_speculative_tokens, options, on_block)[0]


def speculative_decode_batch(
    target: PreTrainedModel,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    num_speculative_tokens: int | Adaptive,
    options: DecodingOptions,
    generator: Random = None,
    batch_size: int | None = None,
) -> list[Decoded]:
    """Decode several prompts in one batch, in which each sequence advances by the tokens that it accepts.

    At most `batch_size` sequences are decoded at a time (None: all). When one ends, the next prompt takes its row. With
    a generator for each prompt, a sequence does not depend on the others: its tokens and blocks are those that
    `speculative_decode` gives, unless rounding decides between two nearly equal values.

    Raises:
        ValueError: as for `speculative_decode`; batch_size is below 1; or a model does not support batches (see
            capabilities.check_side_by_side).
    """
    check_draft_length(num_speculative_tokens)
    return _decode_batch(target, drafter, prompts, num_speculative_tokens, options, generator, batch_size)


def autoregressive_decode_batch(
    target: PreTrainedModel,
    prompts: Sequence[list[int]],
    options: DecodingOptions,
    generator: Random = None,
    batch_size: int | None = None,
) -> list[Decoded]:
    """Decode several prompts in one batch, by one token per target call: the baseline of `speculative_decode_batch`.

    Raises:
        ValueError: as for `autoregressive_decode` and `speculative_decode_batch`.
    """
    return _decode_batch(target, None, prompts, 0, options, generator, batch_size)


def _decode_batch(
    target: PreTrainedModel,
    drafter: Drafter | None,
    prompts: Sequence[list[int]],
    num_speculative_tokens: int | Adaptive,
    options: DecodingOptions,
    generator: Random,
    batch_size: int | None,
) -> list[Decoded]:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    for prompt in prompts:
        check_prompt(prompt)
    models = [target, *(() if drafter is None else models_of(drafter))]
    own = generator if isinstance(generator, Sequence) else [generator] * len(prompts)
    generations = [
        Generation(list(prompt), len(prompt), max_length(prompt, options, *models), of_prompt)
        for prompt, of_prompt in zip(prompts, own, strict=True)
    ]
    longest = max((one.max_length for one in generations), default=0)
    capacity = longest + max_draft_length(num_speculative_tokens) + 1
    for model in models:
        check_side_by_side(model, capacity)

    def cached(model: Decodable) -> RaggedDecoder:
        return RaggedDecoder(plain_model(model), capacity)

    drafting: Drafting = TextDrafting(None)
    if drafter is not None:
        drafting = drafting_of(drafter, cached, num_speculative_tokens, options)
    batch_size = batch_size or len(prompts)
    return decode_blocks(cached(target), drafting, generations, batch_size, num_speculative_tokens, options)


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
