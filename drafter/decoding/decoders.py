"""A model with its key-value cache, called with a few tokens at a time.

`forward(ids, starts, keep)` places each row's tokens at the positions from its start on, discards what was cached from
there on, and returns the logits of the last `keep` tokens. To undo a rejected draft, pass the earlier start next time.

Shapes: B rows, T tokens of a call, C the cache's capacity in tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from types import FunctionType
from typing import Any, NamedTuple, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch._inductor import config as inductor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from drafter.decoding.fixed_cache import FixedCache
from drafter.decoding.grouped_attention import attends_in_groups
from drafter.models.inspection import body, has_plain_head
from drafter.models.loading import context_length

# Model -> whether its logits are just the output embedding of its last hidden states.
_HAS_PLAIN_HEAD: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


class CachedModel(Protocol):
    """A model with its key-value cache: `Decoder` for one sequence, `batched.RaggedDecoder` for several."""

    model: PreTrainedModel

    def forward(self, ids: list[list[int]], starts: list[int], keep: int) -> torch.Tensor:
        """Return the logits of each row's last `keep` tokens, shape (B, keep, V)."""

    def replace_row(self, row: int, ids: list[int]) -> None:
        """Give a row to another sequence, and cache its first tokens."""

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all other rows."""


class Decoder:
    """One sequence with a cache from transformers, for any model whose cache can be cropped.

    Args:
        model: the model.
        cache: the cache; by default a DynamicCache.
        call: the function that returns the logits (see `logits_of`).
        capacity: the longest sequence that the cache can hold; None for no limit.
        explicit_positions: pass masks and positions to calls of several new tokens, which is faster than to let the
            model compute them.
        widths: see `Padded`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache | None = None,
        call: Callable[..., torch.Tensor] | None = None,
        capacity: int | None = None,
        explicit_positions: bool = False,
        widths: Mapping[int, int] | None = None,
    ):
        self.model, self.capacity, self.explicit_positions = model, capacity, explicit_positions
        self.widths = widths or {}
        self.length = 0
        self.cache = DynamicCache() if cache is None else cache
        self.call = call or logits_of(model)

    def forward(self, ids: list[list[int]], starts: list[int], keep: int) -> torch.Tensor:
        """Return the logits of the last `keep` tokens, shape (1, keep, V).

        Raises:
            ValueError: the sequence is longer than the capacity.
        """
        (start,) = starts
        end = start + len(ids[0])
        if self.capacity is not None and end > self.capacity:
            raise ValueError(f"a sequence of {end} tokens exceeds the compiled decoder's capacity of {self.capacity}")
        if start < self.length:
            self.cache.crop(start - self.length)
        padding = self.widths.get(len(ids[0]), 0) - len(ids[0]) if start else 0
        if padding <= 0 or end + padding > min(self.capacity or end + padding, context_length(self.model)):
            padding = 0
        self.length = end + padding  # the next call begins at `end` at the latest, and discards the padding
        device = self.model.device
        arguments = {}
        if self.explicit_positions and start and self.length - start > 1:
            arguments = masks_and_positions(torch.arange(start, self.length, device=device)[None], self.length)
        padded = torch.tensor([[*ids[0], *ids[0][-1:] * padding]], device=device)
        with attends_in_groups(self.model) if arguments else nullcontext():
            return self.call(padded, self.cache, keep + padding, **arguments)[:, :keep]

    def keep_rows(self, rows: list[int]) -> None:
        """Do nothing: there is only one row."""

    def replace_row(self, row: int, ids: list[int]) -> None:
        """Do nothing: there is only one sequence."""


class Compiled:
    """A model whose short calls are compiled (torch.compile), with a cache of a fixed size, for one sequence at a time.

    It pays where Python overhead dominates a call, as with small models on a CPU. There the weights become constants of
    the compiled calls ("freezing"), so that they are packed for their number of rows, and a call attends to the
    positions in use alone (see `fixed_cache`). The first call with each number of tokens takes seconds to minutes to
    compile; later sequences reuse the compiled calls. `Padded` with `compiled_widths` keeps the number of compilations
    small.

    Args:
        model: a model that works with transformers' static cache.
        capacity: the length of the longest sequence, in tokens.
        longest: calls with more tokens than this, such as prompts, are not compiled.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, longest: int = 9):
        self.model, self.longest, self.capacity = model, longest, capacity
        self.argument = cache_argument(type(model))
        layers = model.config.get_text_config().num_hidden_layers
        # On a GPU, a call with a dynamic size was not tried: it attends to all positions.
        fixed = FixedCache(layers, capacity) if self.device.type == "cpu" else None
        self.cache = fixed or Cache(layers=[StaticLayer(max_cache_len=capacity) for _ in range(layers)])
        self.calls: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @torch.inference_mode()
    def decoder(self, widths: Mapping[int, int] | None = None) -> Decoder:
        """Return a decoder for a new sequence. It shares the cache, so the previous decoder becomes invalid."""
        self.cache.reset()
        return Decoder(self.model, self.cache, self._logits, self.capacity, widths=widths)

    @torch.inference_mode()  # as decoding does: a call that was compiled otherwise would be compiled again
    def compile(self, counts: Iterable[int]) -> None:
        """Compile the calls with these numbers of tokens now, so that no timed decoding waits for it."""
        prompt = min(self.longest + 1, self.capacity)  # is not compiled, and gives the cache its tensors first
        for count in (prompt, *counts):
            self.decoder().forward([[0] * count], [0], 1)

    def _logits(self, ids_BT: torch.Tensor, _: Cache, keep: int) -> torch.Tensor:
        count = ids_BT.shape[1]
        if is_first := count not in self.calls:
            call = self._call()
            self.calls[count] = call if count > self.longest else torch.compile(call, dynamic=False)
        if not isinstance(self.cache, FixedCache):
            return self.calls[count](ids_BT)[:, -keep:]
        # A product of one row in float32 is faster without packed weights (see drafter.models.packing).
        freezes = is_first and not (count == 1 and self.model.dtype == torch.float32)
        # The first call compiles. It finds "freezing" in inductor's settings alone: as an option of torch.compile it
        # comes too late for dynamo, which then passes the weights as arguments.
        with self.cache.extended(self.model, count), inductor.patch(freezing=True) if freezes else nullcontext():
            # The call computes the logits of all tokens, so that one compiled function serves every `keep`.
            return self.calls[count](ids_BT)[:, -keep:]

    def _call(self) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(ids_BT: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=ids_BT, use_cache=True, **{self.argument: self.cache}).logits
            return logits

        # torch.compile caches by code object and tries every entry of it in turn: a copy keeps each list at one entry.
        return FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)


class Padded(NamedTuple):
    """A model whose calls with some numbers of tokens are padded, for one sequence at a time.

    On a CPU, a call with more tokens may take less time: libraries for matrix products have fast ways for some numbers
    of rows alone. What is computed for the padding is discarded. `CallTimings.widths` says which numbers pay.

    Attributes:
        model: the model.
        widths: number of tokens -> number of tokens with padding. Calls with another number, and prompts, have none.
    """

    model: PreTrainedModel | Compiled
    widths: Mapping[int, int]

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device


Decodable: TypeAlias = PreTrainedModel | Compiled | Padded  # what can decode a sequence


def plain_model(model: Decodable) -> PreTrainedModel:
    """Return the model that is compiled or padded."""
    while isinstance(model, Compiled | Padded):
        model = model.model
    return model


def compiled_widths(gammas: Iterable[int]) -> dict[int, int]:
    """Return the padding of calls of which one with a single token and one for each gamma are compiled.

    >>> compiled_widths([2, 4])
    {1: 1, 2: 3, 3: 3, 4: 5, 5: 5}
    """
    widths = sorted({1, *(gamma + 1 for gamma in gammas)})
    return {count: next(width for width in widths if width >= count) for count in range(1, widths[-1] + 1)}


def compiled_model(model: PreTrainedModel, longest: int, widths: Mapping[int, int]) -> Padded:
    """Return a model compiled for sequences of `longest` tokens, whose calls are padded to few numbers of tokens.

    The calls of a block are compiled here, which takes minutes, and not while decoding is timed. Longer calls are not
    compiled: prompts, and what a drafter reads after blocks that it left to another one.
    """
    most = max(widths)
    compiled = Compiled(model, longest + most, most)
    compiled.compile(sorted(set(widths.values())))
    return Padded(compiled, widths)


def aligned_starts(model: CachedModel, sequences: list[list[int]], cached: list[int]) -> list[int]:
    """Return for each row the token from which on the next call reads it, so that all rows read equally many.

    Rows repeat tokens that are cached already. If a row has fewer tokens than another one lacks, as with prompts of
    different lengths, all tokens but the last of each row are cached first, and the next call reads one per row.

    Args:
        model: the model with its cache.
        sequences: the tokens of each row.
        cached: how many of them, from the first on, are cached.
    """
    lengths = [len(tokens) for tokens in sequences]
    missing = max(length - known for length, known in zip(lengths, cached, strict=True))
    if missing > min(lengths):
        width = missing - 1
        starts = [max(length - 1 - width, 0) for length in lengths]
        read = [tokens[start:-1] for tokens, start in zip(sequences, starts, strict=True)]
        model.forward([ids + [0] * (width - len(ids)) for ids in read], starts, 1)
        missing = 1
    return [length - missing for length in lengths]


def masks_and_positions(positions_BT: torch.Tensor, end: int) -> dict[str, torch.Tensor]:
    """Return a model's arguments for tokens at given positions: position ids, and a causal mask over `end` keys."""
    visible_BTC = torch.arange(end, device=positions_BT.device) <= positions_BT[..., None]
    return {"attention_mask": visible_BTC[:, None], "position_ids": positions_BT}


def logits_of(model: PreTrainedModel) -> Callable[..., torch.Tensor]:
    """Return a function of ids, a cache, `keep` and further model arguments that computes the last `keep` logits.

    If the logits are just the output embedding of the last hidden states, it calls the two parts itself: the model's
    own wrapper takes a twentieth of a small model's call.
    """
    if model not in _HAS_PLAIN_HEAD:
        _HAS_PLAIN_HEAD[model] = isinstance(model, PreTrainedModel) and has_plain_head(model)
    if not _HAS_PLAIN_HEAD[model]:
        argument = cache_argument(type(model))

        def call_model(ids_BT: torch.Tensor, cache: Any, keep: int, **arguments: Any) -> torch.Tensor:
            arguments |= {"use_cache": True, "logits_to_keep": keep, argument: cache}
            logits: torch.Tensor = model(input_ids=ids_BT, **arguments).logits
            return logits

        return call_model
    inner, head = body(model), model.get_output_embeddings()
    argument = cache_argument(type(inner))

    def call_parts(ids_BT: torch.Tensor, cache: Any, keep: int, **arguments: Any) -> torch.Tensor:
        output = inner(input_ids=ids_BT, use_cache=True, **{argument: cache}, **arguments)
        logits: torch.Tensor = head(output.last_hidden_state[:, -keep:])
        return logits

    return call_parts


def cache_argument(kind: Any) -> str:
    """Return the name of the cache argument of a class of models.

    transformers 5.24 renamed it to `cache`; earlier versions, and models with custom code, use `past_key_values`.
    """
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"
