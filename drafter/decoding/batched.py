"""Several texts of different lengths in one batch, with one key-value cache: a decoder as those of `decoders` are.

Shapes: B rows, T tokens fed, C the cache's capacity in tokens, V vocabulary.
"""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from drafter.decoding.decoders import Decoder, logits_of, masks_and_positions


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
    `capabilities.check_side_by_side` says whether it takes them.
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
        given = masks_and_positions(self.places.places_BT, self.places.end)
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
