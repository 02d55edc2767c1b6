"""What a model can do, found out by trying it, not assumed from its name: rollback, tokens side by side.

`decoder_of` is how speculative decoding and its baseline take a model into use. A model whose cache cannot return to
what it was before a rejected draft would give a wrong text without an error, so that each is tried once, on a few
tokens. `check_can_decode` tells most of that from the config alone, before anything computes.

Shapes: T tokens, V vocabulary.
"""

from itertools import cycle, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from drafter.decoding.batched import RaggedDecoder
from drafter.decoding.decoders import Compiled, Decoder
from drafter.models.inspection import vocabulary_rows
from drafter.models.loading import context_length

# Models, as long as they live -> whether their cache forgets a rejected draft.
_ROLLS_BACK: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
# Models, as long as they live -> whether they take masks and positions as they are given.
_TAKES_PLACES: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
# A text that is tried has so many tokens, of which the prompt has so many.
COUNT, PROMPT = 10, 4
# Kinds of layers, as transformers tells them from a config, whose keys and values a Decoder keeps whole and can cut.
CAN_ROLL_BACK = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
# What a call raises that a model or its cache is not made for.
NOT_MADE_FOR = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)


def decoder_of(model: PreTrainedModel | Compiled) -> Decoder:
    """A decoder of one new text.

    Raises:
        ValueError: the model's cache cannot forget a rejected draft (see `check_decodes`).
    """
    check_decodes(model.model if isinstance(model, Compiled) else model)
    if isinstance(model, Compiled):
        return model.decoder()
    return Decoder(model, placed=_takes_places(model) and _window(model) is None)


def check_decodes(model: Any) -> None:
    """Refuse a model whose cached logits, behind a rejected draft, are not those of a forward without a cache.

    Each model is tried once, on ten tokens. What is no PreTrainedModel is taken at its word.

    Raises:
        ValueError: names the architecture, and says what works with it.
    """
    problem: Exception | None = None
    if model not in _ROLLS_BACK:
        try:
            _ROLLS_BACK[model] = not isinstance(model, PreTrainedModel) or _rolls_back(model)
        except torch.OutOfMemoryError:
            raise
        except NOT_MADE_FOR as raised:
            _ROLLS_BACK[model], problem = False, raised
    if not _ROLLS_BACK[model]:
        raise ValueError(_refusal(type(model).__name__)) from problem


def check_can_decode(config: Any) -> None:
    """Refuse an architecture that `check_decodes` would refuse, as far as its config tells: nothing is loaded.

    Layers of another kind than attention (recurrent, linear-attention, convolution) keep a state, which a rejected
    draft changes for good. Where a config does not name its layers' kinds, its class says whether there is a state.

    Raises:
        ValueError: names the architecture, and says what works with it.
    """
    text = config.get_text_config(decoder=True)
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if getattr(text, "layer_types", None) is None:
        decodes = not getattr(kind, "_is_stateful", False)
    else:
        try:
            decodes = {type(layer) for layer in DynamicCache(config=text).layers} <= CAN_ROLL_BACK
        except NOT_MADE_FOR:
            decodes = True  # code of its own, perhaps: it is tried once its weights are there
    if not decodes:
        raise ValueError(_refusal(kind.__name__ if kind else config.model_type))


def check_side_by_side(model: PreTrainedModel, capacity: int) -> None:
    """Refuse a model whose texts of up to `capacity` tokens a RaggedDecoder cannot hold.

    Raises:
        ValueError: its cache cannot forget a rejected draft; it attends to a window of its own, shorter than the
            capacity; or it makes something else of given masks and positions than of its own (ALiBi, for one).
    """
    check_decodes(model)
    if not _takes_places(model):
        raise ValueError(
            f"{type(model).__name__} does not take masks and positions as they are given: decode its texts one at a "
            f"time"
        )
    window = _window(model)
    if window and window < capacity:
        raise ValueError(
            f"{type(model).__name__} attends to its last {window} tokens in some layers, and these texts may have "
            f"{capacity}: decode them one at a time"
        )


def _refusal(architecture: str) -> str:
    return (
        f"{architecture} cannot be decoded with: it has no cache that forgets a rejected draft, as a recurrent, "
        f"linear-attention or convolution state does not, and with it as the target there are responses, cache, "
        f"finetuning and validation's expected block efficiency, but no evaluate, gamma and trim"
    )


@torch.no_grad()
def _rolls_back(model: PreTrainedModel) -> bool:
    """Whether cached logits, one token and several at a time and behind a rejected draft, are the uncached ones.

    How near they have to be is measured by what other tokens at the beginning would change: a state that a draft has
    spoilt is wrong by as much, while rounding (and an expert that it flips) moves few positions, or all by little.
    """
    if context_length(model) < COUNT:
        return True  # nothing can be decoded with it
    training = model.training
    model.eval()  # dropout would make the two differ
    tokens = list(islice(cycle(_ordinary_tokens(model)), 2 * COUNT))
    text, others = tokens[:COUNT], tokens[COUNT:]
    rows = torch.tensor([text, [*others[:PROMPT], *text[PROMPT:]]], device=model.device)
    right_TV, changed_TV = model(input_ids=rows, use_cache=False).logits[:, PROMPT:].float()
    cached_TV = _with_rejected_drafts(Decoder(model), text, others[:3]).float()
    model.train(training)
    error, control = (_distance(values_TV, right_TV) for values_TV in (cached_TV, changed_TV))
    rounding = max(1e-5, 2 * torch.finfo(model.dtype).eps) * _distance(right_TV, torch.zeros_like(right_TV))
    # Logits that are not a number are somebody else's to report.
    return bool(right_TV.isnan().any()) or error <= max(0.1 * control, rounding)


def _with_rejected_drafts(decoder: Decoder, text: list[int], drafts: list[int]) -> torch.Tensor:
    """Logits at the positions of a text behind its prompt, shape (T, V): a block with a rejected draft, then one token,
    then the others at once, with a rejected draft behind them, and the last of them once more.
    """
    decoder.feed([text[:PROMPT]], [0], 1)
    block_TV = decoder.feed([[text[PROMPT], *drafts]], [PROMPT], len(drafts) + 1)[0, :1]
    one_TV = decoder.feed([text[PROMPT + 1 : PROMPT + 2]], [PROMPT + 1], 1)[0]
    rest = text[PROMPT + 2 :]
    several_TV = decoder.feed([rest], [PROMPT + 2], len(rest))[0]
    return torch.cat([block_TV, one_TV, several_TV])


def _ordinary_tokens(model: PreTrainedModel) -> list[int]:
    """The first ids of a vocabulary, but for the special ones that the config names."""
    config, rows = model.config.get_text_config(), vocabulary_rows(model)
    named = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    special = {token for one in named for token in (one if isinstance(one, list) else [one])}
    first = range(min(rows, 2 * COUNT + len(special)))
    return [token for token in first if token not in special] or list(first)


def _distance(values_TV: torch.Tensor, reference_TV: torch.Tensor) -> float:
    """The median over the positions of the Euclidean distance, of the tokens that the reference does not rule out."""
    difference_TV = (values_TV - reference_TV).masked_fill(reference_TV.isinf() & (values_TV == reference_TV), 0)
    return float(difference_TV.norm(dim=-1).median())


def _window(model: PreTrainedModel) -> int | None:
    """How many tokens the layers that see fewest attend to; None: all."""
    config = model.config.get_text_config()
    windows = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((window for window in windows if window), default=None)


def _takes_places(model: Any) -> bool:
    if model not in _TAKES_PLACES:
        _TAKES_PLACES[model] = isinstance(model, PreTrainedModel) and _agrees_with_itself(model)
    return _TAKES_PLACES[model]


@torch.inference_mode()
def _agrees_with_itself(model: PreTrainedModel) -> bool:
    """Whether two texts side by side, one of them shorter, get the logits that each gets alone."""
    vocabulary = vocabulary_rows(model)
    texts, last = [[token % vocabulary for token in text] for text in ([1, 2, 3, 4], [3, 1, 2])], [5 % vocabulary, 0]
    together = RaggedDecoder(model, 8)
    try:
        together.feed([[*text, 0][:4] for text in texts], [0, 0], 1)
        ours = together.feed([last, last], [len(text) for text in texts], 2)
    except (TypeError, ValueError, RuntimeError):
        return False  # it has no such arguments, or other shapes in mind
    theirs = torch.cat([Decoder(model).feed([[*text, *last]], [0], 2) for text in texts])
    return torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))
