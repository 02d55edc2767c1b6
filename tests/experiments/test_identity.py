"""What makes a finished directory another one: all that changes its result, and nothing else."""

import json
import logging
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafter.artifacts.manifest import ArtifactError
from tests.experiments.test_pipeline import snapshot, stage

TRAINED = ["loss=kld", "seed=1"]


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("respond", ["target.dtype=bfloat16"], "settings.target_dtype: there 'float32', asked for 'bfloat16'"),
        ("respond", ["+respond.vllm.quantization=fp8"], "settings.vllm"),
        ("cache", ["target.dtype=bfloat16"], "settings.target_dtype"),
        ("cache", ["cache.shard_size=7"], "settings.shard_size"),
        ("pretrain", ["trainer.gradient_clip_val=0.5"], "settings.trainer: there .*1.0.*, asked for .*0.5"),
        ("finetune", [*TRAINED, "trainer.gradient_clip_val=0.5"], "settings.trainer"),
        ("finetune", [*TRAINED, "trainer.accumulate_grad_batches=4"], "settings.trainer"),
        ("finetune", [*TRAINED, "trainer.precision=bf16-true"], "settings.trainer"),
        ("finetune", [*TRAINED, "+trainer.limit_train_batches=3"], "settings.trainer"),
        ("finetune", [*TRAINED, "target.dtype=bfloat16"], "settings.target_dtype"),
        ("evaluate", ["target.dtype=bfloat16"], "settings.target_dtype"),
        ("evaluate", ["task.prompts.max_new_tokens=7"], "settings.tasks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_changes_a_result_is_refused_in_a_finished_directory(world, name, change, told):
    overrides, root = world
    before = snapshot(root)
    with pytest.raises(ArtifactError, match=f"was made differently .*{told}"):
        stage(name, [*overrides, *change])
    assert snapshot(root) == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("respond", ["respond.batch_tokens=128"]),
        ("respond", ["+respond.vllm.gpu_memory_utilization=0.5", "+respond.vllm.max_num_seqs=8"]),
        ("cache", ["cache.batch_tokens=128"]),
        ("pretrain", ["pretrain.num_workers=1", "trainer.accelerator=cpu"]),
        ("finetune", [*TRAINED, "finetune.num_workers=1", "finetune.gradient_checkpointing=true"]),
        ("finetune", [*TRAINED, "trainer.enable_model_summary=true", "trainer.devices=1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_leaves_a_result_as_it_is_leaves_a_finished_directory_up_to_date(world, name, change, caplog):
    overrides, root = world
    before = snapshot(root)
    with caplog.at_level(logging.INFO):
        stage(name, [*overrides, *change])
    assert "is up to date" in caplog.text
    assert snapshot(root) == before


def test_an_interrupted_run_goes_on_with_smaller_batches_where_memory_ran_out(world, tmp_path):
    overrides, _ = world
    command = [*overrides, f"out={tmp_path}/out"]
    stage("respond", command)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.arrow")}
    (tmp_path / "out" / "manifest.json").rename(tmp_path / "out" / "manifest.away")
    identity = json.loads((tmp_path / "out" / "manifest.away").read_text())
    (tmp_path / "out" / "manifest.away").unlink()
    (tmp_path / "out" / "started.json").write_text(
        json.dumps({part: identity[part] for part in ("stage", "settings", "inputs")})
    )
    (tmp_path / "out" / "00001.arrow").unlink()
    stage("respond", [*command, "respond.batch_tokens=64"])
    again = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.arrow")}
    assert again.keys() == whole.keys()
    assert {name for name in whole if again[name] != whole[name]} <= {"00001.arrow"}


def test_new_weights_in_the_same_directory_are_noticed_whatever_their_format(world, tmp_path):
    overrides, root = world
    shutil.copytree(root.parent / "target", tmp_path / "target")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "target" / "pytorch_model.bin")
    command = [*overrides, f"target.path={tmp_path}/target", f"out={tmp_path}/out"]
    stage("respond", command)
    model.transformer.wte.weight.data.mul_(1.5)
    torch.save(model.state_dict(), tmp_path / "target" / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"was made differently \(inputs.target"):
        stage("respond", command)


def test_a_judging_set_of_another_target_is_refused(world, tmp_path):
    overrides, root = world
    shutil.copytree(root / "cache", tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    manifest["inputs"]["target"] = "another"
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=f"{tmp_path}/cache was made with the target another"):
        stage("finetune", [*overrides, f"inputs.validation={tmp_path}/cache", f"out={tmp_path}/out"])


def test_rounds_of_on_policy_training_keep_the_settings_of_their_distillation(world, tmp_path):
    overrides, root = world
    how = ["distillation=drafter", "distillation.temperatures=[0.5]", "distillation.rounds=2", "name=own"]
    inputs = [f"inputs.{part}={root}/{part}" for part in ("data", "drafter")]
    judge = [f"distillation.validation={root}/cache", f"root={tmp_path}", "finetune.max_steps=2"]
    stage("finetune", [*overrides, *how, *inputs, *judge])
    for number in (1, 2):
        written = json.loads((tmp_path / "rounds" / "own" / str(number) / "responses" / "manifest.json").read_text())
        assert written["settings"]["temperatures"] == [0.5]
        assert written["settings"]["by"] == "drafter"
    assert not (tmp_path / "rounds" / "own" / "3").exists()
