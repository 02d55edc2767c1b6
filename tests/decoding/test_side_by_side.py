"""Sequences that are generated side by side are those that each would be alone, however little room there is."""

import pytest
import torch

from drafter.decoding import side_by_side
from drafter.decoding.options import DecodingOptions
from drafter.decoding.side_by_side import generate
from drafter.decoding.speculative import autoregressive_decode
from drafter.warping import Sampling, warp
from tests.conftest import VOCABULARY, small_model

STOPS = [7, 9]


def prompts(count, longest=9):
    random = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest + 1, (count,), generator=random).tolist()
    return [torch.randint(0, VOCABULARY, (length,), generator=random).tolist() for length in lengths]


def greedily(model, asked, batch_tokens, limit=20):
    how = {"top_p": 1.0, "max_new_tokens": limit, "stop_ids": STOPS, "batch_tokens": batch_tokens}
    return [one.tokens for one in generate(model, asked, [0.0] * len(asked), **how)]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000], ids=["one at a time", "a few", "all at once"])
def test_greedy_sequences_are_those_of_decoding_alone(target, monkeypatch, batch_tokens):
    monkeypatch.setattr(side_by_side, "STEP", 3)  # the cache grows, and sequences are set aside, all the time
    asked = [*prompts(30), [5], [5], [1, 2, 3], [1, 2, 3]]
    expected = [autoregressive_decode(target, one, DecodingOptions(20, stop_ids=STOPS)).tokens for one in asked]
    assert greedily(target, asked, batch_tokens) == expected
    assert len({len(tokens) for tokens in expected}) > 3


def test_the_cache_stays_within_its_limit(target, monkeypatch):
    monkeypatch.setattr(side_by_side, "STEP", 3)
    sizes, resize = [], side_by_side.RaggedDecoder.resize

    def recorded(self, rows, number, capacity):
        sizes.append(number * capacity)
        resize(self, rows, number, capacity)

    monkeypatch.setattr(side_by_side.RaggedDecoder, "resize", recorded)
    greedily(target, prompts(40), 80, limit=40)
    assert 60 < max(sizes) <= 80


def test_equal_prompts_are_read_once(target, monkeypatch):
    calls = []
    forward = side_by_side.RaggedDecoder.forward
    monkeypatch.setattr(
        side_by_side.RaggedDecoder, "forward", lambda self, ids, *rest: calls.append(ids) or forward(self, ids, *rest)
    )
    greedily(target, [[1, 2, 3, 4]] * 5 + [[4, 3, 2]], 1000, limit=1)
    assert sorted(map(len, calls[0])) == [3, 3]  # two prompts without their last tokens, padded
    assert len(calls[1]) == 6


def test_what_all_new_prompts_begin_with_is_read_once(target, monkeypatch):
    asked = [[1, 2, 3, 4, 5], [1, 2, 3, 5, 4, 6, 1], [1, 2, 3, 7]]  # the last one's 7 is read with the first step
    expected = [autoregressive_decode(target, one, DecodingOptions(20, stop_ids=STOPS)).tokens for one in asked]
    calls = []
    forward = side_by_side.RaggedDecoder.forward
    monkeypatch.setattr(
        side_by_side.RaggedDecoder, "forward", lambda self, ids, *rest: calls.append(ids) or forward(self, ids, *rest)
    )
    assert greedily(target, asked, 1000) == expected
    assert calls[:2] == [[[1, 2, 3]], [[4, 0, 0], [5, 4, 6], [0, 0, 0]]]


def test_sampled_tokens_have_the_warped_distribution(target):
    """Two temperatures in one batch. A chi-square above the 1e-6 quantile of its distribution fails."""
    prompt, count = [3, 1, 4], 8_000
    torch.manual_seed(0)
    temperatures = [4.0, 9.0] * count
    how = {"top_p": 0.9, "max_new_tokens": 1, "stop_ids": [], "batch_tokens": 10**6}
    drawn = [one.tokens for one in generate(target, [prompt] * (2 * count), temperatures, **how)]
    logits_V = target(torch.tensor([prompt])).logits[0, -1]
    for offset, temperature in enumerate((4.0, 9.0)):
        expected_V = warp(logits_V, Sampling(temperature, 0.9)) * count
        found_V = torch.bincount(torch.tensor(drawn[offset::2])[:, 0], minlength=VOCABULARY)
        inside_V = expected_V > 0
        assert found_V[~inside_V].sum() == 0
        statistic = float(((found_V - expected_V) ** 2 / expected_V)[inside_V].sum())
        degrees = int(inside_V.sum()) - 1
        assert degrees > 3
        assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 15  # above the quantile for these degrees of freedom


def test_no_prompts_give_no_sequences(target):
    assert greedily(target, [], 100) == []


def test_a_sequence_may_be_longer_than_the_limit(target):
    assert greedily(target, [[1] * 30], 5, limit=3)[0] == greedily(target, [[1] * 30], 500, limit=3)[0]


@pytest.mark.parametrize("batch_tokens", [60, 10_000], ids=["a few", "all at once"])
def test_states_are_those_of_a_pass_over_the_complete_sequence(target, monkeypatch, batch_tokens):
    monkeypatch.setattr(side_by_side, "STEP", 3)  # sequences are set aside, and read again
    asked = [*prompts(20), [5], [5], [1, 2, 3], [1, 2, 3]]
    warmth = [(0.0, 0.7, 1.0)[number % 3] for number in range(len(asked))]
    how = {"top_p": 0.95, "max_new_tokens": 20, "stop_ids": STOPS, "batch_tokens": batch_tokens}
    torch.manual_seed(0)
    found = generate(target, asked, warmth, **how, states=torch.float32)
    torch.manual_seed(0)
    without = generate(target, asked, warmth, **how)
    assert [one.tokens for one in found] == [one.tokens for one in without]
    assert {one.hidden_NH for one in without} == {None}
    for prompt, (tokens, hidden_NH) in zip(asked, found, strict=True):
        expected_NH = target.model(torch.tensor([prompt + tokens])).last_hidden_state[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(hidden_NH, expected_NH, rtol=1e-4, atol=1e-4)  # float32 in another batch
        logits_NV, expected_NV = target.lm_head(hidden_NH), target.lm_head(expected_NH)
        assert logits_NV.argmax(-1).tolist() == expected_NV.argmax(-1).tolist()
    assert not target.lm_head._forward_pre_hooks


def test_states_are_kept_in_the_dtype_that_is_asked_for(target):
    how = {"top_p": 1.0, "max_new_tokens": 4, "stop_ids": [], "batch_tokens": 100}
    exact, rounded = (
        generate(target, [[1, 2], [3]], [0.0, 0.0], **how, states=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    for one, other in zip(exact, rounded, strict=True):
        assert torch.equal(one.hidden_NH.bfloat16(), other.hidden_NH)
        assert other.hidden_NH.shape == (4, 32)


def test_states_beyond_the_range_of_their_dtype_are_refused():
    model = small_model(4)
    model.model.norm.weight *= 1e5
    how = {"top_p": 1.0, "max_new_tokens": 4, "stop_ids": [], "batch_tokens": 100}
    assert generate(model, [[1, 2]], [0.0], **how, states=torch.bfloat16)[0].hidden_NH.abs().max() > 65504
    with pytest.raises(ValueError, match=r"exceed the range of torch.float16: keep them in bfloat16"):
        generate(model, [[1, 2]], [0.0], **how, states=torch.float16)


def test_another_dtype_works():
    model = small_model(4).to(torch.bfloat16)
    assert len(greedily(model, prompts(5), 100, limit=4)) == 5
