"""A key-value cache of a fixed size for compiled calls, whose attention costs what the tokens in it cost.

transformers' static cache has a compiled call attend to all of its positions, used or not, because a tensor that grows
would have the call compiled again. Here a call attends to the positions in use: their number is the one dynamic size of
a compiled call.

Several query heads may share a head of keys and values (grouped-query attention). PyTorch's attention with a mask then
wants a copy of the keys and values for each query head. `grouped_attention` has none: the queries that share a head are
further queries of this head.

Shapes: B rows, T tokens of a call, C positions in use, H query heads, G heads of keys and values, D dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "drafter_grouped"  # the name of `grouped_attention` among transformers' implementations


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
        config = model.config.get_text_config()
        before = config._attn_implementation
        config._attn_implementation = GROUPED if before == "sdpa" else before
        try:
            yield
        finally:
            config._attn_implementation = before


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers' `sdpa` returns, shape (B, T, H, D), without copies of keys and values.

    Args:
        module: the attention layer.
        query: shape (B, H, T, D).
        key: shape (B, G, C, D).
        value: shape (B, G, C, D).
        attention_mask: shape (B, 1, T, C); None where `sdpa` needs none.
        scaling: the factor of the products.
        settings: further ones of `sdpa`.
    """
    (rows, heads, tokens, size), groups = query.shape, key.shape[1]
    plain = settings.get("position_bias") is None and settings.get("softcap") is None
    if attention_mask is None or attention_mask.shape[1] != 1 or heads == groups or not plain:
        settings |= {"scaling": scaling}
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return found
    shared = heads // groups
    mask_BGTC = attention_mask.expand(rows, shared, tokens, -1).reshape(rows, 1, shared * tokens, -1)
    together = query.reshape(rows, groups, shared * tokens, size)
    attended = F.scaled_dot_product_attention(together, key, value, attn_mask=mask_BGTC, scale=scaling)
    return attended.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
