"""Decoding is lossless, counts are exact, and a test of losslessness that can fail."""

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from drafter.speculative import Block, Sampling, autoregressive_decode, speculative_decode, verify, warp
from tests.conftest import VOCABULARY, small_model

GREEDY = Sampling()


class Script:
    """A stub model: at each position its favourite token is the script's next one (positions from 0)."""

    device = torch.device("cpu")

    def __init__(self, script, calls=None):
        self.script, self.seen, self.calls = script, 0, calls

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        # The cache is told nothing; positions are counted from its own length, which tests crop as the real one.
        length = past_key_values.length = getattr(past_key_values, "length", 0) + input_ids.shape[1]
        if self.calls is not None:
            self.calls.append(input_ids.shape[1])
        logits = torch.zeros(1, logits_to_keep, 10)
        for row, position in enumerate(range(length - logits_to_keep, length)):
            logits[0, row, self.script[position]] = 5.0
        return CausalLMOutputWithPast(logits=logits)

    __call__ = forward


@pytest.fixture
def _stub_cache(monkeypatch):
    class Cache:
        def crop(self, tokens):
            assert tokens < 0
            self.length += tokens

    monkeypatch.setattr("drafter.speculative.DynamicCache", Cache)


def script(*tokens):
    return list(tokens) * 20


@pytest.mark.usefixtures("_stub_cache")
class TestStubs:
    def test_a_drafter_that_always_agrees_fills_every_block(self):
        calls = []
        decoded = speculative_decode(Script(script(1, 2, 3), calls), Script(script(1, 2, 3)), [0, 0], 3, 12, GREEDY, [])
        assert decoded.tokens == (script(1, 2, 3)[1:])[:12]
        assert [len(block.emitted) for block in decoded.blocks] == [4, 4, 4]
        assert [block.accepted for block in decoded.blocks] == [3, 3, 3]
        assert calls == [5, 4, 4]  # the prompt and its drafts, then each block's added token and its drafts

    def test_a_drafter_that_never_agrees_costs_one_call_a_token(self):
        decoded = speculative_decode(Script(script(1, 2, 3)), Script(script(4, 5, 6)), [0], 3, 7, GREEDY, [])
        assert decoded.tokens == script(1, 2, 3)[:7]
        assert [(block.accepted, len(block.emitted)) for block in decoded.blocks] == [(0, 1)] * 7
        assert [block.tested for block in decoded.blocks] == [1] * 6 + [0]  # no room for a draft in the last

    def test_a_drafter_that_sometimes_agrees_keeps_the_agreeing_prefix(self):
        decoded = speculative_decode(Script(script(1, 2, 3)), Script(script(1, 2, 9)), [0], 4, 9, GREEDY, [])
        assert decoded.tokens == script(1, 2, 3)[:9]
        assert [block.accepted for block in decoded.blocks] == [2, 2, 2]
        assert [block.tested for block in decoded.blocks] == [3, 3, 2]

    def test_a_stop_token_inside_a_block_ends_the_text(self):
        decoded = speculative_decode(Script(script(1, 2, 3)), Script(script(1, 2, 3)), [0], 5, 12, GREEDY, [3])
        assert decoded.tokens == [1, 2, 3]
        assert decoded.blocks == [Block([1, 2, 3, 1, 2], 3, [1, 2, 3])]
        assert decoded.blocks[0].tested == 3

    @pytest.mark.parametrize("limit", range(1, 9))
    def test_the_length_limit_is_exact_and_no_draft_goes_beyond_it(self, limit):
        decoded = speculative_decode(Script(script(1, 2, 3)), Script(script(1, 2, 3)), [0], 3, limit, GREEDY, [])
        assert len(decoded.tokens) == limit
        assert sum(len(block.drafted) for block in decoded.blocks) <= limit


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_greedy_output_is_the_targets_own(target, drafter, gamma):
    for seed in range(5):
        prompt = torch.randint(0, VOCABULARY, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        own = autoregressive_decode(target, prompt, 40, GREEDY, [5])
        decoded = speculative_decode(target, drafter, prompt, gamma, 40, GREEDY, [5])
        assert decoded.tokens == own.tokens
        assert [token for block in decoded.blocks for token in block.emitted] == decoded.tokens


def test_greedy_output_agrees_with_transformers_own_generation(target):
    prompt = [3, 1, 4, 1, 5]
    ours = autoregressive_decode(target, prompt, 20, GREEDY, []).tokens
    theirs = target.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours == theirs[0, 5:].tolist()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(0.6, 0.9), Sampling(0.8, 1.0, 5)])
@pytest.mark.parametrize("gamma", [3, 5])
def test_a_copy_of_the_target_is_always_accepted(target, gamma, sampling):
    generator = torch.Generator().manual_seed(0)
    decoded = speculative_decode(target, target, [1, 2, 3], gamma, 6 * (gamma + 1), sampling, [], generator)
    assert [block.accepted for block in decoded.blocks] == [gamma] * 6
    assert len(decoded.tokens) / len(decoded.blocks) == gamma + 1


# The chi-square tests below accept a correct decoder with probability 1 - 1e-3 each (fixed seeds: it is decided once).
FALSE_ALARM = 1e-3
SAMPLES = 6000


def chi_square_tail(statistic, freedom):
    """P(X > statistic), X ~ chi-square, by the regularised incomplete gamma function."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_of_counts(counts, probabilities):
    expected = probabilities * counts.sum()
    pooled = expected >= 5  # the usual condition; the rare rest forms one cell
    observed = np.append(counts[pooled], counts[~pooled].sum())
    expected = np.append(expected[pooled], expected[~pooled].sum())
    kept = expected > 0
    assert observed[~kept].sum() == 0, "a token came out that the target never gives"
    statistic = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    return chi_square_tail(statistic, kept.sum() - 1)


test_of_counts.__test__ = False


def accept_all(drafted, p, q, generator):
    return len(drafted), int(torch.multinomial(q[-1], 1, generator=generator))


def resample_from_q(drafted, p, q, generator):
    """The classic mistake: the right accept test, but a rejection draws from q and not from the residual."""
    accepted, own = verify(drafted, p, q, generator)
    return accepted, own if accepted == len(drafted) else int(torch.multinomial(q[accepted], 1, generator=generator))


def pairs_from(rule, p, q, gamma, generator):
    """Histogram over pairs of tokens of SAMPLES decodings from a first-order chain given by p and q, (V, V) each."""
    vocabulary = p.shape[-1]
    counts = np.zeros(vocabulary * vocabulary)
    for _ in range(SAMPLES):
        text = [0]
        while len(text) < 3:
            drafted = []
            for _ in range(gamma):
                last = [*text, *drafted][-1]
                drafted.append(int(torch.multinomial(p[last], 1, generator=generator)))
            states = [*text, *drafted][-gamma - 1 :]
            accepted, own = rule(torch.tensor(drafted), p[states[:-1]], q[states], generator)
            text += [*drafted[:accepted], own]
        counts[text[1] * vocabulary + text[2]] += 1
    return counts


@pytest.fixture(scope="module")
def chain():
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.randn(2, 4, 4, generator=generator)).unbind(0)


@pytest.mark.parametrize("gamma", [1, 3])
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.6, 0.9)])
def test_pairs_of_sampled_tokens_have_the_targets_distribution(chain, sampling, gamma):
    p, q = (warp(logits, sampling) for logits in chain)
    counts = pairs_from(verify, p, q, gamma, torch.Generator().manual_seed(0))
    expected = (q[0][:, None] * q).flatten().double().numpy()
    assert test_of_counts(counts, expected) > FALSE_ALARM


@pytest.mark.parametrize("rule", [accept_all, resample_from_q])
def test_a_wrong_accept_rule_is_seen(chain, rule):
    p, q = (warp(logits, Sampling(1.0)) for logits in chain)
    counts = pairs_from(rule, p, q, 3, torch.Generator().manual_seed(0))
    assert test_of_counts(counts, (q[0][:, None] * q).flatten().double().numpy()) < FALSE_ALARM


def test_the_whole_loop_samples_the_targets_distribution():
    target, drafter = (small_model(seed, vocab=6, sharpness=40.0) for seed in (1, 2))
    sampling, generator = Sampling(0.8, 0.95), torch.Generator().manual_seed(0)
    counts = np.zeros(36)
    for _ in range(800):
        first, second = speculative_decode(target, drafter, [0, 1], 3, 2, sampling, [], generator).tokens
        counts[first * 6 + second] += 1
    with torch.inference_mode():
        once = warp(target(input_ids=torch.tensor([[0, 1]])).logits[0, -1:], sampling)[0]
        rows = torch.tensor([[0, 1, token] for token in range(6)])
        twice = warp(target(input_ids=rows).logits[:, -1], sampling)
    assert test_of_counts(counts, (once[:, None] * twice).flatten().double().numpy()) > FALSE_ALARM


def test_warping_agrees_with_transformers_warpers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    reference = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(20)(None, TemperatureLogitsWarper(0.6)(None, logits)))
    torch.testing.assert_close(warp(logits, Sampling(0.6, 0.9, 20)), reference.softmax(-1))


def test_greedy_warping_is_one_hot_at_the_first_maximum():
    probs = warp(torch.tensor([[0.0, 2.0, 2.0]]), GREEDY)
    assert probs.tolist() == [[0.0, 1.0, 0.0]]


def test_what_cannot_be_decoded_is_refused_before_any_call(target):
    for gamma, limit, prompt, message in [
        (0, 5, [1], "num_speculative_tokens .* is 0"),
        (3, 0, [1], "max_new_tokens is 0"),
        (3, 5, [], "no tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            speculative_decode(None, None, prompt, gamma, limit, GREEDY, [])
