"""Which texts count as near duplicates, against a comparison of all pairs."""

import random

import pytest

from drafter.data.near_duplicates import THRESHOLD, SeenTexts, normalize

WORDS = [f"{first}{second}" for first in ("ba", "du", "ke", "lo", "mi") for second in ("rt", "nd", "ss", "lk", "mp")]


def shingles(text):
    words = normalize(text)
    return {words[i : i + 5] for i in range(max(1, len(words) - 4))}


def jaccard(first, second):
    one, two = shingles(first), shingles(second)
    return len(one & two) / len(one | two)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("What is  the capital of France", "duplicate"),
        ("WHAT IS THE CAPITAL OF FRANCE?!", "duplicate"),
        ("What is the capital of France, please?", "near duplicate"),
        ("What is the capital of Spain?", None),
        ("How do I boil an egg?", None),
        ("x", None),
    ],
)
def test_a_text_is_compared_by_its_letters(text, reason):
    seen = SeenTexts()
    assert seen.reason_against("What is the capital of France?") is None
    assert seen.reason_against(text) == reason
    assert len(seen) == 1 + (reason is None)


def test_the_index_finds_what_a_comparison_of_all_pairs_finds():
    generator, texts = random.Random(0), []
    for _ in range(250):
        words = generator.choice(texts).split() if texts and generator.random() < 0.5 else generator.sample(WORDS, 12)
        words[generator.randrange(len(words))] = generator.choice(WORDS)
        texts.append(" ".join(words))
    seen, kept, near = SeenTexts(), [], 0
    for text in texts:
        closest = max((jaccard(text, other) for other in kept), default=0.0)
        reason = seen.reason_against(text)
        if closest < THRESHOLD:
            assert reason is None
        elif closest > 0.8:  # found with a probability of 0.998; these texts and hash functions are fixed
            assert reason is not None
        near += reason == "near duplicate"
        if reason is None:
            kept.append(text)
    assert near > 40
    assert len(kept) > 80
