"""What a model can do, found by trying it rather than assumed from its name: cache rollback and ragged batches.

A model whose cache cannot return to its state before a rejected draft would generate wrong tokens without an error.
Each model is therefore tried once, on a few tokens, before it decodes. `check_can_decode` predicts most of the outcome
from the config alone, before anything is loaded.

Shapes: T tokens, V vocabulary.
"""

from itertools import cycle, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from drafter.decoding.batched import RaggedDecoder
from drafter.decoding.decoders import Compiled, Decodable, Decoder, Padded, plain_model
from drafter.models.inspection import vocabulary_rows
from drafter.models.loading import context_length

# Model -> whether its cache can discard a rejected draft.
_ROLLS_BACK: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
# Model -> whether it accepts explicit masks and positions.
_ACCEPTS_POSITIONS: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
# The length of the sequence that a model is tried with, and of the prompt at its beginning.
LENGTH, PROMPT_LENGTH = 10, 4
# The cache layers, as transformers chooses them by the config, that keep all keys and values and can be cropped.
CAN_ROLL_BACK = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
# The exceptions of a call that a model or its cache does not support.
UNSUPPORTED = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)


def decoder_of(model: Decodable) -> Decoder:
    """Return a decoder for a new sequence.

    Raises:
        ValueError: the model's cache cannot discard a rejected draft (see `check_decodes`).
    """
    plain, widths = plain_model(model), None
    check_decodes(plain)
    if isinstance(model, Padded):
        model, widths = model
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
    if model not in _ROLLS_BACK:
        try:
            _ROLLS_BACK[model] = not isinstance(model, PreTrainedModel) or _rolls_back(model)
        except torch.OutOfMemoryError:
            raise
        except UNSUPPORTED as raised:
            _ROLLS_BACK[model], problem = False, raised
    if not _ROLLS_BACK[model]:
        raise ValueError(_refusal(type(model).__name__)) from problem


def check_can_decode(config: Any) -> None:
    """Refuse an architecture that `check_decodes` would refuse, as far as its config tells, without loading weights.

    Layers without attention (recurrent, linear-attention, convolution) keep a state that a rejected draft changes
    irrevocably. If a config does not list the kinds of its layers, the model class tells whether it has such a state.

    Raises:
        ValueError: the architecture keeps such a state; names it and the stages that work with it.
    """
    text_config = config.get_text_config(decoder=True)
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if getattr(text_config, "layer_types", None) is None:
        decodes = not getattr(kind, "_is_stateful", False)
    else:
        try:
            decodes = {type(layer) for layer in DynamicCache(config=text_config).layers} <= CAN_ROLL_BACK
        except UNSUPPORTED:
            decodes = True  # perhaps a custom architecture: check_decodes tries it once its weights are loaded
    if not decodes:
        raise ValueError(_refusal(kind.__name__ if kind else config.model_type))


def check_side_by_side(model: PreTrainedModel, capacity: int) -> None:
    """Check that a RaggedDecoder can use the model to decode several sequences of up to `capacity` tokens side by side.

    Raises:
        ValueError: its cache cannot discard a rejected draft; it has a sliding window shorter than the capacity; or its
            logits change when masks and positions are passed explicitly (with ALiBi, for example).
    """
    check_decodes(model)
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


def _refusal(architecture: str) -> str:
    return (
        f"{architecture} cannot be decoded with: it has no cache that can discard a rejected draft, as a recurrent, "
        f"linear-attention or convolution state cannot. As a target it allows respond, cache, finetuning and "
        f"validation's expected block efficiency, but no evaluate, gamma and trim"
    )


@torch.no_grad()
def _rolls_back(model: PreTrainedModel) -> bool:
    """Return whether cached logits equal those without a cache, for one and several tokens and after a rejected draft.

    The tolerance is relative to the change that other tokens at the beginning make: a state that a draft has changed
    is wrong by about as much, whereas rounding (and an expert that it flips) changes few positions, or all by little.
    """
    if context_length(model) < LENGTH:
        return True  # too short to decode anything
    training = model.training
    model.eval()  # dropout would make the logits differ
    tokens = list(islice(cycle(_ordinary_tokens(model)), 2 * LENGTH))
    sequence, others = tokens[:LENGTH], tokens[LENGTH:]
    changed = [*others[:PROMPT_LENGTH], *sequence[PROMPT_LENGTH:]]
    rows = torch.tensor([sequence, changed], device=model.device)
    uncached_TV, changed_TV = model(input_ids=rows, use_cache=False).logits[:, PROMPT_LENGTH:].float()
    cached_TV = _with_rejected_drafts(Decoder(model), sequence, others[:3]).float()
    model.train(training)
    error, control = (_distance(values_TV, uncached_TV) for values_TV in (cached_TV, changed_TV))
    rounding = max(1e-5, 2 * torch.finfo(model.dtype).eps) * _distance(uncached_TV, torch.zeros_like(uncached_TV))
    # Logits that are not a number are reported elsewhere.
    return bool(uncached_TV.isnan().any()) or error <= max(0.1 * control, rounding)


def _with_rejected_drafts(decoder: Decoder, sequence: list[int], drafts: list[int]) -> torch.Tensor:
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


def _ordinary_tokens(model: PreTrainedModel) -> list[int]:
    """Return the first ids of the vocabulary, without the special tokens that the config names."""
    config, rows = model.config.get_text_config(), vocabulary_rows(model)
    named = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    special = {token for one in named for token in (one if isinstance(one, list) else [one])}
    first = range(min(rows, 2 * LENGTH + len(special)))
    return [token for token in first if token not in special] or list(first)


def _distance(values_TV: torch.Tensor, reference_TV: torch.Tensor) -> float:
    """Return the median over positions of the Euclidean distance, where equal infinite logits count as no distance."""
    difference_TV = (values_TV - reference_TV).masked_fill(reference_TV.isinf() & (values_TV == reference_TV), 0)
    return float(difference_TV.norm(dim=-1).median())


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
