"""Losses that look past one position: at the block of drafted tokens that starts there. Contract: see losses.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch

from drafter.losses.distributions import Sparse, Target, pair
from drafter.losses.divergences import acceptance_rate
from drafter.losses.objective import Loss, Objective, Positions, declares

NUM_SPECULATIVE_TOKENS = 3


def _block_objective(loss: Loss, settings: Mapping[str, Any]) -> Objective:
    """Return that a loss of a block reads the positions after its own."""
    length = settings.get("num_speculative_tokens", NUM_SPECULATIVE_TOKENS)
    return Objective(loss, needs_positions=True, lookahead=length - 1)


@declares(_block_objective)
def e2e_tvd(
    logits_p_NV: torch.Tensor,
    logits_q_NV: Target,
    *,
    positions: Positions,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_speculative_tokens: int = NUM_SPECULATIVE_TOKENS,
) -> torch.Tensor:
    """1 - (1/gamma) sum_j prod_{i<=j} alpha_i over the gamma positions from each one on (arXiv 2606.12370).

    The expected share of a block that is accepted, its positions' acceptances taken as independent; near a response's
    end, over the positions that are left. Use it for sampled serving at a known gamma.
    """
    alpha_N = acceptance_rate(logits_p_NV, logits_q_NV, temperature=temperature, top_p=top_p)
    accepted_N = windowed_products(alpha_N, positions.following_N, num_speculative_tokens).sum(-1)
    return 1 - accepted_N / (positions.following_N + 1).clamp_max(num_speculative_tokens)


@declares(_block_objective)
def block(
    logits_p_NV: torch.Tensor,
    logits_q_NV: Target,
    *,
    positions: Positions,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_speculative_tokens: int = NUM_SPECULATIVE_TOKENS,
) -> torch.Tensor:
    """-sum_j prod_{i<=j} min(1, p(x_i) / q(x_i)) over the gamma tokens x from each position on: -(accepted tokens).

    Ours. For responses drawn from the target at this temperature and top-p it is, without bias, minus the number of
    drafts that a block accepts: block efficiency as a loss. It asks nothing about tokens that the target did not write.
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    log_ratio_NV = both.log_p_NV - both.log_q_NV
    # A sparse target's last token is the one that it wrote.
    sparse = isinstance(logits_q_NV, Sparse)
    log_ratio_N = log_ratio_NV[:, -1] if sparse else log_ratio_NV.gather(-1, positions.tokens_N[:, None])[:, 0]
    # A tie is no shortfall; nor is q = 0, outside the target's nucleus.
    accept_N = torch.where(log_ratio_N < 0, log_ratio_N, 0.0).exp()
    return -windowed_products(accept_N, positions.following_N, num_speculative_tokens).sum(-1)


def windowed_products(values_N: torch.Tensor, following_N: torch.Tensor, length: int) -> torch.Tensor:
    """prod_{i<=j} of the values from each position on, j < length; shape (N, length), zero past a response's end."""
    if length < 1:
        raise ValueError(f"num_speculative_tokens is {length}, must be at least 1")
    index_N = torch.arange(len(values_N), device=values_N.device)
    running_N, products = torch.ones_like(values_N), []
    for step in range(length):
        nearby_N = values_N[(index_N + step).clamp_max(max(len(values_N) - 1, 0))]
        running_N = torch.where(following_N >= step, running_N * nearby_N, 0.0)
        products.append(running_N)
    return torch.stack(products, dim=-1)
