"""The K tokens that a trimmed drafter proposes, and the target's distributions that it is compared with.

Shapes: N positions, V vocabulary, K kept tokens.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch


class Kept(NamedTuple):
    """The K of V tokens that a trimmed drafter proposes (see `models.trimming`).

    Attributes:
        ids_K: their ids in ascending order, by which the drafter's logits are ordered.
        place_V: the place of each token of the vocabulary among them, and K for the others.
    """

    ids_K: torch.Tensor
    place_V: torch.Tensor

    @classmethod
    def from_ids(cls, ids: Iterable[int], vocabulary: int) -> "Kept":
        """Return the kept tokens of a vocabulary of so many tokens.

        >>> Kept.from_ids([3, 1], 4).place_V
        tensor([2, 0, 2, 1])
        """
        ids_K = torch.tensor(sorted(set(ids)))
        place_V = torch.full((vocabulary,), len(ids_K))
        place_V[ids_K] = torch.arange(len(ids_K))
        return cls(ids_K, place_V)

    def to(self, device: torch.device) -> "Kept":
        """Return the same on a device."""
        return Kept(self.ids_K.to(device), self.place_V.to(device))

    def mask(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return whether each token is kept, in the shape of the tokens."""
        return self.place_V[tokens] < len(self.ids_K)


class Trimmed(NamedTuple):
    """A target's distributions, to be compared with a drafter that proposes the kept tokens alone.

    The two distributions have K + 1 outcomes. The first K are the kept tokens, with the target's probabilities over the
    full vocabulary, which are not renormalised. The last one is any other token: the target has the rest of its mass
    there, and the drafter none. So the acceptance rate, TVD, JSD, reverse KL, e2e_tvd and block are those of the full
    vocabulary where the drafter's other logits are minus infinity. Three values are not:

    KLD is infinite there if the target has any mass at the other tokens. With the covered mass Q = sum_kept q, it is
    replaced by Q KL(q / Q || p) over the kept tokens. For a drafter p_e that spreads any fixed mass e > 0 over the
    other tokens and is (1 - e) p at the kept ones, KL(q || p_e) differs from this by a constant: the gradient is the
    same.

    CE is infinite where the target's most likely token is not kept, whatever the drafter does: it is zero there.

    TVD++ with exact estimates has its mean reward over the K + 1 outcomes, not over V tokens.

    At temperature 1 and top_p 1, the probabilities of the kept tokens are enough, so that no other logits are computed
    where `log_q` is given.

    Attributes:
        full: returns the target's logits over the full vocabulary, shape (N, V).
        kept: the tokens that the drafter proposes.
        log_q: returns the log-probabilities of the kept tokens at temperature 1, shape (N, K); None: from `full`.
        top_N: the most likely token; None: from `full`.
    """

    full: Callable[[], torch.Tensor]
    kept: Kept
    log_q: Callable[[], torch.Tensor] | None = None
    top_N: torch.Tensor | None = None

    @classmethod
    def from_logits(cls, logits_NV: torch.Tensor, kept: Kept) -> "Trimmed":
        """Return the distributions of a target whose logits exist."""
        return cls(lambda: logits_NV, kept)

    def untrim(self, logits_p_NK: torch.Tensor) -> torch.Tensor:
        """Return the drafter's logits over the full vocabulary, as `trimming.TrimmedHead` has them."""
        full_NV = logits_p_NK.new_full((len(logits_p_NK), len(self.kept.place_V)), -torch.inf)
        return full_NV.index_copy(-1, self.kept.ids_K, logits_p_NK)
