"""The chi-square test of a distribution of tokens, and the test of a mean.

Each accepts a correct decoder with probability 1 - FALSE_ALARM (with fixed seeds, it is decided once).
"""

import math

import numpy as np
import torch

FALSE_ALARM = 1e-3


def chi_square_tail(statistic, freedom):
    """Return P(X > statistic) for X ~ chi-square, by the regularised incomplete gamma function."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def p_value(counts, probabilities):
    """Return the p-value of the hypothesis that the counts come from the probabilities."""
    expected = probabilities * counts.sum()
    pooled = expected >= 5  # the usual condition; rarer tokens form one cell
    observed = np.append(counts[pooled], counts[~pooled].sum())
    expected = np.append(expected[pooled], expected[~pooled].sum())
    kept = expected > 0
    assert observed[~kept].sum() == 0, "a token was generated that has probability 0"
    if kept.sum() == 1:
        return 1.0  # only one outcome is possible
    statistic = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    return chi_square_tail(statistic, kept.sum() - 1)


def p_value_of_zero(differences):
    """Return the p-value of the hypothesis that the mean of the differences is zero, by the normal approximation."""
    error = np.std(differences) / len(differences) ** 0.5
    if error == 0:
        return float(differences[0] == 0)
    return math.erfc(abs(np.mean(differences)) / error / 2**0.5)
