"""A target's first layers are a drafter that shares its weights: right logits, nothing copied, and what is refused."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from drafter.models.early_exit import first_layers
from drafter.models.initialization import take_layers
from drafter.models.inspection import num_parameters
from tests.conftest import small_model
from tests.families import family

IDS = torch.tensor([[1, 5, 7, 2, 9, 3]])


@pytest.fixture(params=["llama", "gpt2"])
def target(request):
    torch.manual_seed(0)
    if request.param == "llama":
        return small_model(0, hidden=32, layers=3, vocab=24)
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=64, n_embd=32, n_layer=3, n_head=2)).eval()


def test_all_layers_are_the_target_and_fewer_are_those_that_training_starts_from(target):
    with torch.no_grad():
        assert torch.equal(first_layers(target, 3)(input_ids=IDS).logits, target(input_ids=IDS).logits)
        copied = take_layers(target, [0, 1]).eval()
        assert torch.equal(first_layers(target, 2)(input_ids=IDS).logits, copied(input_ids=IDS).logits)
    assert num_parameters(first_layers(target, 2)) == num_parameters(copied) < num_parameters(target)


def test_every_weight_is_the_targets_own_and_the_target_stays_as_it_was(target):
    before = {name: id(one) for name, one in target.named_parameters()}
    made = first_layers(target, 1)
    assert {name: id(one) for name, one in made.named_parameters()}.items() <= before.items()
    assert {name: id(one) for name, one in target.named_parameters()} == before
    assert (made.config.num_hidden_layers, target.config.num_hidden_layers) == (1, 3)


@pytest.mark.parametrize("count", [1, 3])
def test_greedy_text_is_the_targets_own(target, count):
    options = DecodingOptions(max_new_tokens=20)
    alone = autoregressive_decode(target, [1, 5, 7], options)
    decoded = speculative_decode(target, first_layers(target, count), [1, 5, 7], 3, options)
    assert decoded.tokens == alone.tokens
    if count == 3:
        assert len(decoded.blocks) < len(alone.tokens)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mixtral"])
def test_config_fields_with_an_entry_per_layer_are_cut_too(name):
    target = family(name).eval()
    total = target.config.num_hidden_layers
    made = first_layers(target, total)
    with torch.no_grad():
        torch.testing.assert_close(made(input_ids=IDS).logits, target(input_ids=IDS).logits)
        assert first_layers(target, 1)(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("count", [0, 4])
def test_layers_that_the_target_does_not_have_are_refused(count):
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM has 3 layers: give 1 to 3 of them, not {count}"):
        first_layers(small_model(0, hidden=32, layers=3, vocab=24), count)
