"""Find texts that say nearly the same as an earlier one, by the Jaccard similarity of their character 5-grams.

MinHash signatures (Broder, 1997) in bands propose candidates, and the exact similarity decides. A pair at the threshold
of 0.7 is proposed with a probability of 0.95, a pair at 0.8 with 0.998. The work per text does not grow with the number
of texts, as long as most of them differ.
"""

import re
import zlib

import numpy as np

THRESHOLD = 0.7
LETTERS = 5  # characters of an n-gram
BANDS, ROWS = 16, 5  # of a signature


def normalize(text: str) -> str:
    r"""Return the words of a text in lower case, separated by single spaces.

    >>> normalize("What's  new?\n")
    'what s new'
    """
    return " ".join(re.findall(r"\w+", text.lower()))


class SeenTexts:
    """The texts that were kept so far. Whether a text is kept depends only on the texts before it and their order."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._factors = generator.integers(0, 2**64, (BANDS * ROWS, 1), dtype=np.uint64) | np.uint64(1)
        self._offsets = generator.integers(0, 2**64, (BANDS * ROWS, 1), dtype=np.uint64)
        self._texts: set[str] = set()
        self._grams: list[np.ndarray] = []
        self._buckets: dict[bytes, list[int]] = {}
        self._longest = 0

    def __len__(self) -> int:
        return len(self._grams)

    def reason_against(self, text: str) -> str | None:
        """Return "duplicate" or "near duplicate" if an earlier text equals or resembles this one; else keep it."""
        words = normalize(text)
        grams = _grams(words)
        keys = self._keys(grams)
        reason = self._reason(words, grams, keys)
        if reason is None:
            for key in keys:
                self._buckets.setdefault(key, []).append(len(self._grams))
            self._texts.add(words)
            self._grams.append(grams)
            self._longest = max(self._longest, len(words))
        return reason

    def resembles(self, text: str) -> bool:
        """Return whether an earlier text equals or resembles this one, which is not kept."""
        words = normalize(text)
        grams = _grams(words)
        return self._reason(words, grams, self._keys(grams)) is not None

    def begins(self, text: str) -> bool:
        """Return whether an earlier text equals or resembles the first paragraphs of this one, or all of it."""
        paragraphs = text.split("\n\n")
        for count in range(1, len(paragraphs) + 1):
            beginning = "\n\n".join(paragraphs[:count])
            if len(normalize(beginning)) > self._longest / THRESHOLD + LETTERS:  # too long to be similar
                return False
            if self.resembles(beginning):
                return True
        return False

    def _reason(self, words: str, grams: np.ndarray, keys: list[bytes]) -> str | None:
        if words in self._texts:
            return "duplicate"
        candidates = {number for key in keys for number in self._buckets.get(key, ())}
        if any(_similarity(grams, self._grams[number]) >= THRESHOLD for number in candidates):
            return "near duplicate"
        return None

    def _keys(self, grams: np.ndarray) -> list[bytes]:
        """Return the key of each band of the signature: its number, and the minima of its hash functions."""
        # Multiplication modulo 2**64: the upper bits then come in another order for each factor.
        hashes = (grams.astype(np.uint64) * self._factors + self._offsets) >> np.uint64(32)
        minima = hashes.min(axis=1).astype(np.uint32).reshape(BANDS, ROWS)
        return [bytes([number]) + band.tobytes() for number, band in enumerate(minima)]


def _grams(words: str) -> np.ndarray:
    """Return the sorted hashes of the n-grams of a text; of the text itself, if it is shorter."""
    last = max(1, len(words) - LETTERS + 1)
    return np.array(sorted({zlib.crc32(words[i : i + LETTERS].encode()) for i in range(last)}), np.uint32)


def _similarity(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
