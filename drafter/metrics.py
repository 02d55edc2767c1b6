"""Counts -> block efficiency, acceptance rate, memory-bound speed-up, token-rate ratio, with bootstrap intervals.

Every figure is a ratio of sums over prompts (counts add up over ranks, seeds and runs; averages of ratios do not), and
its interval comes from resampling prompts. Convention: block efficiency counts the target's own token of each block, so
it lies between 1 (nothing accepted) and gamma + 1.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # the tables read counts on machines without torch
    from drafter.decoding.acceptance import Block
    from drafter.decoding.speculative import Decoded


class Counts(NamedTuple):
    """What one prompt's decoding adds up to; `baseline_*` is autoregressive decoding of the same prompt.

    `expected` is the tokens that its blocks would give on average over the accept test's coins.
    """

    tokens: int
    target_calls: int
    accepted: int
    tested: int
    seconds: float
    baseline_tokens: int
    baseline_seconds: float
    drafted: int = 0
    expected: float = 0.0
    drafting_seconds: float = 0.0
    verifying_seconds: float = 0.0


class Estimate(NamedTuple):
    """A value and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def count(decoded: "Decoded", baseline: "Decoded") -> Counts:
    """The counts of one prompt."""
    return Counts(
        tokens=len(decoded.tokens),
        target_calls=len(decoded.blocks),
        accepted=sum(block.accepted for block in decoded.blocks),
        tested=sum(block.tested for block in decoded.blocks),
        seconds=decoded.seconds.total,
        baseline_tokens=len(baseline.tokens),
        baseline_seconds=baseline.seconds.total,
        drafted=sum(len(block.drafted) for block in decoded.blocks),
        expected=sum(block.expected for block in decoded.blocks),
        drafting_seconds=decoded.seconds.drafting,
        verifying_seconds=decoded.seconds.verifying,
    )


def by_position(blocks: "Iterable[Block]") -> tuple[list[int], list[int]]:
    """How many drafted tokens were accepted, and how many tested, at each place of a block."""
    accepted: list[int] = []
    tested: list[int] = []
    for block in blocks:
        for places, count in ((accepted, block.accepted), (tested, block.tested)):
            places += [0] * (block.tested - len(places))
            for place in range(count):
                places[place] += 1
    return accepted, tested


def block_efficiency(rows: np.ndarray) -> np.ndarray:
    """tau = tokens / target calls. `rows` has the fields of Counts along its last axis."""
    return _field(rows, "tokens") / _field(rows, "target_calls")


def expected_block_efficiency(rows: np.ndarray) -> np.ndarray:
    """tau with each accept test's chance in the place of its coin (Rao-Blackwell): the same mean, less noise."""
    return _field(rows, "expected") / _field(rows, "target_calls")


def acceptance_rate(rows: np.ndarray) -> np.ndarray:
    """alpha = accepted / tested drafted tokens; not a number where nothing was drafted."""
    with np.errstate(invalid="ignore"):
        return _field(rows, "accepted") / _field(rows, "tested")


def token_rate_ratio(rows: np.ndarray) -> np.ndarray:
    """Tokens per second with the drafter / without, on the same prompts in the same run."""
    speculative = _field(rows, "tokens") / _field(rows, "seconds")
    return speculative * _field(rows, "baseline_seconds") / _field(rows, "baseline_tokens")


def memory_bound_speedup(block_efficiency: float, size_ratio: float, num_speculative_tokens: float) -> float:
    """MBSU = tau / (c gamma + 1), c being drafter parameters / target parameters (paper, section 3).

    Where gamma is chosen block by block, its mean.
    """
    return block_efficiency / (size_ratio * num_speculative_tokens + 1)


FIGURES = {
    "block_efficiency": block_efficiency,
    "expected_block_efficiency": expected_block_efficiency,
    "acceptance_rate": acceptance_rate,
    "token_rate_ratio": token_rate_ratio,
}


def by_prompt(prompts: Iterable[str], counts: Iterable[Counts]) -> dict[str, np.ndarray]:
    """Counts summed over everything that shares a prompt (its seeds): the unit that is resampled."""
    sums: dict[str, np.ndarray] = {}
    for prompt, row in zip(prompts, counts, strict=True):
        sums[prompt] = sums.get(prompt, np.zeros(len(Counts._fields))) + np.array(row)
    return sums


def estimate(rows: dict[str, np.ndarray], figure: str, resamples: int = 2000) -> Estimate:
    """A figure of FIGURES over all prompts, with its bootstrap 95% interval."""
    matrix = np.stack(list(rows.values()))
    draws = FIGURES[figure](_resampled_sums(matrix[None], resamples)[0])
    return _estimate(float(FIGURES[figure](matrix.sum(0))), draws)


def paired_difference(
    rows: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    figure: str,
    resamples: int = 2000,
    factors: tuple[float, float] = (1.0, 1.0),
) -> Estimate:
    """How much a figure of `rows` exceeds that of `reference`: both are resampled by the same draw of prompts.

    Each is multiplied by its factor first: what turns tau into MBSU is a constant of the drafter's.

    Raises:
        ValueError: the two were not measured on the same prompts.
    """
    if rows.keys() != reference.keys():
        raise ValueError(f"a paired difference needs the same prompts: {len(rows)} against {len(reference)}")
    matrices = np.stack([np.stack([part[name] for name in rows]) for part in (rows, reference)])
    ours, theirs = FIGURES[figure](_resampled_sums(matrices, resamples))
    value, base = FIGURES[figure](matrices.sum(1))
    return _estimate(float(factors[0] * value - factors[1] * base), factors[0] * ours - factors[1] * theirs)


def _resampled_sums(matrices: np.ndarray, resamples: int) -> np.ndarray:
    """Sums over prompts drawn with replacement: (K, prompts, fields) -> (K, resamples, fields), one draw for all K."""
    size = matrices.shape[1]
    weights = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), resamples)
    return weights @ matrices


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    return Estimate(value, *(float(end) for end in np.nanpercentile(draws, [2.5, 97.5])))


def _field(rows: np.ndarray, name: str) -> np.ndarray:
    return rows[..., Counts._fields.index(name)]
