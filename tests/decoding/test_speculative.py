"""Decoding is lossless and counts are exact. `test_acceptance` has the tests of the acceptance rules themselves."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from drafter.decoding.acceptance import RULES, Block
from drafter.decoding.options import Adaptive, DecodingOptions
from drafter.decoding.speculative import (
    autoregressive_decode,
    autoregressive_decode_batch,
    speculative_decode,
    speculative_decode_batch,
)
from drafter.warping import Sampling, draw, in_nucleus, warp
from tests.conftest import VOCABULARY, small_model
from tests.decoding.chi_square import FALSE_ALARM, p_value

GREEDY = Sampling()
STOP, SHORT = DecodingOptions(30, stop_ids=[5]), DecodingOptions(20, stop_ids=[5])


class Script:
    """A stub model whose most likely token at each position (from 0) is the next one of the script."""

    device, config = torch.device("cpu"), PreTrainedConfig()

    def __init__(self, script, calls=None):
        self.script, self.seen, self.calls = script, 0, calls

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        # The stub counts positions by the length of the stub cache, which the decoder crops like a real one.
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
            self.length += tokens  # type: ignore[attr-defined]

    monkeypatch.setattr("drafter.decoding.decoders.DynamicCache", Cache)


def script(*tokens):
    return list(tokens) * 20


@pytest.mark.usefixtures("_stub_cache")
class TestStubs:
    def test_a_drafter_that_always_agrees_fills_every_block(self):
        calls = []
        decoded = speculative_decode(
            Script(script(1, 2, 3), calls), Script(script(1, 2, 3)), [0, 0], 3, DecodingOptions(12)
        )
        assert decoded.tokens == (script(1, 2, 3)[1:])[:12]
        assert [len(block.emitted) for block in decoded.blocks] == [4, 4, 4]
        assert [block.accepted for block in decoded.blocks] == [3, 3, 3]
        assert calls == [5, 4, 4]  # the prompt and its drafts, then each block's added token and its drafts

    def test_a_drafter_that_never_agrees_needs_one_call_per_token(self):
        decoded = speculative_decode(Script(script(1, 2, 3)), Script(script(4, 5, 6)), [0], 3, DecodingOptions(7))
        assert decoded.tokens == script(1, 2, 3)[:7]
        assert [(block.accepted, len(block.emitted)) for block in decoded.blocks] == [(0, 1)] * 7
        assert [block.tested for block in decoded.blocks] == [1] * 6 + [0]  # the last token is a bonus token

    def test_a_drafter_that_sometimes_agrees_keeps_the_agreeing_prefix(self):
        decoded = speculative_decode(Script(script(1, 2, 3)), Script(script(1, 2, 9)), [0], 4, DecodingOptions(9))
        assert decoded.tokens == script(1, 2, 3)[:9]
        assert [block.accepted for block in decoded.blocks] == [2, 2, 2]
        assert [block.tested for block in decoded.blocks] == [3, 3, 2]

    def test_a_stop_token_inside_a_block_ends_the_sequence(self):
        decoded = speculative_decode(
            Script(script(1, 2, 3)), Script(script(1, 2, 3)), [0], 5, DecodingOptions(12, stop_ids=[3])
        )
        assert decoded.tokens == [1, 2, 3]
        assert decoded.blocks == [Block([1, 2, 3, 1, 2], 3, [1, 2, 3], (1.0,) * 5, extendable=2)]
        assert decoded.blocks[0].tested == decoded.blocks[0].expected == 3

    @pytest.mark.parametrize("limit", range(1, 9))
    def test_the_length_limit_is_exact_and_no_draft_goes_beyond_it(self, limit):
        decoded = speculative_decode(Script(script(1, 2, 3)), Script(script(1, 2, 3)), [0], 3, DecodingOptions(limit))
        assert len(decoded.tokens) == limit
        assert sum(len(block.drafted) for block in decoded.blocks) <= limit


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_greedy_output_equals_the_targets(target, drafter, gamma):
    for seed in range(5):
        prompt = torch.randint(0, VOCABULARY, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected = autoregressive_decode(target, prompt, DecodingOptions(40, stop_ids=[5]))
        decoded = speculative_decode(target, drafter, prompt, gamma, DecodingOptions(40, stop_ids=[5]))
        assert decoded.tokens == expected.tokens
        assert [token for block in decoded.blocks for token in block.emitted] == decoded.tokens


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)])
def test_each_block_is_given_to_a_function_which_changes_nothing(target, drafter, sampling):
    seen, options = [], DecodingOptions(30, sampling, stop_ids=[5])
    runs = [
        speculative_decode(target, drafter, [1, 2, 3], 3, options, torch.Generator().manual_seed(0), on_block)
        for on_block in (None, lambda block: seen.append((block, torch.rand(1))))
    ]
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].blocks == runs[1].blocks == [block for block, _ in seen]


def test_greedy_output_agrees_with_generation_by_transformers(target):
    prompt = [3, 1, 4, 1, 5]
    ours = autoregressive_decode(target, prompt, DecodingOptions(20)).tokens
    theirs = target.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours == theirs[0, 5:].tolist()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(0.6, 0.9), Sampling(0.8, 1.0, 5)])
@pytest.mark.parametrize("gamma", [3, 5])
def test_a_copy_of_the_target_is_always_accepted(target, gamma, sampling):
    generator = torch.Generator().manual_seed(0)
    decoded = speculative_decode(
        target, target, [1, 2, 3], gamma, DecodingOptions(6 * (gamma + 1), sampling), generator
    )
    assert [block.accepted for block in decoded.blocks] == [gamma] * 6
    assert len(decoded.tokens) / len(decoded.blocks) == gamma + 1


SAMPLINGS = [Sampling(temperature, top_p) for temperature in (1.0, 0.6) for top_p in (1.0, 0.9)]


def distribution_of_pairs(target, prompt, sampling):
    with torch.inference_mode():
        once = warp(target(input_ids=torch.tensor([prompt])).logits[0, -1], sampling)
        rows = torch.tensor([[*prompt, token] for token in range(6)])
        twice = warp(target(input_ids=rows).logits[:, -1], sampling)
    return (once[:, None] * twice).flatten().double().numpy()


@pytest.mark.parametrize("gamma", [1, 3, 5, Adaptive(5, 0.4)])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_batched_decoding_samples_the_targets_distribution_for_prompts_of_any_length(sampling, gamma):
    target, drafter = (small_model(seed, vocab=6, sharpness=20.0) for seed in (1, 2))
    generator, prompts = torch.Generator().manual_seed(0), ([0, 1], [3], [5, 2, 4])
    decoded = speculative_decode_batch(
        target, drafter, list(prompts) * 1500, gamma, DecodingOptions(2, sampling), generator, 4400
    )
    for number, prompt in enumerate(prompts):
        counts = np.bincount([6 * one.tokens[0] + one.tokens[1] for one in decoded[number::3]], minlength=36)
        assert p_value(counts, distribution_of_pairs(target, prompt, sampling)) > FALSE_ALARM


def test_decoding_one_prompt_samples_the_targets_distribution():
    target, drafter = (small_model(seed, vocab=6, sharpness=40.0) for seed in (1, 2))
    sampling, generator, counts = Sampling(0.8, 0.95), torch.Generator().manual_seed(0), np.zeros(36)
    for _ in range(800):
        first, second = speculative_decode(target, drafter, [0, 1], 3, DecodingOptions(2, sampling), generator).tokens
        counts[first * 6 + second] += 1
    assert p_value(counts, distribution_of_pairs(target, [0, 1], sampling)) > FALSE_ALARM


PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2], [2, 3, 8, 4]]


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("gamma", [1, 4, Adaptive(6, 0.2)])
@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 1], [4, 1], [5, 9]], PROMPTS[:1]], ids=["ragged", "even", "one"])
def test_greedy_sequences_of_a_batch_equal_those_decoded_alone(target, drafter, prompts, gamma, batch_size):
    batch = speculative_decode_batch(target, drafter, prompts, gamma, STOP, batch_size=batch_size)
    for prompt, decoded in zip(prompts, batch, strict=True):
        alone = speculative_decode(target, drafter, prompt, gamma, STOP)
        assert decoded.tokens == alone.tokens == autoregressive_decode(target, prompt, STOP).tokens
        assert [token for block in decoded.blocks for token in block.emitted] == decoded.tokens
        assert decoded.blocks == alone.blocks


def generators(count):
    return [torch.Generator().manual_seed(number) for number in range(count)]


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("gamma", [1, 4, Adaptive(6, 0.2)])
@pytest.mark.parametrize("rule", RULES)
def test_sampled_sequences_with_their_own_generators_equal_those_decoded_alone(
    target, drafter, rule, gamma, batch_size
):
    options, before = DecodingOptions(17, Sampling(1.0, 0.95), [5], rule), torch.random.get_rng_state()
    prompts = [*PROMPTS, [1, 2]]
    batch = speculative_decode_batch(target, drafter, prompts, gamma, options, generators(6), batch_size)
    alone = [
        speculative_decode(target, drafter, prompt, gamma, options, generator)
        for prompt, generator in zip(prompts, generators(6), strict=True)
    ]
    assert [one.tokens for one in batch] == [one.tokens for one in alone]
    for together, single in zip(batch, alone, strict=True):
        # Acceptance probabilities are rounded otherwise in a batch.
        for block, other in zip(together.blocks, single.blocks, strict=True):
            assert block._replace(acceptance_probabilities=()) == other._replace(acceptance_probabilities=())
            assert block.acceptance_probabilities == pytest.approx(other.acceptance_probabilities, rel=1e-3, abs=1e-6)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 0.9, 20)])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_baseline_of_a_batch_is_that_of_each_prompt_alone(target, sampling, batch_size):
    options = DecodingOptions(17, sampling, [5])
    batch = autoregressive_decode_batch(target, PROMPTS, options, generators(5), batch_size)
    for prompt, generator, decoded in zip(PROMPTS, generators(5), batch, strict=True):
        alone = autoregressive_decode(target, prompt, options, generator)
        assert (decoded.tokens, decoded.blocks) == (alone.tokens, alone.blocks)


@pytest.mark.parametrize("prompts", [[[8], [1, 5, 9, 2, 6]], [[1, 5, 9, 2, 6], [8]], [[8], [3]]])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_batch_may_contain_a_prompt_of_one_token(target, drafter, prompts, batch_size):
    batch = speculative_decode_batch(target, drafter, prompts, 3, DecodingOptions(20), batch_size=batch_size)
    for prompt, decoded in zip(prompts, batch, strict=True):
        alone = speculative_decode(target, drafter, prompt, 3, DecodingOptions(20))
        assert decoded.tokens == alone.tokens == autoregressive_decode(target, prompt, DecodingOptions(20)).tokens


def test_models_with_learned_positions_decode_in_batches():
    from transformers import GPT2Config, GPT2LMHeadModel

    models = []
    for seed, width in ((1, 32), (2, 16)):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=width, n_layer=2, n_head=2)
        models.append(GPT2LMHeadModel(config).eval())
        models[-1].transformer.wte.weight.data.mul_(20)
    together = speculative_decode_batch(models[0], models[1], PROMPTS, 3, SHORT)
    for prompt, decoded in zip(PROMPTS, together, strict=True):
        assert decoded.tokens == autoregressive_decode(models[0], prompt, SHORT).tokens


def test_a_model_with_a_window_shorter_than_the_sequences_is_refused_in_batches(drafter):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=16,
    )
    windowed = MistralForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"the last 16 tokens .* decode them one at a time"):
        speculative_decode_batch(windowed, drafter, PROMPTS, 3, DecodingOptions(20))
    short = speculative_decode_batch(windowed, drafter, [[1], [2]], 3, DecodingOptions(8))
    assert short[1].tokens == autoregressive_decode(windowed, [2], DecodingOptions(8)).tokens


def test_a_model_that_derives_positions_from_its_mask_is_refused_in_batches(drafter):
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    alibi = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2)).eval()
    with pytest.raises(ValueError, match="BloomForCausalLM does not accept explicit masks and positions"):
        speculative_decode_batch(alibi, drafter, PROMPTS, 3, DecodingOptions(20))
    assert speculative_decode(alibi, drafter, [1, 2], 3, DecodingOptions(8)).tokens == (
        autoregressive_decode(alibi, [1, 2], DecodingOptions(8)).tokens
    )


def test_an_unsure_drafter_drafts_one_token_and_a_sure_one_all(target):
    unsure = speculative_decode(target, small_model(2, sharpness=0.0), [1, 2], Adaptive(5, 0.5), DecodingOptions(20))
    assert {len(block.drafted) for block in unsure.blocks[:-1]} == {1}
    sure = speculative_decode(target, small_model(2, sharpness=1e4), [1, 2], Adaptive(5, 0.5), DecodingOptions(20))
    assert max(len(block.drafted) for block in sure.blocks) == 5


def test_acceptance_probabilities_predict_the_number_of_accepted_tokens(target, drafter):
    options, generator = DecodingOptions(12, Sampling(0.8)), torch.Generator().manual_seed(0)
    decoded = speculative_decode_batch(target, drafter, [[1, 2]] * 600, 3, options, generator)
    blocks = [block for one in decoded for block in one.blocks]
    expected = sum(
        float(np.prod(block.acceptance_probabilities[: j + 1]))
        for block in blocks
        for j in range(len(block.acceptance_probabilities))
    )
    accepted = sum(block.accepted for block in blocks)
    # The standard error: each block's accepted count has a variance of at most (3/2)^2 here.
    assert abs(expected - accepted) < 5 * 1.5 * len(blocks) ** 0.5
    assert all(0 <= value <= 1 for block in blocks for value in block.acceptance_probabilities)


def test_tokens_are_drawn_in_proportion_to_their_weights_and_never_with_weight_zero():
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.5, 0.0])
    drawn = draw(weights.expand(20_000, -1), torch.Generator().manual_seed(0))
    assert p_value(np.bincount(drawn, minlength=6)[[1, 3, 4]], np.array([3, 1, 0.5]) / 4.5) > FALSE_ALARM
    assert set(drawn.tolist()) == {1, 3, 4}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_bounds_of_the_unit_interval_draw_tokens_with_positive_weight(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    assert draw(torch.tensor([[0.0, 0.1, 0.7, 0.0]])).tolist() == [2 if uniform else 1]


def test_warping_agrees_with_transformers_warpers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    reference = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(20)(None, TemperatureLogitsWarper(0.6)(None, logits)))
    torch.testing.assert_close(warp(logits, Sampling(0.6, 0.9, 20)), reference.softmax(-1))


def test_greedy_warping_is_one_hot_at_the_first_maximum():
    probs = warp(torch.tensor([[0.0, 2.0, 2.0]]), GREEDY)
    assert probs.tolist() == [[0.0, 1.0, 0.0]]


def test_wrong_settings_are_refused_before_any_call(target):
    for gamma, limit, prompt, message in [
        (0, 5, [1], "num_speculative_tokens .* is 0"),
        (3, 0, [1], "max_new_tokens is 0"),
        (3, 5, [], "no tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            speculative_decode(None, None, prompt, gamma, DecodingOptions(limit))
    with pytest.raises(ValueError, match="batch_size is 0"):
        speculative_decode_batch(None, None, [[1]], 3, DecodingOptions(5), batch_size=0)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p_and_all_ties_with_its_last():
    probs = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    assert in_nucleus(probs, 0.6).tolist() == [[False, True, True, True], [True] * 4, [False, True, False, False]]
    assert in_nucleus(probs, 0.5).tolist() == [[False, True, False, False], [True] * 4, [False, True, False, False]]
    assert in_nucleus(probs, 1e-9).sum(-1).tolist() == [1, 4, 1]


def with_learned_positions(context, seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=context, n_embd=16, n_layer=1, n_head=2)).eval()


@pytest.mark.parametrize("contexts", [(40, 40), (90, 40), (40, 90)])
def test_decoding_ends_at_the_shorter_context_with_the_targets_text(contexts):
    """With learned positions, a call beyond the context would be an IndexError."""
    target, drafter = (with_learned_positions(context, seed) for seed, context in enumerate(contexts))
    options, prompts = DecodingOptions(100), [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    batch = speculative_decode_batch(target, drafter, prompts, 4, options)
    for prompt, together in zip(prompts, batch, strict=True):
        expected = autoregressive_decode(target, prompt, options).tokens
        decoded = speculative_decode(target, drafter, prompt, 4, options).tokens
        assert len(expected) == contexts[0] - len(prompt)
        assert decoded == together.tokens == expected[: 40 - len(prompt)]
    with pytest.raises(ValueError, match="the prompt has 40 tokens, and the context of the models is 40: shorten it"):
        speculative_decode(target, drafter, [1] * 40, 4, options)
