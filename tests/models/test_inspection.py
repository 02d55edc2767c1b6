"""Loading models and their output embeddings, building drafters, and properties of models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PhiConfig

from benchmarks.families import family as models_of
from drafter.models.initialization import build_drafter, special_ids
from drafter.models.inspection import check_positions, hidden_states, num_active_parameters, num_parameters
from drafter.models.loading import (
    context_length,
    embedding_checksum,
    load_model,
    load_output_embedding,
    load_target,
    load_tokenizer,
    meta_model,
    vocabulary_width,
)
from drafter.models.source import ModelSource
from experiments.tiny_target import train_tokenizer
from tests.families import family

CONF = Path(__file__).parents[2] / "conf"
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    build_drafter(SMALL, 300, SPECIAL).save_pretrained(path)
    train_tokenizer(["the area of a rectangle"], 280, 64).save_pretrained(path)
    return str(path)


def test_the_target_is_frozen_and_in_eval_mode(saved):
    target = load_target(saved)
    assert not target.training
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_a_loaded_drafter_can_be_trained(saved):
    assert all(parameter.requires_grad for parameter in load_model(saved).parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_loaded_in_the_given_dtype(saved, dtype):
    assert {parameter.dtype for parameter in load_target(ModelSource(saved, dtype=dtype)).parameters()} == {
        getattr(torch, dtype)
    }


def test_the_tiny_target_of_the_repository_loads_frozen_with_its_tokenizer():
    path = str(CONF.parent / "assets" / "tiny-target")
    target, tokenizer = load_target(path), load_tokenizer(path)
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert {parameter.dtype for parameter in target.parameters()} == {torch.float32}
    assert len(tokenizer) <= vocabulary_width(path) == target.get_output_embeddings().weight.shape[0] == 4096
    assert tokenizer.chat_template


@pytest.mark.parametrize("load", [load_target, load_model, load_tokenizer, vocabulary_width])
@pytest.mark.parametrize("path", ["./nowhere", "/no/such/model", "runs/no_such_root/drafter", "~/no_such_model"])
def test_a_missing_local_path_is_named_and_the_hub_is_not_asked(load, path):
    with pytest.raises(OSError, match="the directory does not exist") as refusal:
        load(path)
    assert f"'{path}'" in str(refusal.value)


def test_the_vocabulary_width_is_the_number_of_embedding_rows_with_padding(saved):
    assert vocabulary_width(saved) == 300
    assert len(load_tokenizer(saved)) < 300


def test_the_context_length_is_the_configs():
    assert context_length(build_drafter(SMALL, 300, SPECIAL)) == 64


def test_a_model_without_a_position_limit_has_a_very_large_context():
    with torch.device("meta"):
        bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))
    assert context_length(bloom) == 2**31


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_sequences_beyond_a_table_of_learned_positions_are_refused(kind):
    model = family(kind)
    assert context_length(model) == 128
    check_positions(model, 128, "rows")
    with pytest.raises(
        ValueError, match=r"rows have up to 129 tokens, and \w+ was made for 128, with a learned position each"
    ):
        check_positions(model, 129, "rows")


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_sequences_beyond_positions_that_are_not_learned_get_a_warning(kind, caplog):
    model = family(kind)
    check_positions(model, context_length(model), "rows")
    assert not caplog.records
    check_positions(model, context_length(model) + 1, "rows")
    assert len(caplog.records) == 1


def test_a_built_drafter_has_the_given_architecture_vocabulary_and_special_ids():
    fields = dict(SMALL)
    drafter = build_drafter(fields, 300, SPECIAL)
    assert fields == SMALL
    assert drafter.config.model_type == "llama"
    assert drafter.config.num_hidden_layers == 2
    assert drafter.get_input_embeddings().weight.shape == (300, 16)
    assert {key: getattr(drafter.config, key) for key in SPECIAL} == SPECIAL
    assert all(parameter.requires_grad for parameter in drafter.parameters())


def test_special_ids_are_the_tokenizers(saved):
    tokenizer = load_tokenizer(saved)
    assert special_ids(tokenizer, 300) == SPECIAL
    tokenizer.pad_token = None
    assert special_ids(tokenizer, 300)["pad_token_id"] is None


def test_a_special_token_without_a_row_in_the_embedding_is_none(saved):
    tokenizer = load_tokenizer(saved)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    beyond = tokenizer.pad_token_id
    assert special_ids(tokenizer, beyond) == SPECIAL | {"pad_token_id": None}
    assert special_ids(tokenizer, beyond + 1) == SPECIAL | {"pad_token_id": beyond}
    build_drafter(SMALL, beyond, special_ids(tokenizer, beyond))


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "llama4_text", "jamba", "ernie4_5_moe"]
)
def test_the_active_parameters_of_a_mixture_are_those_that_a_token_changes(kind):
    """The reference is the gradient of one token: an expert that it does not meet has none."""
    model = models_of(kind).requires_grad_(True)
    embedding = model.get_input_embeddings()
    model(input_ids=torch.tensor([[5]]), use_cache=False).logits.square().sum().backward()
    met = 0
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None or parameter is embedding.weight:  # router biases; rows that are looked up count, too
            met += parameter.numel()
        elif parameter.dim() == 3 or "bias" in kind:
            met += int(gradient.flatten(1).abs().sum(1).count_nonzero()) * parameter[0].numel()
        else:
            met += parameter.numel()
    biases = [one for name, one in model.named_parameters() if name.endswith("proj_bias")]  # of gpt-oss's experts
    met -= sum(one.numel() // 2 for one in biases)
    assert num_active_parameters(model) == met < num_parameters(model)


def test_the_active_parameters_of_another_model_are_all():
    assert num_active_parameters(model := models_of("llama")) == num_parameters(model)
    assert num_active_parameters(model := models_of("mamba2")) == num_parameters(model)


def test_a_tied_embedding_is_counted_once():
    tied, untied = (build_drafter({**SMALL, "tie_word_embeddings": tie}, 300, SPECIAL) for tie in (True, False))
    assert num_parameters(untied) - num_parameters(tied) == 300 * 16


def test_the_output_embedding_turns_hidden_states_into_the_models_logits(saved):
    model = load_target(saved)
    ids_BT = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden_BTH = hidden_states(model, ids_BT, torch.ones_like(ids_BT))
        expected_BTV = model(input_ids=ids_BT).logits
    assert hidden_BTH.shape == (2, 7, 16)
    # The same float32 operations in the same order, up to the attention kernel's choice of summation.
    torch.testing.assert_close(model.get_output_embeddings()(hidden_BTH), expected_BTV, rtol=1e-5, atol=1e-6)


def test_padding_on_the_right_does_not_change_the_real_positions(saved):
    model = load_target(saved)
    ids_BT = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.tensor([[1] * 5 + [0] * 4])
    with torch.no_grad():
        alone = hidden_states(model, ids_BT[:, :5], mask_BT[:, :5])
        padded = hidden_states(model, ids_BT, mask_BT)[:, :5]
    # Sums over another number of (masked) keys: float32 rounding alone.
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


def test_the_papers_drafter_has_the_papers_architecture_and_size():
    fields = yaml.safe_load((CONF / "drafter" / "llama2_115m.yaml").read_text())
    with torch.device("meta"):
        drafter = build_drafter(fields, 32_000, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})
        target = AutoModelForCausalLM.from_config(
            LlamaConfig(
                num_hidden_layers=32,
                hidden_size=4096,
                intermediate_size=11008,
                num_attention_heads=32,
                vocab_size=32_000,
                tie_word_embeddings=False,
            )
        )
    assert drafter.get_input_embeddings().weight.shape[0] == drafter.get_output_embeddings().weight.shape[0] == 32_000
    layer = 4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024  # attention, gated MLP, two norms
    assert num_parameters(drafter) == 2 * 32_000 * 1024 + 4 * layer + 1024
    # The paper states 115M parameters and c = 1.64% (115M of a nominal 7B). The dimensions in its table give 116.9M,
    # 2% more, and Llama 2 7B has 6.74B: 1.735%.
    assert num_parameters(drafter) == pytest.approx(115e6, rel=0.02)
    assert num_parameters(drafter) / 7e9 == pytest.approx(0.0164, abs=0.0006)
    assert num_parameters(target) == 6_738_415_616
    assert num_parameters(drafter) / num_parameters(target) == pytest.approx(0.01735, abs=0.00001)


def test_the_tiny_drafter_has_the_number_of_parameters_that_its_config_states():
    fields = yaml.safe_load((CONF / "drafter" / "tiny.yaml").read_text())
    drafter = build_drafter(fields, 4096, SPECIAL)
    target = load_target(str(CONF.parent / "assets" / "tiny-target"))
    assert num_parameters(drafter) == pytest.approx(158_000, rel=0.01)
    assert num_parameters(drafter) / num_parameters(target) == pytest.approx(0.0458, abs=0.0005)


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_embedding_is_read_without_the_rest_of_the_model(tmp_path, tied):
    model = build_drafter(SMALL | {"tie_word_embeddings": tied}, 300, SPECIAL)
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = index["model.embed_tokens.weight" if tied else "lm_head.weight"]
    for name in set(index.values()) - {needed}:
        (tmp_path / name).unlink()
    found = load_output_embedding(ModelSource(str(tmp_path), dtype="bfloat16")).get_output_embeddings()
    assert torch.equal(found.weight, model.get_output_embeddings().weight.bfloat16())
    assert not found.weight.requires_grad


def test_an_output_embedding_with_a_bias_has_it(tmp_path):
    config = PhiConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_output_embedding(str(tmp_path)).get_output_embeddings().bias, model.lm_head.bias)


def test_an_output_embedding_that_is_not_in_safetensors_is_loaded_with_its_model(tmp_path):
    model = build_drafter(SMALL, 300, SPECIAL)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = load_output_embedding(str(tmp_path)).get_output_embeddings()
    assert torch.equal(found.weight, model.get_output_embeddings().weight)


def save_variant(path, dtype="float32", tied=True, head=None, without=(), binary=False):
    """Save a model with a separate head or none, without some tensors, as safetensors or as a pickle."""
    model = build_drafter(SMALL | {"tie_word_embeddings": tied}, 300, SPECIAL)
    model.save_pretrained(path)
    tensors = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    table = tensors["model.embed_tokens.weight"]
    if head:
        tensors["lm_head.weight"] = torch.randn_like(table) if head == "other" else table.clone()
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items() if name not in without}
    if binary:
        (path / "model.safetensors").unlink()
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "other"},  # transformers keeps it separate although the config says tied
        {"head": "equal"},
        {"head": "other", "tied": False},
        {"head": "other", "without": ["model.embed_tokens.weight"]},  # tied to the tensor that exists
        {"head": "other", "dtype": "float16"},
        {"head": "other", "binary": True},
        {"binary": True},
    ],
    ids=str,
)
def test_the_output_embedding_is_the_one_of_the_loaded_target(tmp_path, options):
    save_variant(tmp_path, **options)
    for dtype in ("float32", "bfloat16"):
        source = ModelSource(str(tmp_path), dtype=dtype)
        ours, theirs = (load(source).get_output_embeddings() for load in (load_output_embedding, load_target))
        assert ours.weight.dtype == theirs.weight.dtype == getattr(torch, dtype)
        assert torch.equal(ours.weight, theirs.weight)


def test_an_output_embedding_is_not_rounded_to_the_configs_dtype(tmp_path):
    save_variant(tmp_path, head="other")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"dtype": "bfloat16"}))
    ours, theirs = (load(str(tmp_path)).get_output_embeddings() for load in (load_output_embedding, load_target))
    assert torch.equal(ours.weight, theirs.weight)


def test_a_file_with_all_weights_has_precedence_over_shards(tmp_path):
    build_drafter(SMALL, 300, SPECIAL).save_pretrained(tmp_path, max_shard_size="12KB")
    save_variant(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    ours, theirs = (load(str(tmp_path)).get_output_embeddings() for load in (load_output_embedding, load_target))
    assert torch.equal(ours.weight, theirs.weight)


def test_the_output_embedding_of_a_quantised_model_is_loaded_with_its_model(tmp_path, monkeypatch):
    save_variant(tmp_path, head="other")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": "fp8"}}))
    full = build_drafter(SMALL, 300, SPECIAL)  # instead of loading, which needs a GPU
    monkeypatch.setattr("drafter.models.loading.load_model", lambda source: full)
    assert load_output_embedding(str(tmp_path)).get_output_embeddings() is full.get_output_embeddings()


def test_a_checksum_depends_on_an_embeddings_values_alone():
    plain, other = torch.nn.Linear(4, 6000, bias=False), torch.nn.Linear(4, 6000)
    plain.weight.data = plain.weight.bfloat16().float()
    before = embedding_checksum(plain)
    assert len(before) == 16
    assert embedding_checksum(plain.bfloat16()) == before
    other.weight.data = plain.weight.data.float()
    assert embedding_checksum(other) != before
    plain.weight.data[5999, 3] += 1
    assert embedding_checksum(plain) != before


def test_a_model_without_weights_has_the_shapes_of_its_config_or_of_the_given_fields(saved):
    model = meta_model(str(saved))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert num_parameters(model) == num_parameters(load_model(str(saved)))
    assert vocabulary_width(str(saved)) == model.config.vocab_size
    given = meta_model("no/such-model", shape=SMALL | {"vocab_size": 50})
    assert given.config.vocab_size == 50
