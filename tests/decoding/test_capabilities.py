"""A model decodes exactly what it would without a cache, or is refused by name before it decodes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafter.decoding.capabilities import check_can_decode, check_decodes, decoder_of
from drafter.decoding.decoders import Compiled, Decoder
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode, speculative_decode_batch
from drafter.decoding.stateful import StatefulDecoder
from drafter.decoding.timings import CallTimings, measure_call_timings
from tests.conftest import small_model
from tests.families import DECODE, REFUSED, STATEFUL, family

PROMPT = [3, 5, 7, 9, 11, 2, 4]


def uncached(model, prompt, count):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def like(model):
    """Return a drafter that mostly agrees: the model with a slightly changed output embedding."""
    drafter = family(model.config.model_type)
    torch.manual_seed(1)
    weight = drafter.get_output_embeddings().weight
    weight.add_(0.3 * weight.std() * torch.randn_like(weight))
    return drafter


@pytest.mark.parametrize("kind", DECODE)
def test_a_family_decodes_as_without_a_cache_even_beyond_its_window(kind):
    target = family(kind)
    check_can_decode(target.config)
    expected = uncached(target, PROMPT, 20)
    decoded = speculative_decode(target, like(target), PROMPT, 3, DecodingOptions(20))
    assert decoded.tokens == autoregressive_decode(target, PROMPT, DecodingOptions(20)).tokens == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_family_with_states_decodes_as_without_a_cache_as_target_and_as_drafter(kind):
    target = family(kind)
    check_can_decode(target.config)
    expected, options = uncached(target, PROMPT, 20), DecodingOptions(20)
    decoded = speculative_decode(target, like(target), PROMPT, 3, options)
    assert decoded.tokens == autoregressive_decode(target, PROMPT, options).tokens == expected
    accepted = {block.accepted for block in decoded.blocks}
    assert 0 in accepted  # rejected at once,
    assert accepted & {1, 2}  # and after an accepted draft
    assert len(set(expected)) > 2
    with pytest.raises(ValueError, match="has states, which advance for all sequences at once: decode its sequences"):
        speculative_decode_batch(target, target, [PROMPT], 3, options)
    with pytest.raises(ValueError, match="has states, which a compiled call does not keep: give compile=false"):
        decoder_of(Compiled(target, 40))


def test_wrong_states_that_look_like_rounding_are_told_from_it():
    """Jamba begins from an empty state if a later call has several tokens: wrong by a tenth of what others change."""
    for dtype in (torch.float32, torch.bfloat16):
        for seed in range(4):
            decoder = decoder_of(family("jamba", seed).to(dtype))
            assert isinstance(decoder, StatefulDecoder)
            assert decoder.one_at_a_time
        decoder = decoder_of(family("qwen3_5_text").to(dtype))
        assert isinstance(decoder, StatefulDecoder)
        assert not decoder.one_at_a_time


def test_a_decoder_with_states_can_return_to_any_earlier_position():
    model = family("qwen3_5_text")
    decoder, tokens = StatefulDecoder(model), [*PROMPT, 8, 6, 10, 12]
    expected_TV = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    for start, end in ((0, 6), (6, 9), (7, 8), (8, 11), (8, 9), (9, 11), (2, 7), (0, 11)):
        found_TV = decoder.forward([tokens[start:end]], [start], end - start)[0]
        torch.testing.assert_close(found_TV, expected_TV[start:end], rtol=1e-4, atol=1e-4)


def test_a_block_of_a_target_with_states_also_takes_the_time_of_reading_its_tokens_again(drafter):
    timings = measure_call_timings(family("lfm2"), drafter, PROMPT, 2)
    assert timings.target_replays
    assert not timings.drafter_replays
    assert timings.widths() == {}
    one = CallTimings(0.2, [1.0, 1.1, 1.3], target_replays=True)
    assert one.block(2) == pytest.approx(0.2 * 2 + 1.3 + 1.1)
    assert one._replace(drafter_replays=True).block(2) == pytest.approx(0.2 * 3 + 1.3 + 1.1)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_whose_states_cannot_be_put_back_is_refused_by_name_as_target_and_as_drafter(kind, drafter):
    model = family(kind)
    named = f"{type(model).__name__} cannot be decoded with: .* finetuning and validation's expected block efficiency"
    for refused in (
        lambda: check_can_decode(model.config),
        lambda: autoregressive_decode(model, PROMPT, DecodingOptions(5)),
        lambda: speculative_decode(model, drafter, PROMPT, 3, DecodingOptions(5)),
        lambda: speculative_decode(drafter, model, PROMPT, 3, DecodingOptions(5)),
        lambda: speculative_decode_batch(model, drafter, [PROMPT], 3, DecodingOptions(5)),
        lambda: Compiled(model, 40) and decoder_of(Compiled(model, 40)),
    ):
        with pytest.raises(ValueError, match=named):
            refused()


def test_the_refusal_names_the_model_that_was_loaded(tmp_path):
    family("rwkv").save_pretrained(tmp_path / "recurrent")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "recurrent")
    for refused in (lambda: check_can_decode(loaded.config), lambda: check_decodes(loaded)):
        with pytest.raises(ValueError, match=f"^{tmp_path}/recurrent: RwkvForCausalLM cannot be decoded with: "):
            refused()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_neither_causes_a_refusal_nor_hides_a_state(dtype):
    for kind in ("llama", "qwen3_moe"):
        for seed in range(3):
            check_decodes(family(kind, seed).to(dtype))
    with pytest.raises(ValueError, match="cannot be decoded with"):
        check_decodes(family("rwkv").to(dtype))


def test_models_with_initial_weights_are_checked_correctly():
    for kind, refused in (("llama", False), ("rwkv", True), ("recurrent_gemma", True)):
        model = family(kind)
        model.init_weights()
        if refused:
            with pytest.raises(ValueError, match="cannot be decoded with"):
                check_decodes(model)
        else:
            check_decodes(model)


@pytest.mark.parametrize("broken", ["crop", "ignored"])
def test_a_broken_cache_is_detected(broken, monkeypatch):
    model = small_model(1, 32, 2, sharpness=60.0)
    if broken == "crop":
        monkeypatch.setattr("transformers.cache_utils.DynamicLayer.crop", lambda *_: None)
    else:
        forward = Decoder.forward

        def without_cache(self, ids, starts, keep):
            return forward(Decoder(self.model), ids, [0], keep)

        monkeypatch.setattr(Decoder, "forward", without_cache)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be decoded with"):
        check_decodes(model)


def test_a_model_is_tried_once_without_random_numbers_and_left_in_its_mode(monkeypatch):
    model = small_model(1).train()
    before = torch.get_rng_state()
    check_decodes(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    monkeypatch.setattr(type(model), "forward", None)
    check_decodes(model)


def test_a_hybrid_architecture_whose_layers_all_attend_is_not_refused_by_its_config():
    sizes = {"num_local_experts": 2, "shared_intermediate_size": 32, "mamba_n_heads": 8, "mamba_d_head": 8}
    model = family("granitemoehybrid", layer_types=["attention"] * 2, **sizes)
    check_can_decode(model.config)
    check_decodes(model)


def test_a_compiled_decoder_is_right_beyond_a_window(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    target = family("mistral")
    pair = [Compiled(model, 48) for model in (target, like(target))]
    assert speculative_decode(*pair, PROMPT, 3, DecodingOptions(20)).tokens == uncached(target, PROMPT, 20)  # type: ignore[call-arg]


def test_running_out_of_memory_is_not_recorded_as_a_refusal(monkeypatch):
    model = small_model(1)

    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            check_decodes(model)
    check_decodes(model)
