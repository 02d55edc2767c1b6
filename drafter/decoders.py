"""A model with its key-value cache, fed a few tokens at a time: one text, or several of different lengths.

`feed(ids, starts, keep)` gives each row's tokens the places from its start on, whatever was cached there before is
forgotten, and returns the logits of the last `keep` of them. So a rejected draft costs nothing but the next start.

Shapes: B rows, T tokens fed, C the cache's capacity in tokens, V vocabulary.
"""

import inspect
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import CacheLayerMixin

from drafter.models import has_plain_head, vocabulary_rows

# Models, as long as they live -> whether their logits are the output embedding of their last hidden states.
_PLAIN: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
# Models, as long as they live -> whether they take masks and positions as they are given.
_TAKES_PLACES: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


class Decoder:
    """One text, with transformers' own cache, masks and positions: any model that can forget its last tokens.

    Args:
        model: the model.
        cache, call: the cache, and what gives the logits (see `logits_of`), where they are not the usual ones.
        capacity: the longest text that the cache can hold; None: any.
        placed: give masks and positions to calls of several new tokens, which is faster than to have them made.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache | None = None,
        call: Callable[..., torch.Tensor] | None = None,
        capacity: int | None = None,
        placed: bool = False,
    ):
        self.model, self.length, self.capacity, self.placed = model, 0, capacity, placed
        self.cache = DynamicCache() if cache is None else cache
        self.call = call or logits_of(model)

    def feed(self, ids: list[list[int]], starts: list[int], keep: int) -> torch.Tensor:
        """The logits of the last `keep` tokens, shape (1, keep, V).

        Raises:
            ValueError: the text is longer than the capacity.
        """
        (start,) = starts
        if self.capacity is not None and start + len(ids[0]) > self.capacity:
            raise ValueError(f"a text of {start + len(ids[0])} tokens exceeds the compiled decoder's {self.capacity}")
        if start < self.length:
            self.cache.crop(start - self.length)
        self.length = start + len(ids[0])
        device = self.model.device
        given = {}
        if self.placed and start and len(ids[0]) > 1:
            given = _given(torch.arange(start, self.length, device=device)[None], self.length)
        return self.call(torch.tensor(ids, device=device), self.cache, keep, **given)

    def select(self, rows: list[int]) -> None:
        """There is one row."""

    def seat(self, row: int, ids: list[int]) -> None:
        """There is one text."""


class Compiled:
    """A model whose calls of a few tokens are compiled (torch.compile), and a cache of a fixed size: a text at a time.

    Where a call costs its Python and not its weights, as with small models on a CPU, this is where the time goes. The
    first call of each number of tokens compiles for some ten seconds; texts go on using what was compiled.

    Args:
        model: any that works with transformers' StaticCache.
        capacity: the longest text, in tokens.
        longest: calls of more tokens than this, such as prompts, are not compiled.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, longest: int = 9):
        self.model, self.longest, self.capacity = model, longest, capacity
        self.argument = cache_argument(type(model))
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        self.calls: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    @torch.inference_mode()
    def decoder(self) -> Decoder:
        """A decoder of a new text; that of the text before it is of no more use."""
        self.cache.reset()
        return Decoder(self.model, self.cache, self._logits, self.capacity)

    def _logits(self, ids_BT: torch.Tensor, _: Cache, keep: int) -> torch.Tensor:
        count = ids_BT.shape[1]
        if count not in self.calls:
            self.calls[count] = self._call() if count > self.longest else torch.compile(self._call(), dynamic=False)
        # All logits are made, so that one compiled call serves every `keep`.
        return self.calls[count](ids_BT)[:, -keep:]

    def _call(self) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(ids_BT: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=ids_BT, use_cache=True, **{self.argument: self.cache}).logits
            return logits

        # A code object of its own: what was compiled for others under the same one would be tried first, each time.
        return FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)


class _RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer in tensors of a fixed size, written at each row's own places."""

    def __init__(self, places: "_Places"):
        super().__init__()
        self.places = places

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for the capacity."""
        shapes = [(*states.shape[:2], self.places.capacity, states.shape[3]) for states in (key_states, value_states)]
        self.keys, self.values = (key_states.new_zeros(shape) for shape in shapes)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new ones; return all up to the longest row's end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_B1, places_BT, end = self.places.rows_B1, self.places.places_BT, self.places.end
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            stored[rows_B1, :, places_BT] = states.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not asked for: the mask is given."""
        return self.places.end, 0

    def get_seq_length(self) -> int:
        """The longest row's length before this call."""
        return self.places.end - self.places.places_BT.shape[1]

    def get_max_length(self) -> int:
        """The capacity."""
        return self.places.capacity


class _Places:
    """Where each row's next tokens go; shared by the layers of one cache."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.rows_B1 = self.places_BT = torch.empty(0)
        self.end = 0

    def set(self, starts: list[int], count: int, device: torch.device) -> None:
        """The next call writes `count` tokens a row, from its start on."""
        self.rows_B1 = torch.arange(len(starts), device=device)[:, None]
        self.places_BT = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        self.end = max(starts) + count


class RaggedDecoder:
    """Several texts of different lengths in one batch, each advancing on its own.

    Masks and positions are given to the model outright, so that it needs to know nothing of the rows' lengths;
    `check_side_by_side` says whether it takes them.
    """

    def __init__(self, model: PreTrainedModel, capacity: int):
        self.model, self.places = model, _Places(capacity)
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[_RaggedLayer(self.places) for _ in range(layers)])
        self.call = logits_of(model)

    def feed(self, ids: list[list[int]], starts: list[int], keep: int) -> torch.Tensor:
        """The logits of each row's last `keep` tokens, shape (B, keep, V); as many tokens are fed to each row."""
        device, count = self.model.device, len(ids[0])
        self.places.set(starts, count, device)
        given = _given(self.places.places_BT, self.places.end)
        return self.call(torch.tensor(ids, device=device), self.cache, keep, **given)

    def seat(self, row: int, ids: list[int]) -> None:
        """Give a row to another text, and read its first tokens."""
        if ids:
            alone = Decoder(self.model)
            alone.feed([ids], [0], 1)
            for layer, read in zip(self.cache.layers, alone.cache.layers, strict=True):
                for stored, states in ((layer.keys, read.keys), (layer.values, read.values)):
                    stored[row, :, : len(ids)] = states[0]

    def select(self, rows: list[int]) -> None:
        """Keep these rows alone."""
        kept = torch.tensor(rows, device=self.model.device)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]


def _given(places_BT: torch.Tensor, end: int) -> dict[str, torch.Tensor]:
    """Each token's position, and a mask by which it sees what lies before it and itself, of `end` places."""
    seen_BTC = torch.arange(end, device=places_BT.device) <= places_BT[..., None]
    return {"attention_mask": seen_BTC[:, None], "position_ids": places_BT}


def check_side_by_side(model: PreTrainedModel, capacity: int) -> None:
    """Refuse a model whose texts of up to `capacity` tokens a RaggedDecoder cannot hold.

    Raises:
        ValueError: it attends to a window of its own, shorter than the capacity; or it makes something else of given
            masks and positions than of its own (ALiBi, for one).
    """
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


def decoder_of(model: PreTrainedModel | Compiled) -> Decoder:
    """A decoder of one new text."""
    if isinstance(model, Compiled):
        return model.decoder()
    return Decoder(model, placed=_takes_places(model) and _window(model) is None)


def logits_of(model: PreTrainedModel) -> Callable[..., torch.Tensor]:
    """A function of ids, a cache, how many last places are wanted, and other arguments that gives their logits.

    Where they are the output embedding of the last hidden states, it asks for those: of a small model's call, a
    twentieth is spent on the way around.
    """
    if model not in _PLAIN:
        _PLAIN[model] = isinstance(model, PreTrainedModel) and has_plain_head(model)
    if not _PLAIN[model]:
        argument = cache_argument(type(model))

        def whole(ids_BT: torch.Tensor, cache: Any, keep: int, **given: Any) -> torch.Tensor:
            given |= {"use_cache": True, "logits_to_keep": keep, argument: cache}
            logits: torch.Tensor = model(input_ids=ids_BT, **given).logits
            return logits

        return whole
    body, head = model.base_model, model.get_output_embeddings()
    inner = cache_argument(type(body))

    def last(ids_BT: torch.Tensor, cache: Any, keep: int, **given: Any) -> torch.Tensor:
        output = body(input_ids=ids_BT, use_cache=True, **{inner: cache}, **given)
        logits: torch.Tensor = head(output.last_hidden_state[:, -keep:])
        return logits

    return last


def now(device: torch.device) -> float:
    """Wall-clock seconds, once what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cache_argument(kind: Any) -> str:
    """The name that a class of models has for its cache.

    transformers 5.24 renamed the argument; earlier ones, and models with code of their own, keep the old name.
    """
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"
