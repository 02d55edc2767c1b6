"""Distances between the drafter's distribution p and the target's q, as losses for the drafter.

Every loss is a function of two tensors of logits at N predicted positions over V tokens, and returns one value a
position, shape (N,); the caller averages over positions (and over ranks). Gradients flow to the drafter alone. Softmax
and log-softmax are taken in float32 (float64 for float64 logits), both at softmax(logits / temperature).

Source: arXiv 2403.00858, section 2.3, unless a function says otherwise. Shapes: N positions, V vocabulary.
"""

from typing import Literal

import torch
import torch.distributed as dist
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
) -> torch.Tensor:
    """TVD++: the policy-gradient form of TVD with a normalised reward (paper, equation 4).

    Its gradient is E_{x~p}[grad log p(x) * -(r(x) - mu) / sigma], with r(x) = 1 if q(x) > p(x) else 0. Its value is
    not a distance (read val/tvd for that).

    Args:
        statistics: mu and sigma over the whole batch (of all ranks), or over each position by itself. The paper leaves
            it open; taken exactly over the batch, TVD++ is TVD / sigma, the same direction.
        estimator: the expectation over the whole vocabulary, or over `num_samples` tokens drawn from p, where the
            baseline mu lowers the variance. The statistics are over the entries that the estimator sees.
    """
    log_p_NV = _log_probs(logits_p_NV, temperature)
    q_NV = _probs(logits_q_NV.detach(), temperature)
    reward_NV = (q_NV > log_p_NV.detach().exp()).to(log_p_NV.dtype)
    if estimator == "exact":
        return (log_p_NV.exp() * -_advantage(reward_NV, statistics)).sum(-1)
    if estimator != "sampled":
        raise ValueError(f"loss.estimator is '{estimator}', must be 'exact' or 'sampled'")
    tokens_NS = torch.multinomial(log_p_NV.detach().exp(), num_samples, replacement=True)
    advantage_NS = _advantage(reward_NV.gather(-1, tokens_NS), statistics)
    return (log_p_NV.gather(-1, tokens_NS) * -advantage_NS).mean(-1)


def acceptance_rate(logits_p_NV: torch.Tensor, logits_q_NV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """alpha = sum_x min(p, q): the chance that a token drafted from p is accepted against q. No loss: a yardstick."""
    return torch.minimum(_probs(logits_p_NV, temperature), _probs(logits_q_NV, temperature)).sum(-1)


def _advantage(reward_NK: torch.Tensor, statistics: str) -> torch.Tensor:
    """(r - mu) / sigma; zero where all rewards are equal, since then there is nothing to prefer."""
    if statistics == "position":
        mean, square = reward_NK.mean(-1, keepdim=True), reward_NK.square().mean(-1, keepdim=True)
    elif statistics == "batch":
        sums = torch.stack([torch.ones_like(reward_NK).sum(), reward_NK.sum(), reward_NK.square().sum()]).double()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        mean, square = (sums[1] / sums[0]).to(reward_NK), (sums[2] / sums[0]).to(reward_NK)
    else:
        raise ValueError(f"loss.statistics is '{statistics}', must be 'batch' or 'position'")
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    return torch.where(deviation > 1e-6, (reward_NK - mean) / deviation.clamp_min(1e-6), 0.0)


def _log_probs(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    if not temperature > 0:
        raise ValueError(f"loss.temperature is {temperature}, must be above 0 (a small one stands for greedy)")
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.log_softmax(wide / temperature, dim=-1)


def _probs(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return _log_probs(logits_NV, temperature).exp()
