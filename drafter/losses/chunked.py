"""Output embedding and loss computed in chunks of positions, so that the logits of a full batch never exist.

With a vocabulary V of 32,000 and 4,096 positions, logits take 0.5 GB in float32, and a divergence with its gradient
keeps several tensors of that size. Here the gradient of each chunk is computed together with its values and added to
the gradients of the hidden states and of the output embedding, so that only one chunk's logits exist at a time. The
same code serves every loss, and the plain functions in `divergences` and `block_losses` are its reference.

A chunk also contains the `lookahead` positions after its end, whose values are discarded: a loss that depends on
following positions has the same value wherever a chunk ends.

Shapes: N positions of a batch, n of a chunk, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from drafter.losses.distributions import Target
from drafter.losses.objective import Loss, Objective, Positions, objective_of
from drafter.losses.trimmed import Kept

# (logits_nV, rows) -> values_n: a loss at the positions `rows` of the batch.
Evaluate = Callable[[torch.Tensor, slice], torch.Tensor]

CHUNK_ENTRIES = {"cpu": 2**20, "cuda": 2**26}  # logits per chunk: 4 MB fit a CPU's cache; a GPU needs larger products
LEAST_ROWS = 128  # with fewer, adding to the embedding's gradient takes longer than computing it


class Head(NamedTuple):
    """An output embedding: logits = hidden · weightᵀ + bias."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None

    @classmethod
    def from_module(cls, embedding: nn.Module, kept: Kept | None = None) -> "Head":
        """Return the parameters of a model's output embedding, or those of `kept.rows` alone."""
        weight: Any = embedding.weight
        bias = getattr(embedding, "bias", None)
        if kept is None:
            return cls(weight, bias)
        # index_select, because on a CPU its gradient is several times faster than that of indexing
        rows = kept.rows
        return cls(weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows))

    def precise(self) -> "Head":
        """Return the same in float32, or in float64 if it is in that, complete even if each rank has a part."""
        dtype = torch.promote_types(self.weight_VH.dtype, torch.float32)
        full = [part.full_tensor() if isinstance(part, DTensor) else part for part in self if part is not None]
        return Head(*[part.to(dtype) for part in full])

    def __call__(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_NH.to(self.weight_VH.dtype), self.weight_VH, self.bias_V)


class Predicted(NamedTuple):
    """The N response positions of a batch, with everything that a loss needs there.

    Attributes:
        hidden_NH: the drafter's last hidden states.
        head: the drafter's output embedding.
        target: slice of the positions -> the target's logits (n, V) or its sparse distributions there. It may compute
            the logits from hidden states, so that only one chunk of them exists at a time.
        positions: the response's tokens, and the number of positions that follow.
        kept: the tokens to which `head` and `target` are restricted; None: all tokens.
    """

    hidden_NH: torch.Tensor
    head: Head
    target: Callable[[slice], Target]
    positions: Positions
    kept: Kept | None = None

    def values(self, loss: Loss | Objective, rows: int | None = None) -> torch.Tensor:
        """Return a loss at every position, without gradient, shape (N, ...) where the loss returns (n, ...).

        Raises:
            ValueError: the loss has a `batch_mean` that is not filled in.
        """
        objective = _require_mean(objective_of(loss))
        rows = rows or self.chunk_rows()
        return chunked_values(self._in_chunk(objective), self.hidden_NH, self.head, objective.lookahead, rows)

    def sum(
        self, loss: Loss | Objective, weights_N: torch.Tensor | None = None, rows: int | None = None
    ) -> torch.Tensor:
        """Return Σ weight · loss over the positions, differentiable in the drafter's hidden states and head.

        Raises:
            ValueError: the loss has a `batch_mean` that is not filled in.
        """
        objective = _require_mean(objective_of(loss))
        rows = rows or self.chunk_rows()
        return chunked_sum(self._in_chunk(objective), self.hidden_NH, self.head, weights_N, objective.lookahead, rows)

    def chunk_rows(self) -> int | None:
        """Return the positions per chunk if the target has more logits than the drafter, else None: the default."""
        return None if self.kept is None else chunk_rows(self.hidden_NH.device, len(self.kept.place_V))

    def _in_chunk(self, objective: Objective) -> Evaluate:
        def evaluate(logits_p_nV: torch.Tensor, rows: slice) -> torch.Tensor:
            positions = Positions(self.positions.tokens_N[rows], self.positions.following_N[rows])
            return objective(logits_p_nV, self.target(rows), positions)

        return evaluate


def chunked_values(
    evaluate: Evaluate, hidden_NH: torch.Tensor, head: Head, lookahead: int = 0, rows: int | None = None
) -> torch.Tensor:
    """Return the values at all positions, without gradient, shape (N, ...) where `evaluate` returns (n, ...)."""
    with torch.no_grad():
        chunks = _chunks(len(hidden_NH), head, lookahead, rows)
        return torch.cat([evaluate(head(hidden_NH[extended]), extended)[:count] for extended, count in chunks])


def chunked_sum(
    evaluate: Evaluate,
    hidden_NH: torch.Tensor,
    head: Head,
    weights_N: torch.Tensor | None = None,
    lookahead: int = 0,
    rows: int | None = None,
) -> torch.Tensor:
    """Return Σ weight · value, differentiable in the hidden states and the head.

    Args:
        evaluate: computes the values of a chunk.
        hidden_NH: the drafter's hidden states at the predicted positions.
        head: the drafter's output embedding.
        weights_N: the weights of the positions, without gradient. None means one for each.
        lookahead: the number of following positions that a value depends on.
        rows: positions per chunk. By default, the number of logits per chunk suits the device.
    """
    if not torch.is_grad_enabled():
        values_N = chunked_values(evaluate, hidden_NH, head, lookahead, rows)
        return (values_N if weights_N is None else weights_N * values_N).sum()
    total: torch.Tensor = _ChunkedSum.apply(
        hidden_NH, head.weight_VH, head.bias_V, evaluate, weights_N, lookahead, rows
    )
    return total


class _ChunkedSum(torch.autograd.Function):
    """Compute the gradients in the forward pass, for an upstream gradient of 1; scale them in the backward pass."""

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
            for extended, count in _chunks(len(hidden), head, lookahead, rows):
                logits_nV = head(hidden[extended]).requires_grad_()
                with torch.enable_grad():
                    values_n = evaluate(logits_nV, extended)[:count]
                    value = (values_n if weights_N is None else values_n * weights_N[extended][:count]).sum()
                (grad_nV,) = torch.autograd.grad(value, logits_nV)
                total += value.detach()
                grad_hidden_NH[extended] += grad_nV @ head.weight_VH
                if dtype == wide:
                    grad_weight_VH.addmm_(grad_nV.T, hidden[extended])
                else:
                    grad_weight_VH += grad_nV.T @ hidden[extended]
                if grad_bias_V is not None:
                    grad_bias_V += grad_nV.sum(0)
        ctx.save_for_backward(grad_hidden_NH.to(hidden_NH.dtype), grad_weight_VH.to(weight_VH.dtype), grad_bias_V)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = (None if grad is None else grad * upstream[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def _require_mean(objective: Objective) -> Objective:
    """Return the objective if it can be computed in chunks.

    Raises:
        ValueError: it has a `batch_mean` that is not filled in: each chunk would use its own mean instead.
    """
    if objective.batch_mean is not None:
        raise ValueError(
            "the loss needs a mean over the full batch, which a chunk of positions does not have: compute it with "
            "predicted.values(objective.batch_mean).mean(), over all ranks, and pass objective.with_mean(mean)"
        )
    return objective


def _chunks(count: int, head: Head, lookahead: int, rows: int | None) -> Iterator[tuple[slice, int]]:
    """Yield each chunk extended by the lookahead, and its number of positions without it.

    Where there are no positions, there is one empty chunk.
    """
    rows = rows or chunk_rows(head.weight_VH.device, len(head.weight_VH))
    for start in range(0, max(count, 1), rows):
        end = min(start + rows, count)
        yield slice(start, min(end + lookahead, count)), end - start


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """Return the number of positions per chunk that suits a device, with logits over so many tokens."""
    return max(LEAST_ROWS, CHUNK_ENTRIES.get(device.type, CHUNK_ENTRIES["cuda"]) // vocabulary)
