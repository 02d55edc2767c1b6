"""A key-value cache of a fixed size for compiled calls, whose attention costs what the tokens in it cost.

transformers' static cache has a compiled call attend to all of its positions, used or not, because a tensor that grows
would have the call compiled again. Here a call attends to the positions in use: their number is the one dynamic size of
a compiled call.

Shapes: B rows, T tokens of a call, C positions in use, G heads of keys and values, D dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from drafter.decoding.grouped_attention import attends_in_groups


class InUse:
    """The number of positions in use, as the length of a tensor: torch.compile takes this for a dynamic size.

    Args:
        capacity: the largest number of positions.
    """

    def __init__(self, capacity: int):
        self._longest_C = torch.empty(capacity)
        self.positions_C = self._longest_C[:0]

    def set(self, length: int) -> None:
        """Set it. Two are the fewest, since torch.compile takes one for a constant; the causal mask hides the other."""
        self.positions_C = self._longest_C[: max(length, 2)]
        torch._dynamo.maybe_mark_dynamic(self.positions_C, 0)


class Layer(StaticLayer):
    """The cache of a layer.

    Args:
        capacity: the number of positions.
        in_use: the number of positions in use, the same object for all layers.
    """

    def __init__(self, capacity: int, in_use: InUse):
        super().__init__(max_cache_len=capacity)
        self.in_use = in_use

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Store keys and values of T tokens, and return those in use, shapes (B, G, C, D)."""
        keys, values = super().update(key_states, value_states)
        used = self.in_use.positions_C.shape[0]
        return keys[:, :, :used], values[:, :, :used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that the mask covers, and the position of the first one."""
        return self.in_use.positions_C.shape[0], 0


class FixedCache(Cache):
    """The cache of a model. Every layer stores the whole sequence: a window that is full could not be rolled back.

    Args:
        layers: the number of layers.
        capacity: the length of the longest sequence, in tokens.
    """

    def __init__(self, layers: int, capacity: int):
        # All positions are never in use, nor is one alone: either would be a case of its own for torch.compile.
        self.in_use = InUse(capacity + 2)
        super().__init__(layers=[Layer(capacity + 2, self.in_use) for _ in range(layers)])

    @contextmanager
    def extended(self, model: PreTrainedModel, count: int) -> Iterator[None]:
        """Let a call of the model with `count` more tokens attend to them and to all before them."""
        self.in_use.set(int(self.layers[0].cumulative_length) + count)
        with attends_in_groups(model):
            yield
