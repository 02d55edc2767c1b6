"""Block efficiency, acceptance rate, memory-bound speed-up and token-rate ratio from counts, with bootstrap intervals.

Every measure is a ratio of sums over prompts: counts add up over ranks, seeds and runs, whereas averages of ratios do
not. Its interval comes from resampling prompts, or whole conversations of several turns. Block efficiency counts the
bonus token of each block, so it lies between 1 (no draft accepted) and gamma + 1.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # the tables read counts on machines without torch
    from drafter.decoding.acceptance import Block
    from drafter.decoding.speculative import Decoded

Ratio = Callable[[np.ndarray], np.ndarray]  # of sums of fields, the last axis, such as those of Counts


class Counts(NamedTuple):
    """The counts of one prompt's decoding, or their sums over prompts.

    Attributes:
        tokens: generated tokens.
        target_calls: calls of the target, which is the number of blocks; a fraction if it is an expectation.
        accepted: accepted drafted tokens.
        tested: drafted tokens that were accepted or rejected; those after a rejection are not tested.
        seconds: wall-clock time; NaN if it was not measured.
        baseline_tokens: generated tokens of autoregressive decoding of the same prompt.
        baseline_seconds: wall-clock time of autoregressive decoding of the same prompt.
        drafted: drafted tokens.
        expected: the sum of the blocks' expected numbers of tokens (see decoding.acceptance.Block.expected).
        drafting_seconds: the part of `seconds` spent on drafting.
        verifying_seconds: the part of `seconds` spent on verification.
    """

    tokens: int
    target_calls: float
    accepted: int = 0
    tested: int = 0
    seconds: float = np.nan
    baseline_tokens: int = 0
    baseline_seconds: float = np.nan
    drafted: int = 0
    expected: float = 0.0
    drafting_seconds: float = 0.0
    verifying_seconds: float = 0.0


TIMES = ("seconds", "baseline_seconds", "drafting_seconds", "verifying_seconds")  # the fields of Counts that are times


def read_row(row: Mapping[str, Any]) -> Counts:
    """Return the counts in a row of counts.jsonl. A time that was not measured, None in the row, is NaN."""
    return Counts._make(np.nan if row[field] is None else row[field] for field in Counts._fields)


class Estimate(NamedTuple):
    """A value and the bounds of its 95% interval."""

    value: float
    low: float
    high: float


def count(decoded: "Decoded", baseline: "Decoded") -> Counts:
    """Return the counts of one prompt."""
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
    """Return the numbers of accepted and of tested drafted tokens at each position of a block.

    >>> from drafter.decoding.acceptance import Block
    >>> blocks = [
    ...     Block(drafted=[1, 2, 3], accepted=3, emitted=[1, 2, 3, 4]),
    ...     Block(drafted=[5, 6, 7], accepted=1, emitted=[5, 9]),
    ... ]
    >>> by_position(blocks)
    ([2, 1, 1], [2, 2, 1])
    """
    accepted: list[int] = []
    tested: list[int] = []
    for block in blocks:
        for counts, number in ((accepted, block.accepted), (tested, block.tested)):
            counts += [0] * (block.tested - len(counts))
            for position in range(number):
                counts[position] += 1
    return accepted, tested


ANSWER_POSITIONS = (0, 32, 128, 512, 2048)  # where the bins of positions in an answer begin, in tokens


def answer_positions(length: int) -> list[str]:
    """Return for each token of an answer the bin of its position, such as "32-127", from the answer's first token on.

    >>> answer_positions(34)[31:]
    ['0-31', '32-127', '32-127']
    """
    ends = (*ANSWER_POSITIONS[1:], None)
    labels: list[str] = []
    for start, end in zip(ANSWER_POSITIONS, ends, strict=True):
        inside = max(0, min(length, end or length) - start)
        labels += [f"{start}+" if end is None else f"{start}-{end - 1}"] * inside
    return labels


def by_label(blocks: "Iterable[Block]", labels: Sequence[str]) -> dict[str, list[int]]:
    """Return the numbers of tokens and of target calls by the label of each block's first token.

    A block counts as a whole, with all its tokens, so that the sums over the labels are the totals.

    >>> from drafter.decoding.acceptance import Block
    >>> blocks = [Block([1, 2], 2, [1, 2, 3]), Block([4, 5], 0, [6]), Block([7, 8], 1, [7, 9])]
    >>> by_label(blocks, ["thinking", "thinking", "answer", "answer", "answer", "answer"])
    {'thinking': [3, 1], 'answer': [3, 2]}

    Args:
        blocks: the blocks of a decoding.
        labels: a label for each token of the decoding.
    """
    found: dict[str, list[int]] = {}
    position = 0
    for block in blocks:
        counts = found.setdefault(labels[position], [0, 0])
        counts[0] += len(block.emitted)
        counts[1] += 1
        position += len(block.emitted)
    return found


def turn_id(conversation: str, turn: int) -> str:
    """Return the id of a turn's prompt: the conversation's id, and for a later turn its number.

    >>> turn_id("chat:7", 1), turn_id("chat:7", 2)
    ('chat:7', 'chat:7#2')
    """
    return conversation if turn == 1 else f"{conversation}#{turn}"


def conversation_and_turn(prompt_id: str) -> tuple[str, int]:
    """Return the conversation's id and the turn that `turn_id` has put together."""
    found = re.fullmatch(r"(.*)#(\d+)", prompt_id, re.DOTALL)
    return (found[1], int(found[2])) if found else (prompt_id, 1)


def block_efficiency(rows: np.ndarray) -> np.ndarray:
    """Return tau, the number of tokens per target call. The last axis of `rows` has the fields of Counts.

    >>> row = np.array(Counts(tokens=12, target_calls=5, accepted=7, tested=10, seconds=2.0, baseline_tokens=12,
    ...     baseline_seconds=3.0, expected=11.0))
    >>> print(block_efficiency(row), expected_block_efficiency(row), acceptance_rate(row), token_rate_ratio(row))
    2.4 2.2 0.7 1.5
    """
    return _field(rows, "tokens") / _field(rows, "target_calls")


def expected_block_efficiency(rows: np.ndarray) -> np.ndarray:
    """Return tau with the blocks' expected numbers of tokens: the same mean with less variance (Rao-Blackwell)."""
    return _field(rows, "expected") / _field(rows, "target_calls")


def acceptance_rate(rows: np.ndarray) -> np.ndarray:
    """Return alpha, the share of the tested drafted tokens that were accepted; NaN where none was tested."""
    with np.errstate(invalid="ignore"):
        return _field(rows, "accepted") / _field(rows, "tested")


def token_rate_ratio(rows: np.ndarray) -> np.ndarray:
    """Return the tokens per second with the drafter, divided by those of the baseline on the same prompts."""
    speculative = _field(rows, "tokens") / _field(rows, "seconds")
    return speculative * _field(rows, "baseline_seconds") / _field(rows, "baseline_tokens")


def memory_bound_speedup(block_efficiency: float, size_ratio: float, num_speculative_tokens: float) -> float:
    """Return the memory-bound speed-up MBSU = tau / (c gamma + 1) (arXiv 2403.00858, section 3).

    >>> round(memory_bound_speedup(block_efficiency=2.3, size_ratio=0.0164, num_speculative_tokens=3), 2)
    2.19

    Args:
        block_efficiency: tau, the mean number of tokens per call of the target.
        size_ratio: c, the drafter's number of parameters divided by the target's.
        num_speculative_tokens: gamma, or its mean if it varies from block to block.
    """
    return block_efficiency / (size_ratio * num_speculative_tokens + 1)


RATIOS = {
    "block_efficiency": block_efficiency,
    "expected_block_efficiency": expected_block_efficiency,
    "acceptance_rate": acceptance_rate,
    "token_rate_ratio": token_rate_ratio,
}


def by_prompt(prompts: Iterable[str], counts: Iterable[Counts]) -> dict[str, np.ndarray]:
    """Return the sums of the counts that belong together, such as those of several seeds: prompts are resampled.

    The turns of a conversation are not independent, so they belong together too. The key of a sum is the ids of its
    prompts, so that sums over different turns are not taken for a pair.

    >>> counts = [Counts(4, 2, 2, 2, 1.0, 4, 1.0), Counts(6, 2, 4, 5, 1.0, 6, 1.0)]
    >>> by_prompt(["a", "a"], counts)["a"].tolist()
    [10.0, 4.0, 6.0, 7.0, 2.0, 10.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    >>> list(by_prompt(["a", "a#2"], counts))
    ['a a#2']
    """
    sums: dict[str, np.ndarray] = {}
    members: dict[str, dict[str, None]] = {}
    for prompt, row in zip(prompts, counts, strict=True):
        conversation, _ = conversation_and_turn(prompt)
        sums[conversation] = sums.get(conversation, np.zeros(len(Counts._fields))) + np.array(row)
        members.setdefault(conversation, {})[prompt] = None
    return {" ".join(sorted(members[conversation])): total for conversation, total in sums.items()}


def estimate(rows: dict[str, np.ndarray], ratio: str | Ratio, resamples: int = 2000) -> Estimate:
    """Return one of RATIOS, or a function of sums of other fields, over all prompts, with its bootstrap 95% interval.

    >>> rows = {name: np.array(Counts(tokens, 2, 0, 0, 1.0, 2, 1.0)) for name, tokens in (("a", 4), ("b", 6))}
    >>> estimate(rows, "block_efficiency")
    Estimate(value=2.5, low=2.0, high=3.0)
    """
    matrix, function = np.stack(list(rows.values())), RATIOS[ratio] if isinstance(ratio, str) else ratio
    return _with_interval(float(function(matrix.sum(0))), function(_resampled_sums(matrix[None], resamples)[0]))


def paired_difference(
    rows: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    ratio: str,
    resamples: int = 2000,
    factors: tuple[float, float] = (1.0, 1.0),
) -> Estimate:
    """Return how much one of RATIOS is larger for `rows` than for `reference`, with its bootstrap 95% interval.

    Both are resampled by the same draw of prompts, so that the prompts' difficulty cancels.

    >>> rows, more = ({n: np.array(Counts(tokens, 2, 0, 0, 1.0, 2, 1.0)) for n in "ab"} for tokens in (4, 6))
    >>> paired_difference(more, rows, "block_efficiency")
    Estimate(value=1.0, low=1.0, high=1.0)

    Args:
        rows: counts by prompt (see `by_prompt`).
        reference: counts of the same prompts.
        ratio: its name in RATIOS.
        resamples: the number of bootstrap samples.
        factors: constants that the two ratios are multiplied by first, such as those that turn tau into MBSU.

    Raises:
        ValueError: the two have different prompts.
    """
    if rows.keys() != reference.keys():
        raise ValueError(f"a paired difference needs the same prompts: {len(rows)} against {len(reference)}")
    matrices = np.stack([np.stack([part[name] for name in rows]) for part in (rows, reference)])
    ours, theirs = RATIOS[ratio](_resampled_sums(matrices, resamples))
    value, base = RATIOS[ratio](matrices.sum(1))
    return _with_interval(float(factors[0] * value - factors[1] * base), factors[0] * ours - factors[1] * theirs)


def _resampled_sums(matrices: np.ndarray, resamples: int) -> np.ndarray:
    """Return sums over prompts drawn with replacement, by the same draws for all K sets of counts.

    Args:
        matrices: counts, shape (K, prompts, fields).
        resamples: the number of draws; the result has shape (K, resamples, fields).
    """
    return _resampling_weights(matrices.shape[1], resamples) @ matrices


@lru_cache(maxsize=1)  # tables have hundreds of intervals over the same number of prompts
def _resampling_weights(size: int, resamples: int) -> np.ndarray:
    """Return how often each prompt is drawn, shape (resamples, size)."""
    return np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), resamples)


def _with_interval(value: float, draws: np.ndarray) -> Estimate:
    if np.isnan(value):  # such as the acceptance rate where nothing was drafted
        return Estimate(value, value, value)
    return Estimate(value, *(float(end) for end in np.nanpercentile(draws, [2.5, 97.5])))


def _field(rows: np.ndarray, name: str) -> np.ndarray:
    return rows[..., Counts._fields.index(name)]
