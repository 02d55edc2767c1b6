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

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from drafter.losses.distributions import Pair, Target, pair
from drafter.losses.objective import Loss, Objective, Positions, declares, objective_of


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


def _tvdpp_objective(loss: Loss, settings: Mapping[str, Any]) -> Objective:
    """Return that TVD++ with the statistics of the batch needs the batch's mean reward."""
    if settings.get("statistics", "batch") == "position":
        return Objective(loss)
    temperature, top_p = settings.get("temperature", 1.0), settings.get("top_p", 1.0)
    estimator = settings.get("estimator", "exact")

    def mean_reward_of_positions(logits_p_NV: torch.Tensor, logits_q_NV: Target) -> torch.Tensor:
        return _mean_reward(pair(logits_p_NV, logits_q_NV, temperature, top_p), logits_p_NV.shape[-1], estimator)

    return Objective(loss, batch_mean=mean_reward_of_positions)


@declares(_tvdpp_objective)
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
        mean_reward: mu of the batch, where these N positions are a part of it (see `Objective.batch_mean`).
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


def _mix_objective(_: Loss, settings: Mapping[str, Any]) -> Objective:
    """Return what the parts of a mix need together."""
    parts = [objective_of(part) for part in settings["parts"]]
    statistics = [part.batch_mean for part in parts if part.batch_mean is not None]
    if len(statistics) > 1:
        raise ValueError("loss.parts has several TVD++ with batch statistics, where one mean reward serves one")
    return Objective(
        partial(mix, weights=settings["weights"], parts=parts),
        any(part.needs_positions for part in parts),
        max(part.lookahead for part in parts) if parts else 0,
        statistics[0] if statistics else None,
    )


@declares(_mix_objective)
def mix(
    logits_p_NV: torch.Tensor,
    logits_q_NV: Target,
    *,
    weights: Sequence[float],
    parts: Sequence[Loss | Objective],
    positions: Positions | None = None,
    mean_reward: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted sum of other losses, each with its own settings.

    Raises:
        ValueError: the numbers of weights and parts differ, or there are none.
    """
    if len(weights) != len(parts) or not parts:
        raise ValueError(f"loss.weights has {len(weights)} numbers for {len(parts)} loss.parts")
    values = [
        weight * objective_of(part)(logits_p_NV, logits_q_NV, positions, mean_reward)
        for weight, part in zip(weights, parts, strict=True)
    ]
    return torch.stack(values).sum(0)


def acceptance_rate(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """alpha = sum_x min(p, q): the chance that a token drafted from p is accepted against q. No loss: a yardstick."""
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    return both.sum(torch.where(both.log_p_NV < both.log_q_NV, both.log_p_NV, both.log_q_NV).exp())


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
