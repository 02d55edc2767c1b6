"""What a loss compares: the drafter's and the target's log-probabilities, over the vocabulary or over a sample of it.

Shapes: N positions, V vocabulary, K tokens of a sparse target, S samples a position.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from drafter.warping import in_nucleus


class Sparse(NamedTuple):
    """A target's distribution by K tokens a position: its most likely ones, samples from the rest, and its own.

    A sum over the vocabulary is estimated without bias by sum_K weight · value: the weight is 1 for the top-k tokens,
    rest / (S q(x)) for each of S samples, the rest being the mass outside the top-k, and 0 for the last token, the one
    that the target wrote. `log_q_NK` are log-probabilities at temperature 1; the first token is the most likely one.
    """

    ids_NK: torch.Tensor
    log_q_NK: torch.Tensor
    weight_NK: torch.Tensor

    def __getitem__(self, rows: slice) -> "Sparse":  # type: ignore[override]
        """The positions of a slice."""
        return Sparse(self.ids_NK[rows], self.log_q_NK[rows], self.weight_NK[rows])


class Drawn(NamedTuple):
    """What a `Sparse` is made of, and a cache keeps: its tokens, and the log of the mass outside the `top_k` first."""

    ids_NK: torch.Tensor
    log_q_NK: torch.Tensor
    log_rest_N: torch.Tensor
    top_k: int

    @classmethod
    def of(cls, logits_NV: torch.Tensor, tokens_N: torch.Tensor, top_k: int, num_samples: int) -> "Drawn":
        """The top_k most likely tokens, `num_samples` draws from the others, and `tokens_N`.

        The draws are systematic: one at random in each of as many equal parts of the others' mass. Each is a draw from
        them all, so that nothing is biased, and a likely token is drawn as often as it should be, not by chance.
        """
        log_q_NV = F.log_softmax(_wide(logits_NV), dim=-1)
        top_NK = log_q_NV.topk(top_k, dim=-1).indices
        others_NV = log_q_NV.exp().scatter(-1, top_NK, 0.0)
        rest_N1 = others_NV.sum(-1, keepdim=True)
        offset_N1 = torch.rand(rest_N1.shape, device=rest_N1.device, dtype=rest_N1.dtype)
        place_NS = (torch.arange(num_samples, device=rest_N1.device) + offset_N1) / num_samples
        cumulative_NV = others_NV.cumsum(-1)
        drawn_NS = torch.searchsorted(cumulative_NV, place_NS * cumulative_NV[:, -1:], right=True)
        # Rounding may reach past the last token that has any mass; where none has, any token will do: it weighs zero.
        last_N1 = cumulative_NV.argmax(-1, keepdim=True)
        drawn_NS = torch.minimum(drawn_NS, last_N1)
        ids_NK = torch.cat([top_NK, drawn_NS, tokens_N[:, None]], -1)
        return cls(ids_NK, log_q_NV.gather(-1, ids_NK), rest_N1[:, 0].log(), top_k)

    @classmethod
    def cat(cls, parts: "list[Drawn]") -> "Drawn":
        """The positions of all parts, one after the other."""
        ids_NK, log_q_NK, log_rest_N = (torch.cat(field) for field in list(zip(*parts, strict=True))[:3])
        return cls(ids_NK, log_q_NK, log_rest_N, parts[0].top_k)

    def weighted(self) -> Sparse:
        """With each token's weight."""
        log_q_NK, log_rest_N = _wide(self.log_q_NK), _wide(self.log_rest_N)
        log_drawn_NS = log_q_NK[:, self.top_k : -1]
        log_share_N1 = log_rest_N[:, None] - math.log(log_drawn_NS.shape[-1])
        weight_NS = torch.where(log_share_N1 > -math.inf, (log_share_N1 - log_drawn_NS).exp(), 0.0)
        top_NK = torch.ones_like(log_q_NK[:, : self.top_k])
        return Sparse(self.ids_NK, log_q_NK, torch.cat([top_NK, weight_NS, torch.zeros_like(log_share_N1)], -1))


Target = torch.Tensor | Sparse  # logits (N, V), or a sparse distribution


def most_likely(target: Target) -> torch.Tensor:
    """The target's argmax, shape (N,)."""
    return target.ids_NK[:, 0] if isinstance(target, Sparse) else target.argmax(-1)


class Pair(NamedTuple):
    """log p and log q at the same tokens; `weight_NV` is None where these are the whole vocabulary."""

    log_p_NV: torch.Tensor
    log_q_NV: torch.Tensor
    weight_NV: torch.Tensor | None = None

    def sum(self, values_NV: torch.Tensor) -> torch.Tensor:
        """A sum over the vocabulary, shape (N,); of a sparse target an unbiased estimate."""
        return (values_NV if self.weight_NV is None else values_NV * self.weight_NV).sum(-1)

    def reward(self) -> torch.Tensor:
        """The paper's r(x) = 1 if q(x) > p(x) else 0, shape (N, V), without gradient."""
        return (self.log_q_NV > self.log_p_NV).to(self.log_p_NV.dtype)

    def whole(self, loss: str) -> "Pair":
        """Itself, over the whole vocabulary.

        Raises:
            ValueError: the target is sparse, and this loss of an estimate would be biased.
        """
        if self.weight_NV is not None:
            raise ValueError(
                f"loss '{loss}' of a sparse target would be biased: give it the exact cache, or a live target"
            )
        return self


def pair(logits_p_NV: torch.Tensor, target: Target, temperature: float, top_p: float) -> Pair:
    """log p and log q as the losses compare them; log q is -inf outside the nucleus, and has no gradient.

    Both are softmax(logits / temperature) in float32, or in float64 for float64 logits.

    Raises:
        ValueError: a temperature or top_p out of its range; one other than 1 for a sparse target, whose distribution at
            another temperature cannot be told from a sample of it.
    """
    if not temperature > 0:
        raise ValueError(f"loss.temperature is {temperature}, must be above 0 (a small one stands for greedy)")
    if not 0 < top_p <= 1:
        raise ValueError(f"loss.top_p is {top_p}, must be above 0, at most 1")
    log_p_NV = F.log_softmax(_wide(logits_p_NV) / temperature, dim=-1)
    if isinstance(target, Sparse):
        if (temperature, top_p) != (1, 1):
            raise ValueError(
                f"a sparse target is at temperature 1 and top_p 1, but the loss's are {temperature} and {top_p}: "
                f"give it the exact cache, or a live target"
            )
        return Pair(log_p_NV.gather(-1, target.ids_NK), target.log_q_NK.to(log_p_NV), target.weight_NK.to(log_p_NV))
    log_q_NV = F.log_softmax(_wide(target.detach()) / temperature, dim=-1)
    if top_p < 1:
        log_q_NV = log_q_NV.masked_fill(~in_nucleus(log_q_NV.exp(), top_p), -torch.inf).log_softmax(-1)
    return Pair(log_p_NV, log_q_NV)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
