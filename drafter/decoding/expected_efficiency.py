"""Block efficiency without decoding: from a text that the target wrote, how many blocks it would have taken.

A token x that the target wrote at a place where the drafter proposes was accepted with probability min(1, p(x) / q(x)),
given the text and independently of all other places: P(proposed and accepted) = min(p, q), P(written) = q. So the
blocks that cover a given text are a Markov chain over its places, and their expected number is a sum, not a sample:
no coin is tossed, no token drafted. One forward of each model over the texts gives it for every gamma.

It holds for texts drawn from the target with the temperature and top-p at which both models are compared.

Shapes: B texts, L tokens of the longest, N places, V vocabulary.
"""

import torch

from drafter.warping import Sampling, double, warp


def acceptance_of_written(
    logits_p_NV: torch.Tensor, logits_q_NV: torch.Tensor, tokens_N: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """min(1, p(x) / q(x)) for the tokens x that the target wrote, both models warped as in decoding; shape (N,).

    A token that the target gives no chance (it is outside a nucleus that rounding moved) counts by p alone.
    """
    if sampling.temperature == 0:
        return (logits_p_NV.argmax(-1) == tokens_N).float()
    p_N, q_N = (
        warp(logits_NV, sampling).gather(-1, tokens_N[:, None])[:, 0] for logits_NV in (logits_p_NV, logits_q_NV)
    )
    return torch.where(q_N > 0, (p_N / q_N.clamp_min(1e-30)).clamp_max(1), (p_N > 0).float())


def expected_blocks(accept_BL: torch.Tensor, lengths_B: torch.Tensor, num_speculative_tokens: int) -> torch.Tensor:
    """The expected number of blocks, target calls, that each text takes; shape (B,), in float64 (see `double`).

    Block efficiency over texts is the sum of their lengths over the sum of this.

    Args:
        accept_BL: the chance that a token would be accepted, were it drafted; anything past a text's end.
        lengths_B: tokens of each text.
    """
    count, longest = accept_BL.shape
    gamma, accept_BL = num_speculative_tokens, double(accept_BL)
    lengths_B = lengths_B.to(accept_BL.device)
    # begins[:, s]: the chance that a block begins at place s; those from a text's end on are nobody's.
    begins_BL = accept_BL.new_zeros(count, longest + gamma + 2)
    begins_BL[:, 0] = 1
    padded_BL = torch.cat([accept_BL, accept_BL.new_zeros(count, gamma)], 1)
    for place in range(longest):
        reached_B = begins_BL[:, place].clone()
        for step in range(gamma):
            accepted_B = padded_BL[:, place + step]
            begins_BL[:, place + step + 1] += reached_B * (1 - accepted_B)
            reached_B = reached_B * accepted_B
        begins_BL[:, place + gamma + 1] += reached_B
    inside_BL = torch.arange(begins_BL.shape[1], device=lengths_B.device) < lengths_B[:, None]
    return (begins_BL * inside_BL).sum(1)


def split_rows(values_N: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """Values of texts that follow each other, as rows (B, L), zeros past their ends."""
    inside_BL = torch.arange(max(lengths_B.tolist(), default=0), device=values_N.device) < lengths_B[:, None]
    return torch.zeros(inside_BL.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(
        inside_BL, values_N
    )
