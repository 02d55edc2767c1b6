"""Divergences between the drafter's distribution p and the target's distribution q, as losses for the drafter.

Every loss is a function of the drafter's and the target's logits at N predicted positions over V tokens. It returns one
value per position, shape (N,), and the caller averages over positions and ranks. Gradients flow to the drafter alone.
Both distributions are softmax(logits / temperature), in float32 (float64 for float64 logits). Train at the temperature
at which the drafter will be served; use a small one for greedy decoding. With top_p < 1, the target's distribution is
restricted to its nucleus first, as it is in verification.

The target may be sparse instead of logits (see `distributions.Sparse`). KLD, reverse KL, JSD, CE, TVD, exact TVD++ with
batch statistics, and `e2e_tvd` and `block` of block_losses are then unbiased estimates; the other losses raise an
error. If the drafter proposes some tokens alone, `trimmed.Trimmed` says what each loss sees.

To add a loss, write such a function here and one line in conf/loss/, whose files the tests discover.

Source: arXiv 2403.00858, section 2.3, unless a function says otherwise. On a tie p(x) = q(x) the reward
r(x) = 1 if q(x) > p(x) else 0 is 0, and the tie contributes nothing to the gradient.

Shapes: N positions, V vocabulary, S samples per position.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from drafter.losses.distributions import Pair, Target, at_tokens, most_likely, pair, weighted
from drafter.losses.objective import Loss, Objective, declares
from drafter.losses.trimmed import Trimmed


def kld(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Return the Kullback-Leibler divergence KL(q || p) = sum_x q log(q / p), in nats: the default for distillation.

    It makes the drafter cover all of the target's mass. Use it where the drafter is far from the target, or when in
    doubt.

        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> kld(logits, logits)
        tensor([0.])
        >>> uniform, one_hot = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
        >>> kld(uniform, one_hot)  # log 2
        tensor([0.6931])
    """
    return pair(logits_p_NV, logits_q_NV, temperature, top_p).kld()


def rkl(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Return the reverse divergence KL(p || q) = sum_x p log(p / q), in nats (MiniLLM, arXiv 2306.08543).

    It penalises tokens that the drafter proposes and the target finds unlikely. Use it for small drafters that should
    concentrate on few tokens rather than cover all. A target probability below e^-100 counts as e^-100.

        >>> uniform, one_hot = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
        >>> rkl(uniform, one_hot)  # 1/2 log(1/2) + 1/2 (log(1/2) + 100)
        tensor([49.3069])
        >>> rkl(one_hot, uniform)  # log 2
        tensor([0.6931])
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    return both.sum(weighted(both.log_p_NV, both.log_p_NV - both.log_q_NV.clamp_min(-100.0)))


def jsd(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Return the Jensen-Shannon divergence (KL(q || m) + KL(p || m)) / 2, m = (p + q) / 2, in nats (arXiv 2306.13649).

    It lies between KLD and reverse KL, and is at most log 2. Use it on responses that the drafter generated in part.

        >>> jsd(torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]]))  # disjoint: log 2
        tensor([0.6931])
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    log_m_NV = torch.logaddexp(both.log_p_NV, both.log_q_NV) - math.log(2)
    from_p_NV, from_q_NV = (weighted(log_NV, log_NV - log_m_NV) for log_NV in (both.log_p_NV, both.log_q_NV))
    return both.sum(from_p_NV + from_q_NV) / 2


def ce(logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """Return the cross-entropy -log p(argmax q), in nats, of the token that greedy decoding would choose.

    Use it for greedy serving alone: at temperature 1 it lowers acceptance. `top_p` has no effect on the argmax.

        >>> ce(torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[2.0, 1.0]]))  # -log(1/4)
        tensor([1.3863])
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    if isinstance(logits_q_NV, Trimmed):
        return -at_tokens(both.log_p_NV, logits_q_NV, most_likely(logits_q_NV), absent=0.0)
    return -both.log_p_NV.gather(-1, both.log_q_NV.argmax(-1, keepdim=True))[:, 0]


def tvd(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Return the total variation distance 1/2 sum_x |p - q| = 1 - alpha, where alpha is the acceptance rate.

    It is computed as sum_x max(q - p, 0), whose gradient is sum_x -r(x) p(x) grad log p(x). Minimising it maximises the
    acceptance rate directly. Its gradient vanishes where the overlap is small, so use it (or `nla`) after pretraining,
    for sampled serving.

        >>> p, q = torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[3.0, 1.0]]).log()  # 1/2, 1/2 and 3/4, 1/4
        >>> tvd(p, q)
        tensor([0.2500])
        >>> tvd(torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]]))  # disjoint distributions
        tensor([1.])
    """
    return pair(logits_p_NV, logits_q_NV, temperature, top_p).tvd()


def nla(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Return the negative log-acceptance -log alpha, alpha = sum_x min(p, q) (LK-alpha, arXiv 2602.23881).

    Its gradient is that of TVD divided by alpha, so that positions with little overlap still learn. It is finite
    however small alpha is, and zero where no token has mass in both. Use it with a low temperature for greedy serving.

        >>> nla(torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[3.0, 1.0]]).log())  # -log(3/4)
        tensor([0.2877])
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p).require_full_vocabulary("nla")
    return _minus_log_sum(_log_overlap(both))


def hit(
    logits_p_NV: torch.Tensor,
    logits_q_NV: Target,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    draft_temperature_factor: float = 0.3,
) -> torch.Tensor:
    """Return -log sum_x p(x) q(x): the sum is the probability that a token drawn from the target is the drafted one.

    Here q is the target's distribution as it is served, at `temperature` and top_p, and the draft is drawn from
    p = softmax(logits_p / (temperature · draft_temperature_factor)). The factor says how the engine drafts:

    Near 0, p is one-hot at the drafter's most likely token, which is the same at every temperature, and the sum is the
    target's probability of that token: the acceptance probability of an engine that drafts greedily (rule `argmax`).

    At 1, drafter and target have the same temperature, and the sum is the acceptance probability of an engine that
    accepts a draft if an independent draw from the target equals it (rule `match`).

    The smaller the factor, the closer is the sum to that of a greedy draft, and the weaker is the gradient at positions
    where the drafter is sure of another token. The minimum over all drafters, at every factor, is -log max_x q(x), of a
    drafter that is sure of the target's most likely token. So it is not for engines that accept with probability
    min(1, q / p). It is computed in the log domain. Where no token has mass in both distributions, it is zero.

        >>> p, q = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()  # 3/4, 1/4 and 1/4, 3/4
        >>> hit(p, q, draft_temperature_factor=1.0)  # -log(3/4 · 1/4 + 1/4 · 3/4)
        tensor([0.9808])
        >>> hit(p, q, draft_temperature_factor=0.01)  # -log(1/4)
        tensor([1.3863])

    Raises:
        ValueError: the factor is out of range, or the target is sparse, so that the estimate would be biased.
    """
    if not 0 < draft_temperature_factor <= 1:
        raise ValueError(
            f"loss.draft_temperature_factor is {draft_temperature_factor}, must be above 0 and at most 1: a small one "
            f"for engines that draft greedily, 1 for engines that draft at the target's temperature"
        )
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p, draft_temperature_factor).require_full_vocabulary("hit")
    log_NV = both.log_p_NV + both.log_q_NV
    if isinstance(logits_q_NV, Trimmed):
        log_NV = log_NV[:, :-1]  # two tokens of the last outcome need not be the same one
    return _minus_log_sum(log_NV)


def lk_hybrid(
    logits_p_NV: torch.Tensor,
    logits_q_NV: Target,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rate: float = 3.0,
) -> torch.Tensor:
    """Return lambda KLD + (1 - lambda) TVD with lambda = exp(-rate alpha) at each position (arXiv 2602.23881).

    It is mostly KLD where the overlap alpha is small, and mostly TVD where it is large; lambda has no gradient. Use it
    where the drafter starts far from the target.

        >>> lk_hybrid(torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[3.0, 1.0]]).log(), rate=0.0)  # KLD alone
        tensor([0.1308])
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p).require_full_vocabulary("lk_hybrid")
    lambda_N = (-rate * both.sum(_log_overlap(both).exp()).detach()).exp()
    tvd_N = both.tvd()
    return lambda_N * both.kld() + (1 - lambda_N) * tvd_N


def _tvdpp_objective(loss: Loss, settings: Mapping[str, Any]) -> Objective:
    """Return an objective with a `batch_mean`, the mean reward, if the statistics are those of the batch."""
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
    """Return TVD++, the policy-gradient form of TVD with a normalised reward (paper, equation 4).

    Its gradient is E_{x~p}[grad log p(x) * -(r(x) - mu) / sigma], with r(x) = 1 if q(x) > p(x) else 0. As r is 0 or 1,
    sigma^2 = mu (1 - mu). Its value is not a distance (read val/tvd for that). Use it as TVD, for sampled serving.

    With p = (1/2, 1/2) and q = (3/4, 1/4), the reward is (1, 0), mu = sigma = 1/2, and the value is
    (mu - E_p[r]) / sigma = 0. The gradient is the one of TVD divided by sigma:

        >>> p, q = torch.zeros(1, 2, requires_grad=True), torch.tensor([[3.0, 1.0]]).log()
        >>> tvdpp(p, q).tolist()
        [0.0]
        >>> [torch.autograd.grad(loss(p, q).sum(), p)[0].tolist() for loss in (tvd, tvdpp)]
        [[[-0.25, 0.25]], [[-0.5, 0.5]]]

    Args:
        statistics: whether mu and sigma are computed over all positions of the batch, or for each position separately.
            The paper does not say. With `batch` and the exact estimator, TVD++ is TVD / sigma: the same direction.
        estimator: whether the expectation is over the full vocabulary, or over `num_samples` tokens drawn from p, where
            the baseline mu lowers the variance. Accordingly, mu is a mean over vocabulary entries or over draws from p.
        mean_reward: mu of the batch, where these N positions are a part of it (see `Objective.batch_mean`).

    Raises:
        ValueError: statistics or estimator has an unknown value, or the target is sparse and the estimate biased.
    """
    if statistics not in ("batch", "position"):
        raise ValueError(f"loss.statistics is '{statistics}', must be 'batch' or 'position'")
    if estimator not in ("exact", "sampled"):
        raise ValueError(f"loss.estimator is '{estimator}', must be 'exact' or 'sampled'")
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    if (statistics, estimator) != ("batch", "exact"):
        both = both.require_full_vocabulary(f"tvdpp with statistics={statistics}, estimator={estimator}")
    mean = _mean_reward(both, logits_p_NV.shape[-1], estimator)
    if statistics == "batch":
        mean = mean.mean() if mean_reward is None else mean_reward.to(mean)
    deviation = (mean * (1 - mean)).clamp_min(0).sqrt()
    # Where all rewards are equal, no token is better than another: the loss is zero.
    scale = torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0.0)
    reward_NV = both.reward()
    if estimator == "exact":
        # The gradient of the baseline, mu E[grad log p], is zero over the full vocabulary.
        return (mean - both.sum(both.log_p_NV.exp() * reward_NV)) * scale
    tokens_NS = torch.multinomial(both.log_p_NV.detach().exp(), num_samples, replacement=True)
    advantage_NS = reward_NV.gather(-1, tokens_NS) - (mean if mean.ndim == 0 else mean[:, None])
    return (both.log_p_NV.gather(-1, tokens_NS) * -advantage_NS).mean(-1) * scale


def acceptance_rate(
    logits_p_NV: torch.Tensor, logits_q_NV: Target, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Return alpha = sum_x min(p, q), the probability that a token drafted from p is accepted. A measure, not a loss.

    >>> acceptance_rate(torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[3.0, 1.0]]).log())
    tensor([0.7500])
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    return both.sum(_log_overlap(both).exp())


def _log_overlap(both: Pair) -> torch.Tensor:
    """Return log min(p, q), shape (N, V)."""
    return torch.where(both.log_p_NV < both.log_q_NV, both.log_p_NV, both.log_q_NV)


def _minus_log_sum(log_NV: torch.Tensor) -> torch.Tensor:
    """Return -log of the sums of exp without underflow; 0, without gradient, where no summand is above 0."""
    never_N1 = (log_NV == -torch.inf).all(-1, keepdim=True)
    return -log_NV.masked_fill(never_N1, 0.0).logsumexp(-1).masked_fill(never_N1[:, 0], 0.0)


def _mean_reward(both: Pair, vocabulary: int, estimator: str) -> torch.Tensor:
    """Return the mean reward of each position, shape (N,): over the vocabulary, or under p if sampled."""
    if estimator == "exact":
        return both.sum(both.reward()) / (vocabulary if both.weight_NV is not None else both.log_p_NV.shape[-1])
    return both.sum(both.reward() * both.log_p_NV.detach().exp())
