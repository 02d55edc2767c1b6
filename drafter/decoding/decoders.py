"""A model with its key-value cache, fed a few tokens at a time.

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
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from drafter.models.inspection import body, has_plain_head

# Models, as long as they live -> whether their logits are the output embedding of their last hidden states.
_PLAIN: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


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
            given = masks_and_positions(torch.arange(start, self.length, device=device)[None], self.length)
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
        model: any that works with transformers' static cache.
        capacity: the longest text, in tokens.
        longest: calls of more tokens than this, such as prompts, are not compiled.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, longest: int = 9):
        self.model, self.longest, self.capacity = model, longest, capacity
        self.argument = cache_argument(type(model))
        # Every layer keeps the whole text: one that keeps its window alone cannot roll back once it is full.
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(max_cache_len=capacity) for _ in range(layers)])
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


def masks_and_positions(places_BT: torch.Tensor, end: int) -> dict[str, torch.Tensor]:
    """Each token's position, and a mask by which it sees what lies before it and itself, of `end` places."""
    seen_BTC = torch.arange(end, device=places_BT.device) <= places_BT[..., None]
    return {"attention_mask": seen_BTC[:, None], "position_ids": places_BT}


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
    inner, head = body(model), model.get_output_embeddings()
    argument = cache_argument(type(inner))

    def last(ids_BT: torch.Tensor, cache: Any, keep: int, **given: Any) -> torch.Tensor:
        output = inner(input_ids=ids_BT, use_cache=True, **{argument: cache}, **given)
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
