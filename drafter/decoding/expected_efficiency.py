"""The expected block efficiency of a drafter, computed from sequences that the target generated, without decoding.

Consider a token x that the target generated at a position where the drafter proposes a token. Given the sequence, the
draft was accepted there with a probability that is independent of all other positions: the probability that x is
proposed and accepted, divided by q(x), the probability that x is generated. With the acceptance rule `ratio` it is
min(p(x), q(x)) / q(x) = min(1, p(x) / q(x)). With `argmax` it is 1 if x is the drafter's most likely token, which is
accepted with probability q(x), and 0 otherwise. With `match` it is p(x), as x is proposed and accepted with probability
p(x) q(x). So the blocks that cover a given sequence form a Markov chain over its positions, and their expected number
is a sum, without sampling. One forward pass of each model over the sequences gives it for every gamma and every rule;
`argmax` and `match` need none of the target.

The sequences have to be drawn from the target with the temperature and top-p at which the models are compared.

Shapes: B sequences, L tokens of the longest, N positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from drafter.decoding.acceptance import check_rule
from drafter.warping import Sampling, double, warp


def acceptance_of_written(
    logits_p_NV: torch.Tensor,
    logits_q_NV: torch.Tensor | None,
    tokens_N: torch.Tensor,
    sampling: Sampling,
    rule: str = "ratio",
) -> torch.Tensor:
    """Return the acceptance probabilities of generated tokens x, shape (N,), by an acceptance rule.

    With `ratio`, if q(x) is zero, as happens when rounding moves the boundary of the nucleus, the result is 1 where
    p(x) > 0.

    >>> logits_p_NV = torch.tensor([[0.1, 0.9], [0.4, 0.6]]).log()
    >>> logits_q_NV, tokens_N = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log(), torch.tensor([0, 1])
    >>> acceptance_of_written(logits_p_NV, logits_q_NV, tokens_N, Sampling(temperature=1.0))
    tensor([0.2000, 0.7500])
    >>> acceptance_of_written(logits_p_NV, None, tokens_N, Sampling(temperature=1.0), "argmax")
    tensor([0., 1.])
    >>> acceptance_of_written(logits_p_NV, None, tokens_N, Sampling(temperature=1.0), "match")
    tensor([0.1000, 0.6000])
    >>> acceptance_of_written(logits_p_NV, None, tokens_N, Sampling(temperature=0.0))
    tensor([0., 1.])

    Args:
        logits_p_NV: the drafter's logits.
        logits_q_NV: the target's logits, which the rule `ratio` needs above temperature 0; else it may be None.
        tokens_N: the tokens that the target generated.
        sampling: how both models' logits are warped.
        rule: the acceptance rule, one of acceptance.RULES.

    Raises:
        ValueError: the rule is unknown, or needs the target's logits, which are None.
    """
    check_rule(rule)
    if sampling.temperature == 0 or rule == "argmax":
        return (logits_p_NV.argmax(-1) == tokens_N).float()
    p_N = _probability(logits_p_NV, tokens_N, sampling)
    if rule == "match":
        return p_N
    if logits_q_NV is None:
        raise ValueError(f"the rule 'ratio' needs the target's logits above temperature 0, and here it is {sampling}")
    q_N = _probability(logits_q_NV, tokens_N, sampling)
    return torch.where(q_N > 0, (p_N / q_N.clamp_min(1e-30)).clamp_max(1), (p_N > 0).float())


def _probability(logits_NV: torch.Tensor, tokens_N: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    return warp(logits_NV, sampling).gather(-1, tokens_N[:, None])[:, 0]


def expected_blocks(accept_BL: torch.Tensor, lengths_B: torch.Tensor, num_speculative_tokens: int) -> torch.Tensor:
    """Return the expected number of blocks, that is, of target calls, for each sequence; shape (B,), in float64.

    The block efficiency over all sequences is the sum of their lengths divided by the sum of this. float64 is used
    where the device has it (see `double`).

    >>> always, half = torch.ones(1, 8), torch.full((1, 2), 0.5)
    >>> expected_blocks(always, torch.tensor([8]), num_speculative_tokens=3)  # two blocks of 3 drafts and a bonus token
    tensor([2.], dtype=torch.float64)
    >>> expected_blocks(half, torch.tensor([2]), num_speculative_tokens=1)  # one block, or two after a rejection
    tensor([1.5000], dtype=torch.float64)

    Args:
        accept_BL: each token's acceptance probability if it is drafted; values after a sequence's end are ignored.
        lengths_B: the number of tokens of each sequence.
        num_speculative_tokens: gamma, the number of drafted tokens per block.
    """
    count, longest = accept_BL.shape
    gamma, accept_BL = num_speculative_tokens, double(accept_BL)
    # Many steps on few numbers: numpy is several times faster than PyTorch, and on a GPU each step would be a kernel.
    accept_LB = np.zeros((longest + gamma, count))
    accept_LB[:longest] = accept_BL.cpu().numpy().T
    # begins_LB[s] is the probability that a block begins at position s.
    begins_LB = np.zeros((longest + gamma + 2, count))
    begins_LB[0] = 1
    for position in range(longest):
        reached_B = begins_LB[position]
        for accepted_B, next_B in zip(
            accept_LB[position : position + gamma], begins_LB[position + 1 : position + gamma + 1], strict=True
        ):
            next_B += reached_B * (1 - accepted_B)
            reached_B = reached_B * accepted_B
        begins_LB[position + gamma + 1] += reached_B
    inside_LB = np.arange(len(begins_LB))[:, None] < lengths_B.cpu().numpy()
    return torch.from_numpy((begins_LB * inside_LB).sum(0)).to(accept_BL.device)


def split_rows(values_N: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """Return concatenated sequences of values as rows (B, L), padded with zeros.

    >>> split_rows(torch.tensor([1, 2, 3]), torch.tensor([2, 1]))
    tensor([[1, 2],
            [3, 0]])
    """
    inside_BL = torch.arange(max(lengths_B.tolist(), default=0), device=values_N.device) < lengths_B[:, None]
    return torch.zeros(inside_BL.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(
        inside_BL, values_N
    )


class ExpectedBlocks(NamedTuple):
    """The blocks that cover a sequence, as expected numbers.

    Attributes:
        by_drafted: how many blocks have 0, 1, 2, … drafts.
        drafted_by_model: the drafts by a draft model.
    """

    by_drafted: np.ndarray
    drafted_by_model: float


def expected_blocks_with_proposals(
    proposals: Sequence[Sequence[int]], tokens: Sequence[int], accept_L: np.ndarray | None, num_speculative_tokens: int
) -> ExpectedBlocks:
    """Return the blocks of a generated sequence that is drafted without a model or, where this finds nothing, with one.

    A draft that counts as certain is accepted if and only if it is the token that the target generated: that token is
    drawn from q without the draft if the draft was rejected. So the blocks of such drafts follow from the sequence.

    >>> tokens, proposals = [5, 6, 7, 8], [[5, 6], [], [7, 9], []]
    >>> expected_blocks_with_proposals(proposals, tokens, None, 2)  # two drafts and a bonus token, then no draft
    ExpectedBlocks(by_drafted=array([1., 0., 1.]), drafted_by_model=0.0)
    >>> expected_blocks_with_proposals([[]] * 4, tokens, np.full(4, 0.5), 1)
    ExpectedBlocks(by_drafted=array([0.   , 2.875]), drafted_by_model=2.875)

    Args:
        proposals: what is proposed without a model if a block begins at each of the L tokens.
        tokens: the L generated tokens.
        accept_L: each token's acceptance probability if the model drafts it; None if there is no model.
        num_speculative_tokens: gamma, the most drafted tokens per block.
    """
    gamma, length = num_speculative_tokens, len(tokens)
    accept = np.zeros(length + gamma)
    accept[:length] = 0 if accept_L is None else accept_L
    begins, by_drafted, by_model = np.zeros(length + gamma + 2), np.zeros(gamma + 1), 0.0
    begins[0] = 1
    for position in range(length):
        drafts, reached = proposals[position][:gamma], begins[position]
        if drafts or accept_L is None:
            pairs = zip(drafts, [*tokens[position:], *[-1] * gamma], strict=False)
            accepted = next((number for number, (one, other) in enumerate(pairs) if one != other), len(drafts))
            begins[position + accepted + 1] += reached
            by_drafted[len(drafts)] += reached
            continue
        by_drafted[gamma] += reached
        by_model += gamma * reached
        for offset in range(gamma):
            begins[position + offset + 1] += reached * (1 - accept[position + offset])
            reached *= accept[position + offset]
        begins[position + gamma + 1] += reached
    return ExpectedBlocks(by_drafted, float(by_model))
