"""What a model can do, found by trying it rather than assumed from its name: cache rollback and ragged batches.

A model whose cache cannot return to its state before a rejected draft would generate wrong tokens without an error.
Each model is therefore tried once, on a few tokens, before it decodes. A model with states, which no cache can crop, is
tried with `stateful.StatefulDecoder`. `check_can_decode` predicts most of the outcome from the config alone, before
anything is loaded.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from drafter.decoding.batched import RaggedDecoder
from drafter.decoding.decoders import CachedModel, Compiled, Decodable, Decoder, Padded, plain_model
from drafter.decoding.stateful import StatefulDecoder, keeps_states
from drafter.decoding.trials import UNSUPPORTED, ordinary_tokens, relative_error
from drafter.models.inspection import vocabulary_rows
from drafter.models.loading import context_length

MakeDecoder = Callable[[PreTrainedModel], CachedModel]
# Model -> the decoder that discards a rejected draft; None if there is none.
_DECODERS: "WeakKeyDictionary[Any, MakeDecoder | None]" = WeakKeyDictionary()
# Model -> whether it accepts explicit masks and positions.
_ACCEPTS_POSITIONS: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
# The length of the sequence that a model is tried with, and of the prompt at its beginning.
LENGTH, PROMPT_LENGTH = 10, 4
# The cache layers, as transformers chooses them by the config, that can be cropped, and those whose states are copied.
CAN_ROLL_BACK = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
CAN_BE_COPIED = {
    *(LinearAttentionLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer),
}
# Architectures that keep states elsewhere, although their config has such layers.
STATES_ELSEWHERE = {"recurrent_gemma", "minimax"}


def decoder_of(model: Decodable) -> CachedModel:
    """Return a decoder for a new sequence.

    Raises:
        ValueError: the model cannot discard a rejected draft (see `check_decodes`), or has states and is compiled.
    """
    plain, widths = plain_model(model), None
    check_decodes(plain)
    if isinstance(model, Padded):
        model, widths = model
    make = _DECODERS[plain]
    if make is not None and make is not Decoder:  # padding would change the states
        if isinstance(model, Compiled):
            raise ValueError(
                f"{type(plain).__name__} has states, which a compiled call does not keep: give compile=false"
            )
        return make(plain)
    if isinstance(model, Compiled):
        return model.decoder(widths)
    return Decoder(plain, explicit_positions=_accepts_positions(plain) and _window(plain) is None, widths=widths)


def check_decodes(model: Any) -> None:
    """Refuse a model whose cached logits after a rejected draft differ from those of a forward pass without a cache.

    Each model is tried once, with ten tokens. An object that is no PreTrainedModel is not tried.

    Raises:
        ValueError: the model differs; names the architecture and the stages that work with it.
    """
    problem: Exception | None = None
    if model not in _DECODERS:
        errors: dict[MakeDecoder, float] = {}
        for make in _candidates(model):
            try:
                errors[make] = _error(model, make) if isinstance(model, PreTrainedModel) else 0.0
            except torch.OutOfMemoryError:
                raise
            except UNSUPPORTED as raised:
                problem = raised
        smallest = min(errors.values(), default=1.0)
        # In half precision, a wrong state can be as small as rounding. It shows beside the error of a right one.
        right = [make for make, error in errors.items() if error <= min(1.0, max(1.25 * smallest, 0.1))]
        _DECODERS[model] = right[0] if right else None
    if _DECODERS[model] is None:
        raise ValueError(_refusal(type(model).__name__, model.config)) from problem


def _candidates(model: Any) -> list[MakeDecoder]:
    """Return the decoders that are tried, in their order."""
    try:
        stateful = keeps_states(model.config)
    except UNSUPPORTED:
        stateful = False  # a custom architecture, or no PreTrainedModel
    return [StatefulDecoder, partial(StatefulDecoder, one_at_a_time=True)] if stateful else [Decoder]


def check_can_decode(config: Any) -> None:
    """Refuse an architecture that `check_decodes` would refuse, as far as its config tells, without loading weights.

    If a config does not list the kinds of its layers, the model class tells whether it has states, which are then not
    in transformers' cache.

    Raises:
        ValueError: the architecture keeps states that cannot be copied; names it and the stages that work with it.
    """
    text_config = config.get_text_config(decoder=True)
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if getattr(text_config, "layer_types", None) is None:
        decodes = not getattr(kind, "_is_stateful", False)
    else:
        try:
            layers = {type(layer) for layer in DynamicCache(config=text_config).layers}
            decodes = layers <= CAN_ROLL_BACK | CAN_BE_COPIED
        except UNSUPPORTED:
            decodes = True  # perhaps a custom architecture: check_decodes tries it once its weights are loaded
    if not decodes or text_config.model_type in STATES_ELSEWHERE:
        raise ValueError(_refusal(kind.__name__ if kind else config.model_type, config))


def check_side_by_side(model: PreTrainedModel, capacity: int) -> None:
    """Check that a RaggedDecoder can use the model to decode several sequences of up to `capacity` tokens side by side.

    Raises:
        ValueError: its cache cannot discard a rejected draft; it has states; it has a sliding window shorter than the
            capacity; or its logits change when masks and positions are passed explicitly (with ALiBi, for example).
    """
    check_decodes(model)
    if _DECODERS[model] is not Decoder:
        raise ValueError(
            f"{type(model).__name__} has states, which advance for all sequences at once: decode its sequences one at "
            f"a time"
        )
    if not _accepts_positions(model):
        raise ValueError(
            f"{type(model).__name__} does not accept explicit masks and positions: decode its sequences one at a time"
        )
    window = _window(model)
    if window and window < capacity:
        raise ValueError(
            f"{type(model).__name__} attends to the last {window} tokens in some layers, and these sequences may have "
            f"{capacity}: decode them one at a time"
        )


def _refusal(architecture: str, config: Any) -> str:
    path = getattr(config, "name_or_path", "")  # says whether it is the target or the drafter, if it was loaded
    model = f"{path}: {architecture}" if path else architecture
    return (
        f"{model} cannot be decoded with: it has no cache that can discard a rejected draft, and no states in "
        f"transformers' cache that can be put back. As a target it allows respond, cache, finetuning and validation's "
        f"expected block efficiency, but no evaluate, gamma, measure, trim and chat"
    )


@torch.no_grad()
def _error(model: PreTrainedModel, make: MakeDecoder) -> float:
    """Compare cached logits with those without a cache, for one and several tokens, after a rejected draft."""
    if context_length(model) < LENGTH:
        return 0.0  # too short to decode anything
    training = model.training
    model.eval()  # dropout would make the logits differ
    tokens = ordinary_tokens(model, 2 * LENGTH)
    sequence, others = tokens[:LENGTH], tokens[LENGTH:]
    changed = [*others[:PROMPT_LENGTH], *sequence[PROMPT_LENGTH:]]
    rows = torch.tensor([sequence, changed], device=model.device)
    uncached_TV, changed_TV = model(input_ids=rows, use_cache=False).logits[:, PROMPT_LENGTH:].float()
    cached_TV = _with_rejected_drafts(make(model), sequence, others[:3]).float()
    model.train(training)
    return relative_error(cached_TV, uncached_TV, changed_TV, model.dtype)


def _with_rejected_drafts(decoder: CachedModel, sequence: list[int], drafts: list[int]) -> torch.Tensor:
    """Return the cached logits at the positions after the prompt, shape (T, V).

    The calls are the prompt, a block with a rejected draft, a single token, and all remaining tokens at once.
    """
    first = PROMPT_LENGTH
    decoder.forward([sequence[:first]], [0], 1)
    block_TV = decoder.forward([[sequence[first], *drafts]], [first], len(drafts) + 1)[0, :1]
    one_TV = decoder.forward([sequence[first + 1 : first + 2]], [first + 1], 1)[0]
    rest = sequence[first + 2 :]
    several_TV = decoder.forward([rest], [first + 2], len(rest))[0]
    return torch.cat([block_TV, one_TV, several_TV])


def _window(model: PreTrainedModel) -> int | None:
    """Return the length of the shortest sliding window of any layer, or None if all layers attend to all tokens."""
    config = model.config.get_text_config()
    windows = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((window for window in windows if window), default=None)


def _accepts_positions(model: Any) -> bool:
    if model not in _ACCEPTS_POSITIONS:
        _ACCEPTS_POSITIONS[model] = isinstance(model, PreTrainedModel) and _agrees_in_a_batch(model)
    return _ACCEPTS_POSITIONS[model]


@torch.inference_mode()
def _agrees_in_a_batch(model: PreTrainedModel) -> bool:
    """Return whether two sequences of different lengths get the same logits in one batch as each gets alone."""
    rows = vocabulary_rows(model)
    prompts, last = [[token % rows for token in prompt] for prompt in ([1, 2, 3, 4], [3, 1, 2])], [5 % rows, 0]
    together = RaggedDecoder(model, 8)
    width = max(map(len, prompts))
    try:
        together.forward([prompt + [0] * (width - len(prompt)) for prompt in prompts], [0, 0], 1)
        batched = together.forward([last, last], [len(prompt) for prompt in prompts], 2)
    except (TypeError, ValueError, RuntimeError):
        return False  # the model has no such arguments, or expects other shapes
    alone = torch.cat([Decoder(model).forward([[*prompt, *last]], [0], 2) for prompt in prompts])
    # Logits that are not a number are reported elsewhere.
    scale = float(alone.abs().nan_to_num().max())
    return torch.allclose(batched, alone, rtol=1e-2, atol=1e-2 * scale, equal_nan=True)
