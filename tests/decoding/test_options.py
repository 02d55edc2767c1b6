"""The settings of a decoding are checked when they are made."""

import dataclasses

import pytest

from drafter.decoding.options import Adaptive, DecodingOptions, check_draft_length, max_draft_length
from drafter.warping import Sampling


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="max_new_tokens is 0, must be at least 1"):
        DecodingOptions(0)
    with pytest.raises(ValueError, match="top_k is -1"):
        DecodingOptions(8, Sampling(0.6, 0.95, -1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodingOptions(8).max_new_tokens = 9


def test_the_length_of_a_draft_is_at_least_one():
    assert max_draft_length(3) == 3
    assert max_draft_length(Adaptive(limit=5)) == 5
    for wrong in (0, Adaptive(limit=0)):
        with pytest.raises(ValueError, match=r"num_speculative_tokens \(gamma\) is 0"):
            check_draft_length(wrong)
