"""The stages with the target's states in the responses: what is computed, taken, counted and refused."""

import csv

import pytest
from hydra import initialize_config_module
from transformers import Gemma2Config

from drafter.artifacts.manifest import read_manifest
from drafter.artifacts.rows import Rows
from experiments.running import caching, response_settings
from experiments.running.composing import configured
from tests.experiments.test_pipeline import stage


def curve(folder):
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_finetuning_on_states_that_responding_kept_is_that_on_an_ordinary_cache(world, tmp_path, monkeypatch):
    overrides, root = world
    given = [*overrides, f"inputs.responses={tmp_path}/responses"]
    stage("respond", [*overrides, "respond.states=float32", f"out={tmp_path}/responses"])
    ours, theirs = (Rows(path, "respond") for path in (tmp_path / "responses", root / "responses"))
    assert [row["response_ids"].tolist() for row in ours] == [row["response_ids"].tolist() for row in theirs]
    assert "states" not in read_manifest(root / "responses", "respond")["settings"]
    exact = ["cache=exact", "cache.format.dtype=float32"]
    stage("cache", [*overrides, *exact, f"out={tmp_path}/own"])
    stage("cache", [*given, "cache=exact", f"out={tmp_path}/rounded"])  # bfloat16, which the responses do not have
    with monkeypatch.context() as patch:
        patch.setattr(caching, "load_target", None)
        stage("cache", [*given, *exact, f"out={tmp_path}/taken"])
    with initialize_config_module("conf", version_base="1.3"):
        for how, number in (([], len(ours)), (["target.dtype=bfloat16"], 0), (["cache=sparse"], 0)):
            cfg = configured("cache", [*given, *(exact if "cache=sparse" not in how else []), *how])
            assert caching.count_states(cfg, ours) == number
    counts = {name: read_manifest(tmp_path / name, "cache")["counts"] for name in ("own", "rounded", "taken")}
    assert {name: one["taken_from_responses"] for name, one in counts.items()} == {
        "own": 0,
        "rounded": 0,
        "taken": len(ours),
    }
    assert len({one["output_embedding"] for one in counts.values()}) == 1
    for name, read in (("own", overrides), ("taken", given)):
        stage("finetune", [*read, "loss=kld", f"inputs.cache={tmp_path}/{name}", f"out={tmp_path}/drafter-{name}"])
    own, taken = (curve(tmp_path / f"drafter-{name}") for name in ("own", "taken"))
    assert len(own) == len(taken) > 2
    for one, other in zip(own, taken, strict=True):
        measured = [name for name in one if name.startswith(("train/loss", "val/"))]
        # The states differ in their last bits, and six steps of training enlarge that a little.
        assert {name: other[name] for name in measured} == pytest.approx(
            {name: one[name] for name in measured}, rel=1e-3
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("respond.engine=vllm", r"respond.states=bfloat16 needs respond.engine=transformers, which is vllm"),
        ("respond.by=drafter", r"needs respond.by=target, which is drafter"),
        ("distillation=replay", r"needs respond.by=target, which is replay"),
        ("respond.states=int8", r"respond.states is int8, must be null or one of bfloat16, float16, float32"),
    ],
)
def test_what_cannot_keep_states_is_refused_before_anything_is_computed(change, message):
    with initialize_config_module("conf", version_base="1.3"):
        cfg = configured("respond", ["respond.states=bfloat16", *change.split()])
        with pytest.raises(ValueError, match=message):
            response_settings.check(cfg)


def test_a_target_that_caps_its_logits_is_refused_from_its_config(tmp_path):
    Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    ).save_pretrained(tmp_path)
    with initialize_config_module("conf", version_base="1.3"):
        cfg = configured("respond", ["respond.states=bfloat16", f"target.path={tmp_path}"])
        with pytest.raises(ValueError, match=r"respond.states: Gemma2ForCausalLM changes its logits"):
            response_settings.check(cfg)
