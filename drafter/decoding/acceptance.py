"""The acceptance rules of speculative decoding, which keep the target's distribution, and the block that results.

Let p be the drafter's warped distribution and q the target's. Above temperature 0, engines follow one of three rules:

- `ratio`: the draft x is drawn from p, and accepted with probability min(1, q(x) / p(x)); after a rejection the token
  is drawn from max(q - p, 0), normalised (Leviathan et al., arXiv 2211.17192, algorithm 1).
- `argmax`: the draft x is the most likely token of p, and accepted with probability q(x); after a rejection the token
  is drawn from q without x, normalised.
- `match`: the draft x is drawn from p, and accepted if an independent draw from q equals it; if not, that draw is the
  token. So x is accepted with probability q(x), and the token after a rejection is distributed as q without x.

`argmax` and `match` differ in the draft alone: both are the first rule with a p that is certain of the draft. At
temperature 0 the three are the same.

Shapes: B sequences, G drafted tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from drafter.warping import Random, draw, uniform

RULES = ("ratio", "argmax", "match")


def check_rule(rule: str) -> None:
    """Raise ValueError if there is no such acceptance rule.

    >>> check_rule("argmax")
    >>> check_rule("typical")
    Traceback (most recent call last):
    ...
    ValueError: the acceptance rule is 'typical', must be ratio, argmax or match
    """
    if rule not in RULES:
        raise ValueError(f"the acceptance rule is {rule!r}, must be {', '.join(RULES[:-1])} or {RULES[-1]}")


def check_rules(rules: Sequence[str]) -> tuple[str, ...]:
    """Return the acceptance rules as a tuple. Raise ValueError if there is none, an unknown one or one twice.

    >>> check_rules(["ratio", "ratio"])
    Traceback (most recent call last):
    ...
    ValueError: the acceptance rules are ['ratio', 'ratio'], must be at least one, each once
    """
    if isinstance(rules, str) or not rules or len(set(rules)) < len(rules):
        raise ValueError(f"the acceptance rules are {rules!r}, must be at least one, each once")
    for rule in rules:
        check_rule(rule)
    return tuple(rules)


class Block(NamedTuple):
    """The tokens of one target call.

    Attributes:
        drafted: the tokens that the drafter proposed.
        accepted: how many of them, from the first on, were accepted.
        emitted: the accepted tokens and the bonus token, cut at a stop token or at the length limit.
        acceptance_probabilities: for each drafted token, the probability of its acceptance if it is tested.
        extendable: the number of drafted tokens before the first stop token, which another token can follow.
    """

    drafted: list[int]
    accepted: int
    emitted: list[int]
    acceptance_probabilities: tuple[float, ...] = ()
    extendable: int = 0

    @property
    def tested(self) -> int:
        """The number of drafted tokens that were tested: all up to the first rejection or the end of the sequence."""
        return min(self.accepted + 1, len(self.drafted), len(self.emitted))

    @property
    def expected(self) -> float:
        """The expected number of emitted tokens given the drafts, over the randomness of the acceptance rule.

        With acceptance probabilities a_1, a_2, … it is 1 + a_1 + a_1 a_2 + …, up to the first stop token, as nothing
        follows that one. It has the mean of `len(emitted)` with less variance (Rao-Blackwell).
        """
        total, reached = 1.0, 1.0
        for probability in self.acceptance_probabilities[: self.extendable]:
            reached *= probability
            total += reached
        return total


class Verification(NamedTuple):
    """The result of the acceptance rule for B sequences.

    Attributes:
        accepted: the number of accepted tokens of each sequence.
        bonus: the token of each sequence that follows the accepted ones.
        acceptance_probabilities: those of the G drafted tokens of each sequence.
    """

    accepted: list[int]
    bonus: list[int]
    acceptance_probabilities: list[list[float]]


class VerificationTensors(NamedTuple):
    """`Verification` on the device of the models."""

    accepted_B: torch.Tensor
    bonus_B: torch.Tensor
    acceptance_probabilities_BG: torch.Tensor

    def to_lists(self) -> Verification:
        """Return the same as Python numbers."""
        return Verification(self.accepted_B.tolist(), self.bonus_B.tolist(), self.acceptance_probabilities_BG.tolist())


def verify(
    drafted_BG: torch.Tensor,
    p_BGV: torch.Tensor | None,
    q_BGV: torch.Tensor,
    generator: Random = None,
    lengths: Sequence[int] | None = None,
) -> VerificationTensors:
    """Accept a prefix of the drafted tokens and choose the bonus token.

    Token x_i is accepted with probability min(1, q(x_i) / p(x_i)). After a rejection the bonus token is drawn from
    max(q - p, 0), normalised; if all are accepted, from the target's last distribution. The tokens are then a sample
    of the target's distribution. Without p, each draft is taken as certain, p(x_i) = 1, which is correct however it was
    chosen, as long as that does not depend on the random numbers drawn here.

    Args:
        drafted_BG: the drafted token ids; each is drawn from the distribution in p_BGV at its position.
        p_BGV: the drafter's warped probabilities at G positions for the rule `ratio`; None for `argmax` and `match`.
        q_BGV: the target's warped probabilities at G + 1 positions.
        generator: the source of random numbers, which may differ by sequence.
        lengths: how many of each sequence's drafted tokens count; None: all G.
    """
    count = drafted_BG.shape[1]
    lengths = [count] * len(drafted_BG) if lengths is None else lengths
    drafted_BG1 = drafted_BG[..., None]
    q_BG = q_BGV[:, :count].gather(-1, drafted_BG1)[..., 0]
    p_BG = torch.ones_like(q_BG) if p_BGV is None else p_BGV.gather(-1, drafted_BG1)[..., 0]
    uniform_BG = uniform(lengths, count, generator, p_BG.device)
    length_B1 = torch.tensor(lengths, device=p_BG.device)[:, None]
    counts_BG = torch.arange(count, device=p_BG.device) < length_B1
    accepted_B = ((uniform_BG * p_BG < q_BG) & counts_BG).long().cumprod(1).sum(1)
    bonus_BV = _at(q_BGV, accepted_B)
    if count:
        last_B = accepted_B.clamp_max(count - 1)
        if p_BGV is None:
            residual_BV = bonus_BV.scatter(1, drafted_BG.gather(1, last_B[:, None]), 0.0)
        else:
            residual_BV = (bonus_BV - _at(p_BGV, last_B)).clamp_min(0)
        # If p equals q up to rounding, the residual may be zero everywhere; a rejection is then all but impossible.
        use_B1 = (accepted_B[:, None] < length_B1) & (residual_BV.sum(-1, keepdim=True) > 0)
        bonus_BV = torch.where(use_B1, residual_BV, bonus_BV)
    bonus_B = draw(bonus_BV, generator)
    return VerificationTensors(accepted_B, bonus_B, (q_BG / p_BG).clamp_max(1))


def _at(values_BGV: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """Return the values at one position of each sequence, shape (B, V)."""
    return values_BGV.gather(1, positions_B[:, None, None].expand(-1, 1, values_BGV.shape[-1]))[:, 0]


def verify_greedy(drafted: list[list[int]], best: list[list[int]]) -> Verification:
    """Verify greedy decoding, where each of the rules accepts a token if it is the target's most likely one.

    Args:
        drafted: the drafted tokens of each sequence that count, at most G.
        best: the target's most likely token at each of G + 1 positions, per sequence.
    """
    probabilities = [[float(x == y) for x, y in zip(*row, strict=False)] for row in zip(drafted, best, strict=True)]
    accepted = [next((i for i, value in enumerate(row) if not value), len(row)) for row in probabilities]
    bonus = [row[count] for row, count in zip(best, accepted, strict=True)]
    return Verification(accepted, bonus, probabilities)


def truncate_block(
    drafted: list[int],
    accepted: int,
    bonus: int,
    acceptance_probabilities: list[float],
    stop_ids: Sequence[int],
) -> Block:
    """Return one sequence's block, cut at the first stop token.

    Args:
        drafted: the drafted tokens that count.
        accepted: how many of them were accepted.
        bonus: the token that follows these.
        acceptance_probabilities: those of the drafted tokens, and perhaps of others after them.
        stop_ids: tokens that end a sequence.
    """
    emitted = _until_stop([*drafted[:accepted], bonus], stop_ids)
    extendable = len(_until_stop([*drafted, -1], stop_ids)) - 1
    return Block(
        drafted,
        min(accepted, len(emitted)),
        emitted,
        tuple(acceptance_probabilities[: len(drafted)]),
        extendable,
    )


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]
