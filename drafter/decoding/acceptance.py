"""The accept test, and what a block gives: the part of speculative decoding that keeps the target's distribution.

Source: Leviathan et al., arXiv 2211.17192, algorithm 1. Shapes: B texts, G drafted tokens, V vocabulary.
"""

from typing import NamedTuple

import torch

from drafter.warping import draw


class Block(NamedTuple):
    """One target call: the tokens drafted, how many of them were accepted, and the tokens that it gave.

    `emitted` is the accepted tokens and the target's own one, cut where a stop token or the limit ends the text.
    `chances` are the probabilities with which each drafted token would be accepted, were it tested; `room` is how many
    of them can be followed by another token (those before the first stop token).
    """

    drafted: list[int]
    accepted: int
    emitted: list[int]
    chances: tuple[float, ...] = ()
    room: int = 0

    @property
    def tested(self) -> int:
        """Drafted tokens that met the accept test: those behind the first rejection or the end never did."""
        return min(self.accepted + 1, len(self.drafted), len(self.emitted))

    @property
    def expected(self) -> float:
        """How many tokens a block with these drafts gives on average over the accept test's coins (Rao-Blackwell).

        Where an accepted draft would end the text, nothing comes after it.
        """
        total, reached = 1.0, 1.0
        for chance in self.chances[: self.room]:
            reached *= chance
            total += reached
        return total


def verify(
    drafted_BG: torch.Tensor,
    p_BGV: torch.Tensor,
    q_BGV: torch.Tensor,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept a prefix of the drafted tokens and choose the target's own next token.

    Token i is accepted with probability min(1, q(x_i) / p(x_i)). After a rejection the next token is drawn from
    max(q - p, 0), normalised; after none, from the target's last distribution. The result is a sample of q.

    Args:
        drafted_BG: token ids drawn from p_BGV, place by place.
        p_BGV: the drafter's warped probabilities at G places.
        q_BGV: the target's warped probabilities at G + 1 places.

    Returns:
        how many drafted tokens are accepted (B,), the next token (B,), and each token's chance to be accepted (B, G).
    """
    count = drafted_BG.shape[1]
    chosen_BG1 = drafted_BG[..., None]
    p_BG, q_BG = p_BGV.gather(-1, chosen_BG1)[..., 0], q_BGV[:, :count].gather(-1, chosen_BG1)[..., 0]
    uniform_BG = torch.rand(p_BG.shape, generator=generator, device=p_BG.device)
    accepted_B = (uniform_BG * p_BG < q_BG).long().cumprod(1).sum(1)
    final_BV = _at(q_BGV, accepted_B)
    if count:
        against_BV = _at(p_BGV, accepted_B.clamp_max(count - 1))
        residual_BV = (final_BV - against_BV).clamp_min(0)
        # Where p = q up to rounding, a rejection has probability ~0, and the residual is q itself.
        use_B1 = (accepted_B[:, None] < count) & (residual_BV.sum(-1, keepdim=True) > 0)
        final_BV = torch.where(use_B1, residual_BV, final_BV)
    own_B = draw(final_BV, generator)
    return accepted_B, own_B, (q_BG / p_BG).clamp_max(1)


def _at(values_BGV: torch.Tensor, places_B: torch.Tensor) -> torch.Tensor:
    """One place of each text, shape (B, V)."""
    return values_BGV.gather(1, places_B[:, None, None].expand(-1, 1, values_BGV.shape[-1]))[:, 0]


def verify_greedy(drafted: list[list[int]], best: list[list[int]]) -> tuple[list[int], list[int], list[list[float]]]:
    """`verify` for distributions with all mass on one token: the target's best one at each of G + 1 places."""
    chances = [[float(x == y) for x, y in zip(*row, strict=False)] for row in zip(drafted, best, strict=True)]
    accepted = [next((place for place, chance in enumerate(row) if not chance), len(row)) for row in chances]
    return accepted, [row[place] for row, place in zip(best, accepted, strict=True)], chances


def settled(drafted: list[int], accepted: int, own: int, chances: list[float], room: int, stop_ids: list[int]) -> Block:
    """A text's block, cut where its room or a stop token ends it: other texts may have had more room to draft in."""
    emitted = _until_stop([*drafted[:accepted], own], stop_ids)[:room]
    drafted = drafted[: room - 1]
    before_stop = len(_until_stop([*drafted, -1], stop_ids)) - 1
    return Block(
        drafted, min(accepted, len(emitted), len(drafted)), emitted, tuple(chances[: len(drafted)]), before_stop
    )


def _until_stop(tokens: list[int], stop_ids: list[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]
