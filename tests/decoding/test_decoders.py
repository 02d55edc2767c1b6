"""A compiled decoder keeps its cache as the plain one does; what a call costs, and what follows from it."""

import pytest
import torch

from drafter.decoding.decoders import Compiled
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from drafter.decoding.timings import Costs, measure
from drafter.warping import Sampling
from tests.conftest import VOCABULARY, small_model

GREEDY = Sampling()


@pytest.fixture
def _uncompiled(monkeypatch):
    """What torch.compile makes of a function is its own affair, and needs a C++ compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("_uncompiled")
def test_a_compiled_pair_decodes_text_after_text_as_the_plain_one_does(target, drafter):
    compiled = [Compiled(model, 60) for model in (target, drafter)]
    for seed in range(4):
        prompt = torch.randint(0, VOCABULARY, (5 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        own = autoregressive_decode(target, prompt, 30, GREEDY, [5]).tokens
        assert autoregressive_decode(compiled[0], prompt, 30, GREEDY, [5]).tokens == own
        plain = speculative_decode(target, drafter, prompt, 3, 30, GREEDY, [5])
        found = speculative_decode(*compiled, prompt, 3, 30, GREEDY, [5])  # type: ignore[call-arg]
        assert (found.tokens, found.blocks) == (own, plain.blocks)


def test_only_short_calls_are_compiled(target, monkeypatch):
    calls = []

    def compiled(function, **_):
        return lambda ids: calls.append(ids.shape[1]) or function(ids)

    monkeypatch.setattr(torch, "compile", compiled)
    speculative_decode(Compiled(target, 60, longest=4), small_model(2), [1, 2, 3, 4, 5, 6, 7], 3, 10, GREEDY, [])
    assert calls
    assert max(calls) <= 4


@pytest.mark.usefixtures("_uncompiled")
def test_a_text_beyond_the_capacity_is_refused(target):
    with pytest.raises(ValueError, match="a text of 9 tokens exceeds the compiled decoder's 8"):
        autoregressive_decode(Compiled(target, 8), [1, 2, 3], 20, GREEDY, [])


def test_the_cost_of_a_block_is_its_drafts_and_its_verification():
    costs = Costs(drafter=0.2, target=[1.0, 1.1, 1.3])
    assert costs.ratio == pytest.approx(0.2)
    assert costs.verification(2) == pytest.approx(1.3)
    assert costs.block(2) == pytest.approx(0.2 * 2 + 1.3)


def test_calls_are_timed(target, drafter):
    costs = measure(target, drafter, [1, 2, 3], 2)
    with pytest.raises(ValueError, match=r"the text has 3 tokens, and calls of up to gamma \+ 1 = 4"):
        measure(target, drafter, [1, 2, 3], 3)
    assert len(costs.target) == 3
    assert min(costs.drafter, *costs.target) > 0
