"""An output embedding and a loss, a few hundred positions at a time: logits are never made for a whole batch.

With a vocabulary V of 32,000 and 4,096 positions, logits take 0.5 GB in float32, and a distance between two
distributions with its gradient keeps several tensors of that size. Here the gradient of each chunk is taken as soon as
its values are known, and folded into that of the hidden states and of the embedding: a chunk's logits are all there is.
One mechanism serves every loss; the functions in losses.py stay its reference.

Shapes: N positions of a batch, n of a chunk, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from drafter.losses.distributions import Target
from drafter.losses.objective import Loss, Objective, Positions, objective_of

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


class Predicted(NamedTuple):
    """The N response positions of a batch: the drafter's hidden states and head, the target, and the positions.

    `target` gives the target's logits (n, V) at a slice of the positions, which it may make from hidden states, or its
    sparse distributions.
    """

    hidden_NH: torch.Tensor
    head: Head
    target: Callable[[slice], Target]
    positions: Positions

    def values(self, loss: Loss | Objective, rows: int | None = None) -> torch.Tensor:
        """Return a loss at every position without gradient; shape (N, ...) where it gives (n, ...)."""
        objective = objective_of(loss)
        return chunked_values(self._in_chunk(objective), self.hidden_NH, self.head, objective.lookahead, rows)

    def sum(
        self, loss: Loss | Objective, weights_N: torch.Tensor | None = None, rows: int | None = None
    ) -> torch.Tensor:
        """Return Σ weight · loss over the positions, differentiable in the drafter's hidden states and head."""
        objective = objective_of(loss)
        return chunked_sum(self._in_chunk(objective), self.hidden_NH, self.head, weights_N, objective.lookahead, rows)

    def _in_chunk(self, objective: Objective) -> Evaluate:
        def evaluate(logits_p_nV: torch.Tensor, rows: slice) -> torch.Tensor:
            positions = Positions(self.positions.tokens_N[rows], self.positions.following_N[rows])
            return objective(logits_p_nV, self.target(rows), positions)

        return evaluate


def chunked_values(
    evaluate: Evaluate, hidden_NH: torch.Tensor, head: Head, lookahead: int = 0, rows: int | None = None
) -> torch.Tensor:
    """The values of all positions without gradient, shape (N, ...) as `evaluate` gives them for (n, ...)."""
    with torch.no_grad():
        parts = _parts(len(hidden_NH), head, lookahead, rows)
        return torch.cat([evaluate(head(hidden_NH[seen]), seen)[:own] for seen, own in parts])


def chunked_sum(
    evaluate: Evaluate,
    hidden_NH: torch.Tensor,
    head: Head,
    weights_N: torch.Tensor | None = None,
    lookahead: int = 0,
    rows: int | None = None,
) -> torch.Tensor:
    """Σ weight · value, differentiable in the hidden states and the head.

    Args:
        evaluate: values of a chunk.
        hidden_NH: the drafter's hidden states at the predicted positions.
        head: the drafter's output embedding.
        weights_N: of the positions, without gradient; None: one each.
        lookahead: how many positions past its own a value depends on. A chunk sees as many past its end.
        rows: positions a chunk; by default as many as keep its logits small for the device.
    """
    if not torch.is_grad_enabled():
        values_N = chunked_values(evaluate, hidden_NH, head, lookahead, rows)
        return (values_N if weights_N is None else weights_N * values_N).sum()
    total: torch.Tensor = _ChunkedSum.apply(
        hidden_NH, head.weight_VH, head.bias_V, evaluate, weights_N, lookahead, rows
    )
    return total


class _ChunkedSum(torch.autograd.Function):
    """Gradients are computed in the forward pass, for an upstream gradient of one, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        evaluate: Evaluate,
        weights_N: torch.Tensor | None,
        lookahead: int,
        rows: int | None,
    ) -> torch.Tensor:
        device = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
        hidden, head = hidden_NH.to(dtype), Head(weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden_NH = torch.zeros_like(hidden)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        with torch.autocast(device, enabled=False):
            for seen, own in _parts(len(hidden), head, lookahead, rows):
                logits_nV = head(hidden[seen]).requires_grad_()
                with torch.enable_grad():
                    values_n = evaluate(logits_nV, seen)[:own]
                    value = (values_n if weights_N is None else values_n * weights_N[seen][:own]).sum()
                (grad_nV,) = torch.autograd.grad(value, logits_nV)
                total += value.detach()
                grad_hidden_NH[seen] += grad_nV @ head.weight_VH
                if dtype == wide:
                    grad_weight_VH.addmm_(grad_nV.T, hidden[seen])
                else:
                    grad_weight_VH += grad_nV.T @ hidden[seen]
                if grad_bias_V is not None:
                    grad_bias_V += grad_nV.sum(0)
        ctx.save_for_backward(grad_hidden_NH.to(hidden_NH.dtype), grad_weight_VH.to(weight_VH.dtype), grad_bias_V)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = (None if grad is None else grad * upstream[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def _parts(count: int, head: Head, lookahead: int, rows: int | None) -> Iterator[tuple[slice, int]]:
    """What each chunk sees, and how many of those positions are its own; one empty chunk where there are none."""
    entries = CHUNK_ENTRIES.get(head.weight_VH.device.type, CHUNK_ENTRIES["cuda"])
    rows = rows or max(LEAST_ROWS, entries // len(head.weight_VH))
    for start in range(0, max(count, 1), rows):
        end = min(start + rows, count)
        yield slice(start, min(end + lookahead, count)), end - start
