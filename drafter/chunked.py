"""An output embedding and a loss, a few hundred positions at a time: logits are never made for a whole batch.

With a vocabulary V of 32,000 and 4,096 positions, logits take 0.5 GB in float32, and a distance between two
distributions with its gradient keeps several tensors of that size. Here the gradient of each chunk is taken as soon as
its values are known, and folded into that of the hidden states and of the embedding: a chunk's logits are all there is.

Shapes: N positions of a batch, n of a chunk, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# (logits_nV, rows) -> values_n: what a loss is at the positions `rows` of the batch.
Evaluate = Callable[[torch.Tensor, slice], torch.Tensor]

CHUNK_ENTRIES = {"cpu": 2**20, "cuda": 2**26}  # logits a chunk; 4 MB stay in a CPU's cache, a GPU wants larger products
LEAST_ROWS = 128  # fewer, and adding to the embedding's gradient costs more than computing it


class Head(NamedTuple):
    """An output embedding: logits = hidden · weightᵀ + bias."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None

    @classmethod
    def of(cls, embedding: nn.Module) -> "Head":
        """The parameters of a model's output embedding."""
        weight: Any = embedding.weight
        return cls(weight, getattr(embedding, "bias", None))

    def __call__(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_NH.to(self.weight_VH.dtype), self.weight_VH, self.bias_V)


def chunked_values(evaluate: Evaluate, hidden_NH: torch.Tensor, head: Head, rows: int | None = None) -> torch.Tensor:
    """The values of all positions without gradient, shape (N, ...) as `evaluate` gives them for (n, ...)."""
    with torch.no_grad():
        values = [evaluate(head(hidden_NH[part]), part) for part in _parts(len(hidden_NH), head, rows)]
    return torch.cat(values)


def chunked_sum(
    evaluate: Evaluate, hidden_NH: torch.Tensor, head: Head, scale: torch.Tensor | float = 1.0, rows: int | None = None
) -> torch.Tensor:
    """scale · Σ values, differentiable in the hidden states and the head.

    Args:
        evaluate: values of a chunk, each of which depends on its own position's logits alone.
        hidden_NH: the drafter's hidden states at the predicted positions.
        head: the drafter's output embedding.
        scale: of the sum; no gradient flows to it.
        rows: positions a chunk; by default as many as keep its logits small for the device.
    """
    if not torch.is_grad_enabled():
        return scale * chunked_values(evaluate, hidden_NH, head, rows).sum()
    return scale * _ChunkedSum.apply(hidden_NH, head.weight_VH, head.bias_V, evaluate, rows)


class _ChunkedSum(torch.autograd.Function):
    """Gradients are computed in the forward pass, for an upstream gradient of one, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        evaluate: Evaluate,
        rows: int | None,
    ) -> torch.Tensor:
        device = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
        hidden, head = hidden_NH.to(dtype), Head(weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden_NH = torch.empty_like(hidden)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        with torch.autocast(device, enabled=False):
            for part in _parts(len(hidden), head, rows):
                logits_nV = head(hidden[part]).requires_grad_()
                with torch.enable_grad():
                    value = evaluate(logits_nV, part).sum()
                (grad_nV,) = torch.autograd.grad(value, logits_nV)
                total += value.detach()
                grad_hidden_NH[part] = grad_nV @ head.weight_VH
                if dtype == wide:
                    grad_weight_VH.addmm_(grad_nV.T, hidden[part])
                else:
                    grad_weight_VH += grad_nV.T @ hidden[part]
                if grad_bias_V is not None:
                    grad_bias_V += grad_nV.sum(0)
        ctx.save_for_backward(grad_hidden_NH.to(hidden_NH.dtype), grad_weight_VH.to(weight_VH.dtype), grad_bias_V)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = (None if grad is None else grad * upstream[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None)


def _parts(count: int, head: Head, rows: int | None) -> Iterator[slice]:
    """Slices that cover `count` positions; one empty slice where there are none."""
    entries = CHUNK_ENTRIES.get(head.weight_VH.device.type, CHUNK_ENTRIES["cuda"])
    rows = rows or max(LEAST_ROWS, entries // len(head.weight_VH))
    return (slice(start, min(start + rows, count)) for start in range(0, max(count, 1), rows))
