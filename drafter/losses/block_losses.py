"""Losses of a block of drafted tokens: a value depends on its own position and on the positions that follow.

The arguments are those of the losses in `divergences`, and the `Positions` of the batch.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch

from drafter.losses.distributions import Sparse, Target, at_tokens, pair
from drafter.losses.divergences import acceptance_rate
from drafter.losses.objective import Loss, Objective, Positions, declares

NUM_SPECULATIVE_TOKENS = 3


def _block_objective(loss: Loss, settings: Mapping[str, Any]) -> Objective:
    """Return an objective with the lookahead of the block: num_speculative_tokens - 1 positions."""
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
    """Return one minus the expected share of a block that is accepted (arXiv 2606.12370).

    The value at a position is 1 - (1/gamma) sum_{j<=gamma} prod_{i<=j} alpha_i over the gamma positions that start
    there, where alpha_i = sum_x min(p, q) is the acceptance rate at position i. Acceptances at different positions are
    treated as independent. Near the end of a response, the block has only the remaining positions. Use it for sampled
    serving with a known gamma.

        >>> logits = torch.tensor([[0.0, 0.0], [-100.0, 100.0]])  # two positions of one response
        >>> positions = Positions(tokens_N=torch.tensor([0, 0]), following_N=torch.tensor([1, 0]))
        >>> e2e_tvd(logits, -logits, positions=positions)  # the first draft is always accepted, the second never
        tensor([0.5000, 1.0000])
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
    """Return minus the expected number of accepted tokens of a block: block efficiency as a loss (this project's own).

    The value at a position is -sum_{j<=gamma} prod_{i<=j} min(1, p(x_i) / q(x_i)), where x_1 … x_gamma are the tokens
    of the response from that position on. It is an unbiased estimate if the responses were drawn from the target at
    this temperature and top_p. It depends on the probabilities of the response's tokens alone.

        >>> target = torch.tensor([[0.0, 0.0], [0.0, 0.0]])  # q = 1/2 for both tokens, at two positions
        >>> drafter = torch.tensor([[1.0, 1.0], [1.0, 3.0]]).log()  # p(token 0) = 1/2, then 1/4
        >>> positions = Positions(tokens_N=torch.tensor([0, 0]), following_N=torch.tensor([1, 0]))
        >>> block(drafter, target, positions=positions)  # 1 + 1 · 1/2, then 1/2
        tensor([-1.5000, -0.5000])
    """
    both = pair(logits_p_NV, logits_q_NV, temperature, top_p)
    log_ratio_NV = both.log_p_NV - both.log_q_NV
    if isinstance(logits_q_NV, Sparse):  # its last token is the response's
        log_ratio_N = log_ratio_NV[:, -1]
    else:
        log_ratio_N = at_tokens(log_ratio_NV, logits_q_NV, positions.tokens_N, absent=-torch.inf)
    # p >= q is accepted; so is q = 0, outside the target's nucleus, where the ratio is infinite.
    accept_N = torch.where(log_ratio_N < 0, log_ratio_N, 0.0).exp()
    return -windowed_products(accept_N, positions.following_N, num_speculative_tokens).sum(-1)


def windowed_products(values_N: torch.Tensor, following_N: torch.Tensor, length: int) -> torch.Tensor:
    """Return the products of each value with the j that follow it, for j < length.

    Entry (n, j) is values[n] · … · values[n + j], or zero where n + j is past the end of the response.
    Shape (N, length).

        >>> windowed_products(torch.tensor([0.5, 0.4, 0.1]), following_N=torch.tensor([2, 1, 0]), length=2)
        tensor([[0.5000, 0.2000],
                [0.4000, 0.0400],
                [0.1000, 0.0000]])

    Raises:
        ValueError: length is below 1.
    """
    if length < 1:
        raise ValueError(f"num_speculative_tokens is {length}, must be at least 1")
    index_N = torch.arange(len(values_N), device=values_N.device)
    running_N, products = torch.ones_like(values_N), []
    for step in range(length):
        ahead_N = values_N[(index_N + step).clamp_max(max(len(values_N) - 1, 0))]
        running_N = torch.where(following_N >= step, running_N * ahead_N, 0.0)
        products.append(running_N)
    return torch.stack(products, dim=-1)
