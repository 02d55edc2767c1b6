"""The examples in the docstrings of the losses show what the code returns."""

import doctest

import pytest

from drafter.losses import block_losses, distributions, divergences


@pytest.mark.parametrize("module", [block_losses, distributions, divergences], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_are_right(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
