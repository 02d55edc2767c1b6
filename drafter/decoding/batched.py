"""A decoder for several sequences of different lengths in one batch, with one key-value cache.

`side_by_side.generate` uses it for responses, and `speculative.speculative_decode_batch` for several users, or for the
prompts of an evaluation without token rates. With token rates, evaluation decodes one sequence at a time, as the paper
does: the rate is then that of a single user. `capabilities` also uses the decoder, to find out whether a model accepts
explicit masks and positions.

Shapes: B rows, T tokens of a call, C the cache's capacity in tokens, V vocabulary.
"""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from drafter.decoding.decoders import Decoder, logits_of, masks_and_positions
from drafter.models.loading import context_length


class _RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer in tensors of a fixed size, written at positions that differ by row."""

    def __init__(self, positions: "_Positions"):
        super().__init__()
        self.positions = positions

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the tensors."""
        capacity = self.positions.capacity
        shapes = [(*states.shape[:2], capacity, states.shape[3]) for states in (key_states, value_states)]
        self.keys, self.values = (key_states.new_zeros(shape) for shape in shapes)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values, and return all up to the end of the longest row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_B1, positions_BT, end = self.positions.rows_B1, self.positions.positions_BT, self.positions.end
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            stored[rows_B1, :, positions_BT] = states.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys and their offset. Models do not use it, as they receive a mask."""
        return self.positions.end, 0

    def get_seq_length(self) -> int:
        """Return the length of the longest row before this call."""
        return self.positions.end - self.positions.positions_BT.shape[1]

    def get_max_length(self) -> int:
        """Return the capacity."""
        return self.positions.capacity


class _Positions:
    """The positions of each row's tokens in the current call; the layers of one cache share them."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.rows_B1 = self.positions_BT = torch.empty(0)
        self.end = 0

    def set(self, starts: list[int], count: int, device: torch.device) -> None:
        """Prepare a call that writes `count` tokens per row, from each row's start on."""
        self.rows_B1 = torch.arange(len(starts), device=device)[:, None]
        self.positions_BT = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        self.end = max(starts) + count


class RaggedDecoder:
    """Several sequences of different lengths in one batch, each of which advances at its own rate.

    The model receives explicit masks and positions; `capabilities.check_side_by_side` tells whether it accepts them.

    Args:
        model: the model.
        capacity: the length of the longest sequence, in tokens.
    """

    def __init__(self, model: PreTrainedModel, capacity: int):
        self.model, self.positions, self.number = model, _Positions(capacity), 0
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[_RaggedLayer(self.positions) for _ in range(layers)])
        self.call = logits_of(model)

    def forward(self, ids: list[list[int]], starts: list[int], keep: int) -> torch.Tensor:
        """Return the logits of each row's last `keep` tokens, shape (B, keep, V). Rows have equally many tokens."""
        device, count = self.model.device, len(ids[0])
        self.positions.set(starts, count, device)
        arguments = masks_and_positions(self.positions.positions_BT, self.positions.end)
        # Drafts beyond the end of a row, whose result is not used, may exceed the context while other rows go on.
        arguments["position_ids"] = arguments["position_ids"].clamp_max(context_length(self.model) - 1)
        return self.call(torch.tensor(ids, device=device), self.cache, keep, **arguments)

    def replace_row(self, row: int, ids: list[int]) -> None:
        """Give a row to another sequence, and cache its first tokens."""
        if ids:
            single = Decoder(self.model)
            single.forward([ids], [0], 1)
            self._store([row], single.cache, [0])

    def replace_rows(self, rows: list[int], sequences: list[list[int]]) -> None:
        """Give rows to other sequences, and cache their tokens.

        The tokens that all sequences begin with, as the system message of chat prompts, are computed once, and so are
        equal sequences.
        """
        distinct = {tuple(ids): number for number, ids in enumerate(dict.fromkeys(map(tuple, sequences)))}
        width = max(map(len, distinct), default=0)
        if not width:
            return
        # Where the first and the last in alphabetical order agree, all others do.
        first, last = min(distinct), max(distinct)
        shared = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        together = RaggedDecoder(self.model, width)
        if shared:
            together.forward([list(first[:shared])], [0], 1)
            together.keep_rows([0] * len(distinct))
        if shared < width:
            rest = [[*ids[shared:], *[0] * (width - len(ids))] for ids in distinct]
            together.forward(rest, [shared] * len(distinct), 1)
        self._store(rows, together.cache, [distinct[tuple(ids)] for ids in sequences])

    def _store(self, rows: list[int], cache: Cache, sources: list[int]) -> None:
        """Copy the rows `sources` of another cache to the rows `rows` of this one."""
        device = self.model.device
        to, of = torch.tensor(rows, device=device), torch.tensor(sources, device=device)
        for layer, source in zip(self.cache.layers, cache.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(
                    *(states[:1].expand(self.number, -1, -1, -1) for states in (source.keys, source.values))
                )
            for stored, states in ((layer.keys, source.keys), (layer.values, source.values)):
                stored[to, :, : states.shape[2]] = states[of]

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all other rows. A row that is given several times is copied."""
        kept = torch.tensor(rows, device=self.model.device)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]

    def resize(self, rows: list[int], number: int, capacity: int) -> None:
        """Keep the rows `rows` as the first of `number` rows, with room for `capacity` tokens each."""
        kept, shared = (
            torch.tensor(rows, dtype=torch.long, device=self.model.device),
            min(capacity, self.positions.capacity),
        )
        self.positions.capacity, self.number = capacity, number
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (
                    _resized(states, kept, shared, number, capacity) for states in (layer.keys, layer.values)
                )


def _resized(states: torch.Tensor, kept: torch.Tensor, shared: int, number: int, capacity: int) -> torch.Tensor:
    made = states.new_zeros((number, states.shape[1], capacity, states.shape[3]))
    made[: len(kept), :, :shared] = states[kept, :, :shared]
    return made
