"""Where texts differ with and without the drafter, and what the target says of the two tokens there."""

import math

import torch

from benchmarks.engine_counts import Measurement
from benchmarks.engine_differences import differences, differences_table
from experiments.running.engine_answers import Answer


def measured(prompt, decoder, gamma, tokens):
    return Measurement(prompt, "short", 0, decoder, gamma, Answer(tokens, len(tokens), 1.0, 0.5, 1))


ROWS = [
    measured("1", "target", 0, [4, 5, 6]),
    measured("1", "pair", 2, [4, 7, 6]),
    measured("1", "pair", 3, [4, 7, 8]),  # the same first difference as with two drafts
    measured("2", "target", 0, [4, 5, 6]),
    measured("2", "pair", 2, [4, 5, 6]),
    measured("2", "pair", 3, [4, 5]),  # ends earlier: there is no token to compare
]


def test_each_difference_is_listed_once_with_its_draft_lengths():
    (found,) = differences(ROWS)
    assert (found.prompt, found.gammas, found.position, found.shared) == ("1", [2, 3], 1, [4])
    assert (found.alone, found.drafted) == (5, 7)


def test_the_gap_is_that_of_the_targets_log_probabilities_after_the_shared_text():
    def log_probabilities(ids):
        assert ids == [1, 2, 4]
        return torch.tensor([0.05, 0, 0, 0, 0, 0.5, 0, 0.25, 0.2]).log()

    table = differences_table("an engine", differences(ROWS), {"1": [1, 2]}, log_probabilities)
    assert table.rows == [["short", "1", "2, 3", "1", f"{math.log(2):+.3f}", "yes"]]
