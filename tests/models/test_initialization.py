"""Each way to start a drafter does what it says."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from drafter.models.initialization import build_drafter, project_embeddings, take_layers, transplant
from drafter.models.slicing import rotate, slice_hidden_states
from tests.conftest import VOCABULARY, small_model
from tests.families import family

IDS = torch.arange(2, 22).view(2, 10)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.fixture(scope="module")
def deep():
    return small_model(seed=3, hidden=32, layers=4, sharpness=20.0)


def test_all_layers_are_the_model_itself(deep):
    assert torch.equal(logits(take_layers(deep, [0, 1, 2, 3])), logits(deep))


def test_some_layers_are_computed_in_their_order(deep):
    expected = copy.deepcopy(deep)
    expected.model.layers = torch.nn.ModuleList([deep.model.layers[0], deep.model.layers[3]])
    found = take_layers(deep, [0, -1])
    assert torch.allclose(logits(found), logits(expected))
    assert found.config.num_hidden_layers == 2
    assert deep.config.num_hidden_layers == 4


def test_layers_are_taken_of_a_model_without_weights(deep):
    with torch.device("meta"):
        empty = type(deep)(deep.config)
    assert take_layers(empty, [1, 2]).num_parameters() == take_layers(deep, [1, 2]).num_parameters()


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma2", "phi3"])
def test_layers_of_other_architectures(name):
    model = family(name).eval()
    count = model.config.num_hidden_layers
    assert torch.equal(logits(take_layers(model, list(range(count)))), logits(model))
    assert take_layers(model, [count - 1]).config.num_hidden_layers == 1


@pytest.mark.parametrize(("numbers", "problem"), [([0, 4], "no layer 4: it has 0 to 3"), ([], "an empty list")])
def test_layers_that_do_not_exist_are_refused(deep, numbers, problem):
    with pytest.raises(ValueError, match=problem):
        take_layers(deep, numbers)


def small(hidden, tied):
    fields = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    return build_drafter(fields, VOCABULARY, {})


@pytest.mark.parametrize("tied", [True, False])
def test_projected_rows_have_the_best_gram_matrix_of_their_rank(deep, tied):
    input_VH, output_VH = deep.get_input_embeddings().weight, deep.get_output_embeddings().weight
    drafter = project_embeddings(small(8, tied), input_VH, output_VH)
    pairs = [(drafter.get_output_embeddings().weight, output_VH)]
    pairs += [(drafter.get_input_embeddings().weight, output_VH if tied else input_VH)]
    for rows_VK, rows_VH in pairs:
        left, values, _ = torch.linalg.svd(rows_VH)
        best_VV = left[:, :8] @ torch.diag(values[:8] ** 2) @ left[:, :8].T
        found_VV = rows_VK @ rows_VK.T
        assert torch.allclose(found_VV / found_VV.norm(), best_VV / best_VV.norm(), atol=1e-5)
        assert float(rows_VK.detach().square().mean().sqrt()) == pytest.approx(0.02, rel=1e-4)


def test_a_drafter_wider_than_the_target_cannot_be_projected(deep):
    with pytest.raises(ValueError, match="hidden size is 48, and init=projected takes at most the target's, 32"):
        project_embeddings(small(48, True), deep.get_input_embeddings().weight, deep.get_output_embeddings().weight)


def qwen3():
    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


@pytest.mark.parametrize("make", [lambda: small_model(seed=5, hidden=32, layers=3), qwen3], ids=["llama", "qwen3"])
def test_a_rotation_changes_no_logits(make):
    model = make().requires_grad_(False)
    for name, parameter in model.named_parameters():  # gains and biases that would show a mistake
        if name.endswith(("norm.weight", "bias")):
            parameter.copy_(1 + 0.5 * torch.randn_like(parameter))
    basis = torch.linalg.qr(torch.randn(32, 32)).Q
    assert torch.allclose(logits(rotate(model, basis)), logits(model), atol=1e-4)


def test_directions_that_no_state_has_can_be_left_out():
    """The states of this model lie in 16 of 32 dimensions, because nothing writes the others."""
    model = small_model(seed=6, hidden=32, layers=2)
    free = torch.linalg.qr(torch.randn(32, 32)).Q
    keep = free[:, :16] @ free[:, :16].T
    # The states are so large that the normalisation's epsilon, which is relative to their number, does not matter.
    model.model.embed_tokens.weight.copy_(100 * model.model.embed_tokens.weight @ keep)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.copy_(keep @ layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight.copy_(keep @ layer.mlp.down_proj.weight)
    sliced = slice_hidden_states(model, 16, IDS)
    assert sliced.config.hidden_size == 16
    assert torch.allclose(logits(sliced), logits(model), atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi"])
def test_architectures_unlike_llama_are_not_made_narrower(name):
    model = family(name)
    with pytest.raises(ValueError, match="which no architecture like Llama's has: its layers cannot be made narrower"):
        slice_hidden_states(model, 8, IDS)


TEXT = ["the cat sat on the mat and the dog ran to the house"] * 5


def byte_level(size):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def metaspace():
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        decoders.Metaspace(prepend_scheme="never"),
    )
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=40, special_tokens=["<unk>", "<end>"]))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", unk_token="<unk>")


def gpt2(tokenizer, tied=True):
    torch.manual_seed(4)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied)
    )


def test_a_model_keeps_its_rows_in_its_own_vocabulary():
    tokenizer = byte_level(280)
    model = gpt2(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    after = transplant(copy.deepcopy(model), tokenizer, tokenizer, len(tokenizer) + 6).get_input_embeddings().weight
    whole = [t for t in range(len(tokenizer)) if "\ufffd" not in tokenizer.decode([t])]
    assert len(whole) > 120
    assert torch.allclose(after[whole], before[whole])
    assert torch.allclose(after[len(tokenizer) :], before.mean(0).expand(6, -1), atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_of_another_vocabulary_is_the_mean_of_its_pieces(tied):
    own, new = byte_level(258), metaspace()
    model = gpt2(own, tied)
    before = [one.weight.detach().clone() for one in (model.get_input_embeddings(), model.get_output_embeddings())]
    made = transplant(model, own, new, len(new))
    ordinary = set(range(len(new))) - set(new.all_special_ids)
    token = max(ordinary, key=lambda t: len(new.convert_ids_to_tokens(t)))
    pieces = own(new.convert_ids_to_tokens(token).replace("▁", " "), add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    for table, rows in zip((made.get_input_embeddings(), made.get_output_embeddings()), before, strict=True):
        assert torch.allclose(table.weight[token], rows[pieces].mean(0), atol=1e-6)
        assert torch.allclose(table.weight[new.eos_token_id], rows[own.eos_token_id])
    assert made.config.vocab_size == len(new)
    assert made.config.eos_token_id == new.eos_token_id
    assert logits(made, torch.tensor([[1, 2, 3]])).shape == (1, 3, len(new))
