"""Distances between the drafter's distribution p and the target's q, as losses for the drafter.

Every loss is a function of two tensors of logits at N predicted positions over V tokens, and returns one value a
position, shape (N,); the caller averages over positions (and over ranks). Gradients flow to the drafter alone. Softmax
and log-softmax are taken in float32 (float64 for float64 logits), both at softmax(logits / temperature).

Source: arXiv 2403.00858, section 2.3, unless a function says otherwise. Shapes: N positions, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F


def kld(logits_p_NV: torch.Tensor, logits_q_NV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Kullback-Leibler divergence KL(q || p) = sum_x q log(q / p), in nats: distillation's default.

    It covers all of the target's mass, so it is at its best where the drafter is too small to match q, and for greedy
    decoding, where the argmax has to agree.
    """
    log_p_NV, log_q_NV = _log_probs(logits_p_NV, temperature), _log_probs(logits_q_NV.detach(), temperature)
    return F.kl_div(log_p_NV, log_q_NV, reduction="none", log_target=True).sum(-1)


def tvd(logits_p_NV: torch.Tensor, logits_q_NV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Total variation distance 1/2 sum_x |p - q| = 1 - alpha, alpha being the chance that a drafted token is accepted.

    Computed as sum_x max(q - p, 0), whose gradient is sum_x -r(x) p(x) grad log p(x) with the paper's reward
    r(x) = 1 if q(x) > p(x) else 0, ties included.
    """
    p_NV, q_NV = _probs(logits_p_NV, temperature), _probs(logits_q_NV.detach(), temperature)
    return (q_NV - p_NV).clamp_min(0).sum(-1)


def tvdpp(
    logits_p_NV: torch.Tensor,
    logits_q_NV: torch.Tensor,
    temperature: float = 1.0,
    statistics: Literal["batch", "position"] = "batch",
    estimator: Literal["exact", "sampled"] = "exact",
    num_samples: int = 8,
    mean_reward: torch.Tensor | None = None,
) -> torch.Tensor:
    """TVD++: the policy-gradient form of TVD with a normalised reward (paper, equation 4).

    Its gradient is E_{x~p}[grad log p(x) * -(r(x) - mu) / sigma], with r(x) = 1 if q(x) > p(x) else 0; as r is 0 or 1,
    sigma^2 = mu (1 - mu). Its value is not a distance (read val/tvd for that).

    Args:
        statistics: mu and sigma over all positions of the batch, or over each position by itself. The paper leaves it
            open; taken exactly over the batch, TVD++ is TVD / sigma, the same direction.
        estimator: the expectation over the whole vocabulary, or over `num_samples` tokens drawn from p, where the
            baseline mu lowers the variance. mu is over what the estimator sees: vocabulary entries, or draws from p.
        mean_reward: mu of the batch, where these N positions are a part of it (see `batch_statistic`).
    """
    if statistics not in ("batch", "position"):
        raise ValueError(f"loss.statistics is '{statistics}', must be 'batch' or 'position'")
    log_p_NV = _log_probs(logits_p_NV, temperature)
    p_NV = log_p_NV.detach().exp()
    reward_NV = (_probs(logits_q_NV.detach(), temperature) > p_NV).to(log_p_NV.dtype)
    mean = _mean_reward(reward_NV, p_NV, estimator)[:, None]
    if statistics == "batch":
        mean = mean.mean() if mean_reward is None else mean_reward.to(mean)
    deviation = (mean * (1 - mean)).clamp_min(0).sqrt()
    # Where all rewards are equal there is nothing to prefer.
    advantage_NV = torch.where(deviation > 1e-6, (reward_NV - mean) / deviation.clamp_min(1e-6), 0.0)
    if estimator == "exact":
        return (log_p_NV.exp() * -advantage_NV).sum(-1)
    tokens_NS = torch.multinomial(p_NV, num_samples, replacement=True)
    return (log_p_NV.gather(-1, tokens_NS) * -advantage_NV.gather(-1, tokens_NS)).mean(-1)


def batch_statistic(loss: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """What a loss has to know of the whole batch before its value at any position; for most, nothing.

    The result is a function of two tensors of logits that gives one value a position, shape (N,). The mean of it, over
    all positions of all ranks, is the loss's `mean_reward`.
    """
    if not isinstance(loss, partial) or loss.func is not tvdpp:
        return batch_statistic(partial(loss)) if loss is tvdpp else None
    settings: dict[str, Any] = {"temperature": 1.0, "statistics": "batch", "estimator": "exact"} | loss.keywords
    if settings["statistics"] == "position":
        return None

    def statistic(logits_p_NV: torch.Tensor, logits_q_NV: torch.Tensor) -> torch.Tensor:
        p_NV, q_NV = (_probs(logits.detach(), settings["temperature"]) for logits in (logits_p_NV, logits_q_NV))
        return _mean_reward((q_NV > p_NV).to(p_NV.dtype), p_NV, settings["estimator"])

    return statistic


def acceptance_rate(logits_p_NV: torch.Tensor, logits_q_NV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """alpha = sum_x min(p, q): the chance that a token drafted from p is accepted against q. No loss: a yardstick."""
    return torch.minimum(_probs(logits_p_NV, temperature), _probs(logits_q_NV, temperature)).sum(-1)


def _mean_reward(reward_NV: torch.Tensor, p_NV: torch.Tensor, estimator: str) -> torch.Tensor:
    """The mean of a position's reward over the vocabulary, or under p, from which it is sampled."""
    if estimator not in ("exact", "sampled"):
        raise ValueError(f"loss.estimator is '{estimator}', must be 'exact' or 'sampled'")
    return reward_NV.mean(-1) if estimator == "exact" else (reward_NV * p_NV).sum(-1)


def _log_probs(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    if not temperature > 0:
        raise ValueError(f"loss.temperature is {temperature}, must be above 0 (a small one stands for greedy)")
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.log_softmax(wide / temperature, dim=-1)


def _probs(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return _log_probs(logits_NV, temperature).exp()
