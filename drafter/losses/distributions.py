"""The log-probabilities of drafter and target that a loss compares, over the vocabulary or over a sample of it.

Shapes: N positions, V vocabulary, K tokens per position of a sparse target or of a trimmed drafter, S of them sampled.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from drafter.losses.trimmed import Kept, Trimmed
from drafter.warping import in_nucleus


class Sparse(NamedTuple):
    """A target's distribution at K tokens per position: the top-k, samples from the rest, and the response's token.

    The sum over K of weight · value estimates a sum over the vocabulary without bias. The weight is 1 for a top-k
    token, rest / (S q(x)) for each of the S samples, where `rest` is the probability mass outside the top-k, and 0 for
    the last token, which is the token of the response at that position.

    Attributes:
        ids_NK: token ids. The first is the most likely token.
        log_q_NK: log-probabilities at temperature 1.
        weight_NK: the weights.
    """

    ids_NK: torch.Tensor
    log_q_NK: torch.Tensor
    weight_NK: torch.Tensor

    def __getitem__(self, rows: slice) -> "Sparse":  # type: ignore[override]
        """Return the positions of a slice."""
        return Sparse(self.ids_NK[rows], self.log_q_NK[rows], self.weight_NK[rows])


class Drawn(NamedTuple):
    """The form in which a cache stores a `Sparse`: without the weights, which follow from the other fields.

    Attributes:
        ids_NK: token ids: `top_k` most likely tokens, samples from the rest, the token of the response.
        log_q_NK: log-probabilities at temperature 1.
        log_rest_N: log of the probability mass outside the top-k.
        top_k: the number of top-k tokens.
    """

    ids_NK: torch.Tensor
    log_q_NK: torch.Tensor
    log_rest_N: torch.Tensor
    top_k: int

    @classmethod
    def from_logits(cls, logits_NV: torch.Tensor, tokens_N: torch.Tensor, top_k: int, num_samples: int) -> "Drawn":
        """Take the top_k most likely tokens, `num_samples` draws from the others, and `tokens_N`.

        The sampling is systematic: the others' probability mass is divided into `num_samples` equal parts, and all
        parts are sampled at the same random offset. The expected number of draws of a token is proportional to its
        probability, so the estimate is unbiased, and its variance is lower than with independent draws.
        """
        log_q_NV = F.log_softmax(_at_least_float32(logits_NV), dim=-1)
        top_NK = log_q_NV.topk(top_k, dim=-1).indices
        others_NV = log_q_NV.exp().scatter(-1, top_NK, 0.0)
        rest_N1 = others_NV.sum(-1, keepdim=True)
        offset_N1 = torch.rand(rest_N1.shape, device=rest_N1.device, dtype=rest_N1.dtype)
        quantile_NS = (torch.arange(num_samples, device=rest_N1.device) + offset_N1) / num_samples
        cumulative_NV = others_NV.cumsum(-1)
        drawn_NS = torch.searchsorted(cumulative_NV, quantile_NS * cumulative_NV[:, -1:], right=True)
        # Rounding may lead past the last token with any mass. Where no token has mass, the weight is zero.
        last_N1 = cumulative_NV.argmax(-1, keepdim=True)
        drawn_NS = torch.minimum(drawn_NS, last_N1)
        ids_NK = torch.cat([top_NK, drawn_NS, tokens_N[:, None]], -1)
        return cls(ids_NK, log_q_NV.gather(-1, ids_NK), rest_N1[:, 0].log(), top_k)

    @classmethod
    def cat(cls, parts: "list[Drawn]") -> "Drawn":
        """Concatenate the positions of all parts."""
        ids_NK, log_q_NK, log_rest_N = (torch.cat(field) for field in list(zip(*parts, strict=True))[:3])
        return cls(ids_NK, log_q_NK, log_rest_N, parts[0].top_k)

    def first(self, count: int) -> "Drawn":
        """Return the first `count` positions."""
        return Drawn(self.ids_NK[:count], self.log_q_NK[:count], self.log_rest_N[:count], self.top_k)

    def weighted(self) -> Sparse:
        """Return the distribution with the weight of each token."""
        log_q_NK, log_rest_N = _at_least_float32(self.log_q_NK), _at_least_float32(self.log_rest_N)
        log_drawn_NS = log_q_NK[:, self.top_k : -1]
        log_share_N1 = log_rest_N[:, None] - math.log(log_drawn_NS.shape[-1])
        weight_NS = torch.where(log_share_N1 > -math.inf, (log_share_N1 - log_drawn_NS).exp(), 0.0)
        top_NK = torch.ones_like(log_q_NK[:, : self.top_k])
        return Sparse(self.ids_NK, log_q_NK, torch.cat([top_NK, weight_NS, torch.zeros_like(log_share_N1)], -1))


Target = torch.Tensor | Sparse | Trimmed  # logits (N, V), or a distribution over fewer outcomes


def most_likely(target: Target) -> torch.Tensor:
    """Return the target's most likely token at each of the N positions, shape (N,)."""
    if isinstance(target, Sparse):
        return target.ids_NK[:, 0]
    if isinstance(target, Trimmed) and target.top_N is not None:
        return target.top_N
    return (target.full() if isinstance(target, Trimmed) else target).argmax(-1)


def at_tokens(values_NV: torch.Tensor, target: Target, tokens_N: torch.Tensor, absent: float) -> torch.Tensor:
    """Return the values at one token per position, shape (N,).

    Args:
        values_NV: values over all tokens or, if `target` is `Trimmed`, over its outcomes (the last one may be missing
            where the drafter never proposes it).
        target: what the drafter is compared with.
        tokens_N: ids of the vocabulary.
        absent: the value at a token that the drafter does not propose.
    """
    if not isinstance(target, Trimmed):
        return values_NV.gather(-1, tokens_N[:, None])[:, 0]
    place_N = target.kept.place_V[tokens_N].clamp_max(values_NV.shape[-1] - 1)
    return values_NV.gather(-1, place_N[:, None])[:, 0].masked_fill(~target.kept.mask(tokens_N), absent)


def outcomes(logits_p_NV: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the drafter's logits of the outcomes at which it is compared with the target."""
    return target.kept.outcomes(logits_p_NV) if isinstance(target, Trimmed) else logits_p_NV


class Pair(NamedTuple):
    """log p and log q at the same outcomes.

    Attributes:
        log_p_NV, log_q_NV: the logarithms.
        weight_NV: of the tokens of a sparse target; None where the outcomes are complete.
        is_trimmed: whether the last outcome is that of the tokens that the drafter never proposes (see `Trimmed`).
    """

    log_p_NV: torch.Tensor
    log_q_NV: torch.Tensor
    weight_NV: torch.Tensor | None = None
    is_trimmed: bool = False

    def sum(self, values_NV: torch.Tensor) -> torch.Tensor:
        """Sum over the vocabulary, shape (N,). With a sparse target, return an unbiased estimate of that sum."""
        return (values_NV if self.weight_NV is None else values_NV * self.weight_NV).sum(-1)

    def kld(self) -> torch.Tensor:
        """Return KL(q || p), shape (N,); of a trimmed drafter the finite part that `Trimmed` defines."""
        if not self.is_trimmed:
            return self.sum(weighted(self.log_q_NV, self.log_q_NV - self.log_p_NV))
        log_q_NK, log_p_NK = self.log_q_NV[:, :-1], self.log_p_NV[:, :-1]
        log_covered_N1 = log_q_NK.logsumexp(-1, keepdim=True)
        return weighted(log_q_NK, log_q_NK - log_covered_N1 - log_p_NK).sum(-1)

    def tvd(self) -> torch.Tensor:
        """Return the total variation distance sum_x max(q - p, 0), shape (N,)."""
        return self.sum((self.log_q_NV.exp() - self.log_p_NV.exp()).clamp_min(0))

    def reward(self) -> torch.Tensor:
        """Return the paper's r(x) = 1 if q(x) > p(x) else 0, shape (N, V), without gradient."""
        return (self.log_q_NV > self.log_p_NV).to(self.log_p_NV.dtype)

    def require_full_vocabulary(self, loss: str) -> "Pair":
        """Return the pair itself if it covers the full vocabulary.

        Raises:
            ValueError: the target is sparse, so that an estimate of this loss would be biased.
        """
        if self.weight_NV is not None:
            raise ValueError(
                f"loss '{loss}' of a sparse target would be biased: use an exact cache (cache=exact) or a live target"
            )
        return self


def pair(
    logits_p_NV: torch.Tensor, target: Target, temperature: float, top_p: float, draft_temperature_factor: float = 1.0
) -> Pair:
    """Return log p and log q as the losses compare them.

    Both distributions are softmax(logits / temperature), in float32, or in float64 for float64 logits. The drafter's
    temperature is multiplied by a factor, which is 1 for every loss but `hit`. With top_p < 1, log q is renormalised
    over the target's nucleus and -inf outside. log q has no gradient. If the drafter is trimmed, the outcomes are those
    of `Trimmed`.

        >>> logits_p, logits_q = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> both = pair(logits_p, logits_q, temperature=1.0, top_p=1.0)
        >>> [round(x, 3) for x in both.log_q_NV.exp()[0].tolist()]
        [0.731, 0.269]
        >>> pair(logits_p, logits_q, temperature=1.0, top_p=0.5).log_q_NV.exp()
        tensor([[1., 0.]])

    Raises:
        ValueError: temperature or top_p is out of range, or one of them is not 1 although the target is sparse: its
            distribution at another temperature is unknown.
    """
    if not temperature > 0:
        raise ValueError(f"loss.temperature is {temperature}, must be above 0 (use a small one for greedy decoding)")
    if not 0 < top_p <= 1:
        raise ValueError(f"loss.top_p is {top_p}, must be above 0 and at most 1")
    scaled_NV = _scaled(logits_p_NV, temperature * draft_temperature_factor)
    log_p_NV = F.log_softmax(outcomes(scaled_NV, target), dim=-1)
    if isinstance(target, Sparse):
        if (temperature, top_p) != (1, 1):
            raise ValueError(
                f"a sparse target is stored for temperature 1 and top_p 1, but the loss has {temperature} and {top_p}: "
                f"use an exact cache (cache=exact) or a live target"
            )
        return Pair(log_p_NV.gather(-1, target.ids_NK), target.log_q_NK.to(log_p_NV), target.weight_NK.to(log_p_NV))
    if isinstance(target, Trimmed) and target.log_q is not None and (temperature, top_p) == (1, 1):
        return _with_rest(log_p_NV, target.log_q().detach(), target.kept)
    logits_q_NV = target.full() if isinstance(target, Trimmed) else target
    log_q_NV = F.log_softmax(_scaled(logits_q_NV.detach(), temperature), dim=-1)
    if top_p < 1:
        log_q_NV = log_q_NV.masked_fill(~in_nucleus(log_q_NV.exp(), top_p), -torch.inf).log_softmax(-1)
    if not isinstance(target, Trimmed):
        return Pair(log_p_NV, log_q_NV)
    return _with_rest(log_p_NV, log_q_NV.index_select(-1, target.kept.ids_K), target.kept)


def _with_rest(log_p_NV: torch.Tensor, log_q_NK: torch.Tensor, kept: Kept) -> Pair:
    """Return the pair over the kept tokens and the outcome of any other token, which log p has if some are sampled."""
    is_trimmed = kept.sampled_S is None
    largest = 1 if is_trimmed else 1 - torch.finfo(log_q_NK.dtype).eps
    log_rest_N1 = torch.log1p(-log_q_NK.exp().sum(-1, keepdim=True).clamp_max(largest))
    if is_trimmed:
        log_p_NV = torch.cat([log_p_NV, torch.full_like(log_rest_N1, -torch.inf).to(log_p_NV)], -1)
    return Pair(log_p_NV, torch.cat([log_q_NK, log_rest_N1], -1), is_trimmed=is_trimmed)


def weighted(log_weight_NV: torch.Tensor, values_NV: torch.Tensor) -> torch.Tensor:
    """Return weight(x) · value(x), which is zero where the weight is zero and the value infinite."""
    weight_NV = log_weight_NV.exp()
    return weight_NV * values_NV.masked_fill(weight_NV == 0, 0.0)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = _at_least_float32(logits)
    return logits if temperature == 1 else logits / temperature
