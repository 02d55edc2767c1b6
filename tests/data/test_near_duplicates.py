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


def test_a_text_that_begins_with_an_earlier_one_is_found():
    seen = SeenTexts()
    seen.reason_against("What is the capital of France?")
    seen.reason_against("A poem:\n\nRoses are red.\n\nWho wrote it?")
    found = {
        "What is the capital of France?\n\nParis.": True,
        "So what is the capital of France?\n\nParis, which lies at the Seine.\n\nAsk more.": True,
        "A poem:\n\nRoses are red.\n\nWho wrote it?\n\nNobody knows.": True,
        "A poem:\n\nViolets are blue.\n\nIs it good?\n\nNo.": False,
        "Paris lies at the Seine, a river.\n\nWhat is the capital of France?": False,
        "Where is Paris?\n\nIn France, whose capital it is." + " It is large." * 90: False,
    }
    assert {text: seen.begins(text) for text in found} == found
    assert len(seen) == 2
