"""The K tokens that a trimmed drafter proposes, and the target's distributions that it is compared with.

A drafter that proposes all tokens can be trained with the K tokens and a sample of the others (`SampledTokens`).

Shapes: N positions, V vocabulary, K kept tokens, S sampled ones of the others.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch


class Kept(NamedTuple):
    """The K of V tokens that have outcomes of their own in a loss; all others together are one more outcome.

    A trimmed drafter proposes these tokens alone (see `models.trimming`). If others are sampled, the drafter proposes
    all tokens, and its logits are those of the K tokens, followed by those of the sample.

    Attributes:
        ids_K: their ids in ascending order, by which the drafter's logits are ordered.
        place_V: the place of each token of the vocabulary among them, and K for the others.
        sampled_S: ids of other tokens, drawn uniformly without replacement; None: the drafter proposes no others.
    """

    ids_K: torch.Tensor
    place_V: torch.Tensor
    sampled_S: torch.Tensor | None = None

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

    @property
    def rows(self) -> torch.Tensor:
        """The rows of the output embedding that the drafter's logits come from, shape (K,) or (K + S,)."""
        return self.ids_K if self.sampled_S is None else torch.cat([self.ids_K, self.sampled_S])

    def to(self, device: torch.device) -> "Kept":
        """Return the same on a device."""
        sampled_S = None if self.sampled_S is None else self.sampled_S.to(device)
        return Kept(self.ids_K.to(device), self.place_V.to(device), sampled_S)

    def mask(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return whether the drafter can propose each token, in the shape of the tokens."""
        if self.sampled_S is not None:
            return torch.ones_like(tokens, dtype=torch.bool)
        return self.place_V[tokens] < len(self.ids_K)

    def outcomes(self, logits_NR: torch.Tensor) -> torch.Tensor:
        """Return the drafter's logits of the outcomes that it can propose, shape (N, K), or (N, K + 1) with a sample.

        Of the sample, (V - K) / S times the sum of exp(logit) estimates the other tokens' sum without bias.

            >>> kept = Kept.from_ids([0], 5)._replace(sampled_S=torch.tensor([2, 4]))
            >>> kept.outcomes(torch.tensor([[3.0, 1.0, 2.0]]).log()).exp().round()  # 4 / 2 (1 + 2)
            tensor([[3., 6.]])
        """
        if self.sampled_S is None:
            return logits_NR
        number, count = len(self.ids_K), len(self.sampled_S)
        log_scale = math.log((len(self.place_V) - number) / count)
        rest_N1 = logits_NR[:, number:].logsumexp(-1, keepdim=True) + log_scale
        return torch.cat([logits_NR[:, :number], rest_N1], -1)


class SampledTokens(NamedTuple):
    """The tokens whose rows of the output embedding a training step uses: the kept ones, and a sample of the others.

    Source: complementary sum sampling (Botev, Zheng and Barber, AISTATS 2017): the normalising sum of a softmax is
    computed exactly over the classes that matter, and its rest is estimated from a uniform sample. There the exact part
    is the correct class; here it is the most frequent tokens.

    Attributes:
        kept: the tokens of every step.
        number: how many of the others are drawn.
        seed: the seed of the draws. They depend on it and on the step alone, so that a resumed run, every rank and
            every accumulated batch have the same.
    """

    kept: Kept
    number: int
    seed: int

    def to(self, device: torch.device) -> "SampledTokens":
        """Return the same on a device, where `of_step` then returns its tokens."""
        return self._replace(kept=self.kept.to(device))

    def of_step(self, step: int) -> Kept:
        """Return the tokens of a step."""
        others = (self.kept.place_V == len(self.kept.ids_K)).nonzero()[:, 0]
        drawn = np.random.default_rng([self.seed, step]).choice(len(others), self.number, replace=False)
        return self.kept._replace(sampled_S=others[torch.from_numpy(drawn).to(others.device)])


class Trimmed(NamedTuple):
    """A target's distributions, to be compared with a drafter that proposes the kept tokens alone.

    The two distributions have K + 1 outcomes. The first K are the kept tokens, with the target's probabilities over the
    full vocabulary, which are not renormalised. The last one is any other token: the target has the rest of its mass
    there, and the drafter none. So the acceptance rate, TVD, JSD, reverse KL, hit, e2e_tvd and block are those of the
    full vocabulary where the drafter's other logits are minus infinity. Three values are not:

    KLD is infinite there if the target has any mass at the other tokens. With the covered mass Q = sum_kept q, it is
    replaced by Q KL(q / Q || p) over the kept tokens. For a drafter p_e that spreads any fixed mass e > 0 over the
    other tokens and is (1 - e) p at the kept ones, KL(q || p_e) differs from this by a constant: the gradient is the
    same.

    CE is infinite where the target's most likely token is not kept, whatever the drafter does: it is zero there. So are
    hit and -log alpha where no kept token is in the target's nucleus.

    TVD++ with exact estimates has its mean reward over the K + 1 outcomes, not over V tokens.

    If other tokens are sampled (`Kept.sampled_S`), the drafter has mass at the last outcome, which the sample
    estimates. Every loss but hit is then the usual one of K + 1 outcomes: no value is infinite, and none is replaced.
    With the exact mass, KLD, reverse KL, JSD and TVD would be lower bounds of those of the full vocabulary, because
    outcomes are merged, and so is CE where the most likely token is not kept: -log p(any other token). The drafter
    learns how much mass the other tokens have together, not which of them is likely. The estimate of the sum of
    exp(logit) is unbiased; its logarithm, and so a loss, has a bias that shrinks as the sample grows. Where the
    target's mass of the other tokens is below the rounding of 1, it counts as that rounding.

    hit then counts drafts of kept tokens alone. The product of both masses at the last outcome would count each draft
    of another token as hit by every other token, so that a drafter that is sure of "any other token" could be the best
    one. Counting none there gives, with the exact mass, an upper bound of the loss of the full vocabulary, and the best
    drafter is the best among the kept tokens. So it learns to propose kept tokens alone, and the sample lowers the
    other logits: this makes a drafter with a whole output embedding for engines, not one that proposes rare tokens.

    At temperature 1 and top_p 1, the probabilities of the kept tokens are enough, so that no other logits are computed
    where `log_q` is given.

    Attributes:
        full: returns the target's logits over the full vocabulary, shape (N, V).
        kept: the tokens that have outcomes of their own.
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
