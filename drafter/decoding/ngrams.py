"""Drafters that are no neural network: they propose what followed the last tokens, an n-gram, before.

`Lookup` finds the n-gram in the sequence itself, `NgramTable` in what the target wrote earlier. A proposal depends on
the tokens so far alone and has no distribution: each draft counts as certain, p(x) = 1, and decoding is lossless (see
`acceptance.verify`). The acceptance probability is then q(x), the target's, under each acceptance rule: `ratio` has
min(1, q(x) / 1), `argmax` drafts x as the only and so the most likely token, and `match` draws it with certainty.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from drafter.decoding.generation import Generation

MULTIPLIER = 0x9E3779B97F4A7C15  # of the hash; any large odd number
BITS = 2**64 - 1
MOST_ENTRIES = 2**20  # of a table: n-grams with their next token, 12 bytes each
AT_ONCE = 2**21  # pairs that are counted before they are added up


class NgramSizes(NamedTuple):
    """The lengths of the n-grams that are looked for, the longest first.

    By default those of llama.cpp's lookup. transformers has 1 to 2, and vLLM 5 alone unless it is told otherwise.
    """

    smallest: int = 1
    largest: int = 4


def check_sizes(sizes: NgramSizes) -> NgramSizes:
    """Return the sizes. Raise ValueError if they are no range of positive numbers.

    >>> check_sizes(NgramSizes(3, 2))
    Traceback (most recent call last):
    ...
    ValueError: the n-grams have 3 to 2 tokens, must have at least 1, and the largest at least as many as the smallest
    """
    if not 1 <= sizes.smallest <= sizes.largest:
        raise ValueError(
            f"the n-grams have {sizes.smallest} to {sizes.largest} tokens, must have at least 1, and the largest at "
            f"least as many as the smallest"
        )
    return sizes


@dataclass
class _Occurrences:
    """The position after the last occurrence of each n-gram of a sequence, and how many tokens were read."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    read: int = 1


@dataclass(frozen=True)
class Lookup:
    """Proposes what followed the last occurrence of the last n tokens in the prompt and the text so far.

    The longest n-gram that has occurred before decides. If its occurrence is so near to the end that fewer tokens
    follow than are asked for, the drafts themselves go on as the text, so that a repetition of any period is continued.

    Source: prompt lookup decoding, as transformers, vLLM (`ngram`) and llama.cpp have it.

    Attributes:
        sizes: n.
    """

    sizes: NgramSizes = NgramSizes()  # noqa: RUF009 (immutable)

    def __post_init__(self) -> None:
        check_sizes(self.sizes)

    def propose(self, sequence: Generation, count: int) -> list[int]:
        """Return `count` tokens, or none if no n-gram has occurred before."""
        tokens, (smallest, largest) = sequence.tokens, self.sizes
        found: _Occurrences = sequence.notes.setdefault(self, _Occurrences())
        for end in range(found.read, len(tokens)):
            for size in range(smallest, min(largest, end) + 1):
                found.after[tuple(tokens[end - size : end])] = end
        found.read = max(found.read, len(tokens))
        for size in range(min(largest, len(tokens)), smallest - 1, -1):
            if start := found.after.get(tuple(tokens[-size:])):
                drafts = tokens[start : start + count]
                while len(drafts) < count:
                    drafts.append(drafts[start - len(tokens)])
                return drafts
        return []


@dataclass(frozen=True, eq=False)
class NgramTable:
    """Proposes what the target wrote most often after the last n tokens, by the longest n that it has written before.

    An n-gram is stored as a hash of 64 bits. If two have the same, a draft is wrong, and then it is rejected.

    Attributes:
        sizes: n.
        keys: the hashes of the n-grams, ascending, uint64.
        tokens: the most frequent token after each.
    """

    sizes: NgramSizes
    keys: np.ndarray
    tokens: np.ndarray

    def propose(self, sequence: Generation, count: int) -> list[int]:
        """Return at most `count` tokens: those up to the first that follows no n-gram of the table."""
        text, drafts = sequence.tokens[-self.sizes.largest :], list[int]()
        while len(drafts) < count and (token := self._next(text)) is not None:
            drafts.append(token)
            text = [*text, token][-self.sizes.largest :]
        return drafts

    def _next(self, text: list[int]) -> int | None:
        for size in range(min(self.sizes.largest, len(text)), self.sizes.smallest - 1, -1):
            key = size
            for token in text[-size:]:
                key = (key * MULTIPLIER + token + 1) & BITS
            place = int(np.searchsorted(self.keys, np.uint64(key)))
            if place < len(self.keys) and int(self.keys[place]) == key:
                return int(self.tokens[place])
        return None


class Answered(NamedTuple):
    """A sequence that the target has written in part.

    Attributes:
        tokens: the prompt and the response.
        is_response: which of them the target wrote.
    """

    tokens: np.ndarray
    is_response: np.ndarray


def count_ngrams(answers: Iterable[Answered], sizes: NgramSizes, most_entries: int = MOST_ENTRIES) -> NgramTable:
    """Return the table of what the target wrote after each n-gram, of which the prompt may be a part.

    If there are more pairs of an n-gram and a next token than `most_entries`, the rarest ones are left out, also while
    they are counted. So the memory is bounded: by default, less than 200 MB while counting, and 12 MB for the table.

    Args:
        answers: the target's answers.
        sizes: n.
        most_entries: the most n-grams of the table.
    """
    check_sizes(sizes)
    counted = _Pairs.of([])
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    number = 0
    for answer in answers:
        for size in range(sizes.smallest, sizes.largest + 1):
            waiting.append(_pairs_of(answer, size))
            number += len(waiting[-1][1])
        if number > AT_ONCE:
            counted, waiting, number = counted.add(waiting).most_frequent(most_entries), [], 0
    keys, tokens, counts = counted.add(waiting).most_frequent(most_entries)
    order = np.lexsort((tokens, -counts, keys))  # of equally frequent tokens, that of the smallest id
    keys, tokens = keys[order], tokens[order]
    first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
    return NgramTable(sizes, keys[first], tokens[first])


class _Pairs(NamedTuple):
    """How often each token followed each n-gram: hashes of n-grams, tokens, counts."""

    keys: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> "_Pairs":
        """Return pairs that occur once each."""
        keys = np.concatenate([np.empty(0, np.uint64), *(keys for keys, _ in pairs)])
        tokens = np.concatenate([np.empty(0, np.int32), *(tokens for _, tokens in pairs)])
        return cls(keys, tokens, np.ones(len(keys), np.int32))

    def add(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> "_Pairs":
        """Return the counts with these pairs, each pair once."""
        keys, tokens, counts = (np.concatenate(parts) for parts in zip(self, self.of(pairs), strict=True))
        order = np.lexsort((tokens, keys))
        keys, tokens = keys[order], tokens[order]
        first = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]) | (tokens[1:] != tokens[:-1]))[: len(keys)])
        sums = np.add.reduceat(counts[order], first) if len(first) else counts
        return _Pairs(keys[first], tokens[first], sums)

    def most_frequent(self, most: int) -> "_Pairs":
        """Return the pairs without the rarest ones, at most `most`; of equally frequent ones, those of small hashes."""
        if len(self.keys) <= most:
            return self
        kept = np.sort(np.lexsort((self.keys, -self.counts))[:most])
        return _Pairs(*(values[kept] for values in self))


def _pairs_of(answer: Answered, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of the n-grams before each token that the target wrote, and these tokens."""
    tokens = answer.tokens.astype(np.uint64)
    number = max(len(tokens) - size, 0)
    keys = np.full(number, size, np.uint64)
    for offset in range(size):
        keys = keys * np.uint64(MULTIPLIER) + tokens[offset : offset + number] + np.uint64(1)
    written = answer.is_response[size:]
    return keys[written], answer.tokens[size:][written].astype(np.int32)


TextDrafter: TypeAlias = Lookup | NgramTable  # what drafts from the tokens so far, without a model
