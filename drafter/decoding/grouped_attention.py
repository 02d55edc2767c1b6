"""Attention of grouped queries without copies of keys and values, for calls with several tokens on a CPU.

Several query heads may share a head of keys and values (grouped-query attention). PyTorch's attention with a mask then
wants a copy of the keys and values for each query head, whose time grows with the length of the sequence. Here there is
none: the queries that share a head are further queries of this head.

Shapes: B rows, T tokens of a call, C keys, H query heads, G heads of keys and values, D dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "drafter_grouped"  # the name of `grouped_attention` among transformers' implementations


@contextmanager
def attends_in_groups(model: PreTrainedModel) -> Iterator[None]:
    """Let calls of a model whose attention is `sdpa` compute `grouped_attention`. On a GPU, nothing changes."""
    config = model.config.get_text_config()
    before = getattr(config, "_attn_implementation", None)
    if before != "sdpa" or model.device.type != "cpu":
        yield
        return
    config._attn_implementation = GROUPED
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
