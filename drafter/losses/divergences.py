"""Distances between the drafter's distribution p and the target's q, as losses for the drafter.

Every loss is a function of two tensors of logits at N predicted positions over V tokens, and gives one value a
position, shape (N,); the caller averages over positions (and ranks). Gradients flow to the drafter alone. Both
distributions are softmax(logits / temperature), in float32 (float64 for float64 logits): train at the temperature at
which the drafter will be served, a small one for greedy decoding. With top_p < 1 the target's distribution is cut to
its nucleus first, as the accept test will see it.

The target may be sparse instead of logits (see distributions.Sparse). KLD, reverse KL, JSD, CE, TVD, exact TVD++ over
the batch, and e2e_tvd and block of block_losses, then have the expectation that they should; the others say that they
would be biased.

A new loss is such a function here and one line in conf/loss/; the tests of conf/loss/ take it from there.

Source: arXiv 2403.00858, section 2.3, unless a function says otherwise. Ties p(x) = q(x) belong to neither side: the
reward r(x) = 1 if q(x) > p(x) else 0 is 0 there, and so is what they add to a gradient.

Shapes: N positions, V vocabulary, S samples a position.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from drafter.losses.distributions import Pair, Target, pair

Loss = Callable[..., torch.Tensor]


def kld(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Kullback-Leibler divergence KL(q || p) = sum_x q log(q / p), in nats: distillation's default.

    It covers all of the target's mass. Use it where the drafter is far from the target, or when in doubt.
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    return both.sum(_mass(both.log_q_NV, both.log_q_NV - both.log_p_NV))


def rkl(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Reverse KL(p || q) = sum_x p log(p / q), in nats (MiniLLM, arXiv 2306.08543).

    It punishes what the drafter proposes and the target would not say. Use it for small drafters that should be sure of
    little rather than vague about much. Below e^-100 the target's probability counts as e^-100.
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    return both.sum(_mass(both.log_p_NV, both.log_p_NV - both.log_q_NV.clamp_min(-100.0)))


def jsd(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Jensen-Shannon divergence (KL(q || m) + KL(p || m)) / 2 with m = (p + q) / 2, in nats, at most log 2.

    Between KLD and reverse KL, and bounded (GKD, arXiv 2306.13649). Use it on responses that the drafter wrote in part.
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    log_m_NV = torch.logaddexp(both.log_p_NV, both.log_q_NV) - math.log(2)
    from_p_NV, from_q_NV = (_mass(log_NV, log_NV - log_m_NV) for log_NV in (both.log_p_NV, both.log_q_NV))
    return both.sum(from_p_NV + from_q_NV) / 2


def ce(logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """Cross-entropy -log p(argmax q), in nats: what greedy decoding asks of the drafter, and nothing else.

    Use it for greedy serving alone; at temperature 1 it costs acceptance. (`top_p` leaves an argmax as it is.)
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    return -both.log_p_NV.gather(-1, both.log_q_NV.argmax(-1, keepdim=True))[:, 0]


def tvd(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Total variation distance 1/2 sum_x |p - q| = 1 - alpha, alpha being the chance that a drafted token is accepted.

    Computed as sum_x max(q - p, 0), whose gradient is sum_x -r(x) p(x) grad log p(x). It is the acceptance rate itself;
    its gradient vanishes where the overlap is small, so use it (or `nla`) after pretraining, for sampled serving.
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    return both.sum((both.log_q_NV.exp() - both.log_p_NV.exp()).clamp_min(0))


def nla(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Negative log-acceptance -log alpha, alpha = sum_x min(p, q) (LK-alpha, arXiv 2602.23881).

    TVD with its gradient divided by alpha, so that positions with little overlap still learn; taken in the log domain,
    it is finite however small alpha is. Use it with a low temperature for greedy serving.
    """
    return -_log_alpha(pair(logits_p_NV, logits_q_NV, temperature, top_p).whole("nla"))


def lk_hybrid(
    logits_p_NV: torch.Tensor,
    logits_q_NV: Target,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rate: float = 3.0,
) -> torch.Tensor:
    """lambda KLD + (1 - lambda) TVD with lambda = exp(-rate sg[alpha]) at each position (arXiv 2602.23881).

    KLD where the overlap is small, TVD where it is large. Use it where the drafter starts far from the target.
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p).whole("lk_hybrid")
    far_N = (-rate * _log_alpha(both).detach().exp()).exp()
    near_N = both.sum((both.log_q_NV.exp() - both.log_p_NV.exp()).clamp_min(0))
    return far_N * both.sum(_mass(both.log_q_NV, both.log_q_NV - both.log_p_NV)) + (1 - far_N) * near_N


def tvdpp(
    logits_p_NV: torch.Tensor,
    logits_q_NV: Target,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    statistics: Literal["batch", "position"] = "batch",
    estimator: Literal["exact", "sampled"] = "exact",
    num_samples: int = 8,
    mean_reward: torch.Tensor | None = None,
) -> torch.Tensor:
    """TVD++: the policy-gradient form of TVD with a normalised reward (paper, equation 4).

    Its gradient is E_{x~p}[grad log p(x) * -(r(x) - mu) / sigma], with r(x) = 1 if q(x) > p(x) else 0; as r is 0 or 1,
    sigma^2 = mu (1 - mu). Its value is not a distance (read val/tvd for that). Use it as TVD, for sampled serving.

    Args:
        statistics: mu and sigma over all positions of the batch, or over each position by itself. The paper leaves it
            open; taken exactly over the batch, TVD++ is TVD / sigma, the same direction.
        estimator: the expectation over the whole vocabulary, or over `num_samples` tokens drawn from p, where the
            baseline mu lowers the variance. mu is over what the estimator sees: vocabulary entries, or draws from p.
        mean_reward: mu of the batch, where these N positions are a part of it (see `batch_statistic`).
    """
    if statistics not in ("batch", "position"):
        raise ValueError(f"loss.statistics is '{statistics}', must be 'batch' or 'position'")
    if estimator not in ("exact", "sampled"):
        raise ValueError(f"loss.estimator is '{estimator}', must be 'exact' or 'sampled'")
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    if (statistics, estimator) != ("batch", "exact"):
        both = both.whole(f"tvdpp with statistics={statistics}, estimator={estimator}")
    mean = _mean_reward(both, logits_p_NV.shape[-1], estimator)
    if statistics == "batch":
        mean = mean.mean() if mean_reward is None else mean_reward.to(mean)
    deviation = (mean * (1 - mean)).clamp_min(0).sqrt()
    # Where all rewards are equal there is nothing to prefer.
    scale = torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0.0)
    reward_NV = both.reward()
    if estimator == "exact":
        # The baseline's own gradient, mu E[grad log p], is zero over a whole vocabulary.
        return (mean - both.sum(both.log_p_NV.exp() * reward_NV)) * scale
    tokens_NS = torch.multinomial(both.log_p_NV.detach().exp(), num_samples, replacement=True)
    advantage_NS = reward_NV.gather(-1, tokens_NS) - (mean if mean.ndim == 0 else mean[:, None])
    return (both.log_p_NV.gather(-1, tokens_NS) * -advantage_NS).mean(-1) * scale


def mix(
    logits_p_NV: torch.Tensor,
    logits_q_NV: Target,
    *,
    weights: Sequence[float],
    parts: Sequence[Loss],
    places: Any = None,
    mean_reward: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of other losses, each with its own settings.

    Raises:
        ValueError: as many weights as parts are needed, one or more.
    """
    if len(weights) != len(parts) or not parts:
        raise ValueError(f"loss.weights has {len(weights)} numbers for {len(parts)} loss.parts")
    told = [with_context(part, places=places, mean_reward=mean_reward) for part in parts]
    values = [weight * part(logits_p_NV, logits_q_NV) for weight, part in zip(weights, told, strict=True)]
    return torch.stack(values).sum(0)


def acceptance_rate(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """alpha = sum_x min(p, q): the chance that a token drafted from p is accepted against q. No loss: a yardstick."""
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    return both.sum(torch.where(both.log_p_NV < both.log_q_NV, both.log_p_NV, both.log_q_NV).exp())


def with_context(loss: Loss, **context: Any) -> Loss:
    """The loss with those values of `context` that it takes and that are there: `places`, `mean_reward`."""
    taken = inspect.signature(loss).parameters
    return partial(loss, **{name: value for name, value in context.items() if name in taken and value is not None})


def lookahead(loss: Loss) -> int:
    """How many positions past its own a loss's value depends on; for most, none."""
    if parts := _setting(loss, "parts"):
        return max(lookahead(part) for part in parts)
    return (_setting(loss, "num_speculative_tokens") or 1) - 1


def batch_statistic(loss: Loss) -> Loss | None:
    """What a loss has to know of the whole batch before its value at any position; for most, nothing.

    The result is a function of two tensors of logits that gives one value a position, shape (N,). The mean of it, over
    all positions of all ranks, is the loss's `mean_reward`.

    Raises:
        ValueError: parts of a mix that need different ones.
    """
    if parts := _setting(loss, "parts"):
        found = [part for part in parts if batch_statistic(part)]
        if len(found) > 1:
            raise ValueError("loss.parts has several TVD++ with batch statistics, where one mean reward serves one")
        return batch_statistic(found[0]) if found else None
    if getattr(loss, "func", loss) is not tvdpp or _setting(loss, "statistics") == "position":
        return None

    def statistic(logits_p_NV: torch.Tensor, logits_q_NV: Target) -> torch.Tensor:
        both = pair(logits_p_NV, logits_q_NV, _setting(loss, "temperature"), _setting(loss, "top_p"))
        return _mean_reward(both, logits_p_NV.shape[-1], _setting(loss, "estimator"))

    return statistic


def _setting(loss: Loss, name: str) -> Any:
    """A keyword's value, as bound by `partial` or as the function's own default; None where there is none."""
    parameter = inspect.signature(loss).parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def _mass(log_weight_NV: torch.Tensor, values_NV: torch.Tensor) -> torch.Tensor:
    """weight(x) value(x), where a weight of zero outweighs an infinite value."""
    weight_NV = log_weight_NV.exp()
    return weight_NV * values_NV.masked_fill(weight_NV == 0, 0.0)


def _log_alpha(both: Pair) -> torch.Tensor:
    """log sum_x min(p, q) over the whole vocabulary, without underflow."""
    return torch.where(both.log_p_NV < both.log_q_NV, both.log_p_NV, both.log_q_NV).logsumexp(-1)


def _mean_reward(both: Pair, vocabulary: int, estimator: str) -> torch.Tensor:
    """Each position's mean reward (N,): over the vocabulary, or under p where it is sampled."""
    if estimator == "exact":
        return both.sum(both.reward()) / vocabulary
    return both.sum(both.reward() * both.log_p_NV.detach().exp())
