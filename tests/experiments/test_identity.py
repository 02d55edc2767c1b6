"""Tests of a run's identity: it contains every setting that changes the result, and nothing else."""

import json
import logging
import shutil

import pytest
import torch
from hydra import initialize_config_module
from transformers import AutoModelForCausalLM

from drafter.artifacts.manifest import ArtifactError, read_manifest
from drafter.artifacts.rows import Rows
from experiments.reporting.identity import DrafterIdentity, identity_of
from experiments.reporting.results import read_curves, read_evaluations
from experiments.running.composing import configured
from experiments.running.identity import finetuned_identity, values
from tests.experiments.test_pipeline import snapshot, stage
from tests.experiments.test_tables import evaluation

TRAINED = ["loss=kld", "seed=1"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("respond", ["target.dtype=bfloat16"], "settings.target_dtype: found 'float32', requested 'bfloat16'"),
        ("respond", ["+respond.vllm.quantization=fp8"], "settings.vllm"),
        ("cache", ["target.dtype=bfloat16"], "settings.target_dtype"),
        ("cache", ["cache.shard_size=7"], "settings.shard_size"),
        ("pretrain", ["trainer.gradient_clip_val=0.5"], "settings.trainer: found .*1.0.*, requested .*0.5"),
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
def test_a_setting_that_changes_a_result_is_refused_in_a_finished_directory(world, name, change, message):
    overrides, root = world
    before = snapshot(root)
    with pytest.raises(ArtifactError, match=f"was made differently .*{message}"):
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
def test_a_setting_that_does_not_change_a_result_keeps_a_finished_directory_up_to_date(world, name, change, caplog):
    overrides, root = world
    before = snapshot(root)
    with caplog.at_level(logging.INFO):
        stage(name, [*overrides, *change])
    assert "is up to date" in caplog.text
    assert snapshot(root) == before


def test_an_interrupted_run_can_continue_with_smaller_batches(world, tmp_path):
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


def test_new_weights_in_the_same_directory_are_noticed_in_any_format(world, tmp_path):
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


def test_a_validation_set_of_another_target_is_refused(world, tmp_path):
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


def test_no_identity_contains_a_python_path(world):
    _, root = world
    manifests = [json.loads(path.read_text()) for path in root.rglob("manifest.json")]
    assert {manifest["stage"] for manifest in manifests} >= {"prepare", "pretrain", "respond", "cache", "finetune"}
    for manifest in manifests:
        identity = json.dumps({part: manifest[part] for part in ("settings", "inputs", "counts")})
        for path in ("_target_", "_partial_", "drafter.", "experiments."):
            assert path not in identity, manifest["stage"]


def test_manifests_carry_the_names_of_the_chosen_configs_and_their_values(world):
    _, root = world
    made = json.loads((root / "finetune" / "tvdpp-seed1" / "manifest.json").read_text())["settings"]
    fields = {"series": "tvdpp", "loss": "tvdpp", "variant": None, "weighting": "uniform", "kinds": None}
    fields |= {"swept": None, "seed": 1, "step": None}
    assert {name: made[name] for name in DrafterIdentity._fields} == fields
    assert made["loss_settings"] == {
        "name": "tvdpp", "temperature": 1.0, "top_p": 1.0, "statistics": "batch", "estimator": "exact", "num_samples": 8
    }  # fmt: skip
    assert made["weighting_settings"] == {"name": "uniform"}
    cached = json.loads((root / "cache" / "manifest.json").read_text())["settings"]
    assert cached["format"] == {"name": "exact", "kind": "exact", "dtype": "bfloat16"}
    evaluated = json.loads((root / "evaluate" / "tvdpp-seed1" / "manifest.json").read_text())["counts"]
    assert {name: evaluated[name] for name in DrafterIdentity._fields} == fields
    pretrained = json.loads((root / "evaluate" / "drafter" / "manifest.json").read_text())["counts"]
    assert (pretrained["series"], pretrained["loss"], pretrained["seed"]) == ("pretrained", None, 0)


def test_the_parts_of_a_loss_are_identified_by_name_and_not_by_module():
    def mix(module):
        parts = [{"_target_": f"{module}.{name}", "_partial_": True, "temperature": 0.5} for name in ("kld", "nla")]
        return {"weights": [0.5, 0.5], "parts": parts}

    assert values(mix("drafter.losses")) == values(mix("moved.elsewhere"))
    assert values(mix("drafter.losses"))["parts"][0] == {"name": "kld", "temperature": 0.5}


def test_an_override_of_the_function_of_a_loss_is_refused(world, tmp_path):
    overrides, _ = world
    with pytest.raises(ValueError, match=r"loss._target_=drafter.losses.tvd: write another config"):
        stage("finetune", [*overrides, *TRAINED, "loss._target_=drafter.losses.tvd", f"out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def older(manifest):
    """Return the manifest in the form of an earlier version, with Python paths among its settings."""
    fields = {*DrafterIdentity._fields, "loss_settings", "weighting_settings"} - {"kinds"}
    settings = {name: value for name, value in manifest["settings"].items() if name not in fields}
    settings |= {"loss": {"_target_": "drafter.losses.kld", "_partial_": True}, "name": "kld-seed1", "seed": 1}
    return {**manifest, "settings": settings}


def test_every_reader_refuses_a_finetuning_of_an_earlier_version_in_one_sentence(world, tmp_path):
    overrides, root = world
    folder = tmp_path / "run" / "finetune" / "kld-seed1"
    shutil.copytree(root / "finetune" / "kld-seed1", folder)
    manifest = older(json.loads((folder / "manifest.json").read_text()))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before, message = (
        snapshot(tmp_path),
        "kld-seed1 was made by an earlier version .*: remove it to make it again, or give",
    )
    with pytest.raises(ArtifactError, match=message):
        stage("finetune", [*overrides, *TRAINED, f"out={folder}"])
    with pytest.raises(ArtifactError, match=message):
        stage("evaluate", [*overrides, f"drafters=[{folder}]", f"out={tmp_path}/evaluate"])
    with pytest.raises(ArtifactError, match=message):
        read_curves(folder.parent)
    with pytest.raises(ArtifactError, match=message):
        stage("export", [f"export.drafter={folder}", f"out={tmp_path}/out", f"hydra.run.dir={tmp_path}/hydra"])
    assert snapshot(tmp_path) == before


def test_an_evaluation_and_a_kept_drafter_of_an_earlier_version_are_refused_too(world, tmp_path):
    _, root = world
    shutil.copytree(root / "evaluate" / "kld-seed1", tmp_path / "evaluate" / "kld-seed1")
    path = tmp_path / "evaluate" / "kld-seed1" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("series", "variant", "weighting", "kinds", "swept"):
        del manifest["counts"][name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"kld-seed1 was made by an earlier version .*lacks series, variant"):
        read_evaluations(tmp_path / "evaluate")
    (tmp_path / "kld-seed1" / "steps" / "kld-seed1-step5").mkdir(parents=True)
    (tmp_path / "kld-seed1" / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"step5 was made by an earlier version .*has no identity.json"):
        identity_of(str(tmp_path / "kld-seed1" / "steps" / "kld-seed1-step5"))


def test_a_drafter_from_elsewhere_has_the_name_of_its_directory(tmp_path):
    for name in ("tvdpp-seed1", "kld-seed2-step50", "tvdpp-only_summary-seed3"):
        (tmp_path / name).mkdir()
        assert identity_of(str(tmp_path / name)) == DrafterIdentity(name)
    assert identity_of("org/kld-seed1") == DrafterIdentity("kld-seed1")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "manifest.json").write_text('{"stage": "export", "settings": {}}')
    assert identity_of(str(tmp_path / "exported")) == DrafterIdentity("exported")


def test_a_renamed_directory_is_the_same_drafter(world, tmp_path):
    _, root = world
    shutil.copytree(root / "finetune" / "kld-seed1", tmp_path / "tvd-seed7-step3")
    assert identity_of(str(tmp_path / "tvd-seed7-step3")) == identity_of(str(root / "finetune" / "kld-seed1"))


@pytest.mark.parametrize(
    ("overrides", "name", "series"),
    [
        (["loss=kld", "seed=2"], "kld-seed2", "kld"),
        (["series=live", "seed=2"], "live-seed2", "live"),
        (["name=mine-seed2", "seed=1"], "mine-seed2", "mine-seed2"),  # a name is not parsed
        (["loss=tvd", "variant=only_summary", "seed=3"], "tvd-only_summary-seed3", "tvd-only_summary"),
    ],
)
def test_the_seeds_of_a_series_share_it_and_a_named_run_is_its_own_series(overrides, name, series):
    with initialize_config_module("conf", version_base="1.3"):
        cfg = configured("finetune", overrides)
        assert (cfg.name, finetuned_identity(cfg).series) == (name, series)


def test_a_drafter_from_elsewhere_is_not_a_seed_of_the_series_with_its_name(tmp_path):
    evaluation(tmp_path, "kld-seed1", "kld", 1)
    evaluation(tmp_path, "kld", "kld", None, fields={"loss": None})
    found = [(one.series, one.drafter.seed) for one in read_evaluations(tmp_path / "evaluate")]
    assert found == [("kld", 1), ("kld (kld)", None)]


def test_replays_are_written_beside_the_targets_responses_by_the_drafter_given(world, tmp_path):
    overrides, root = world
    how = [*overrides, "distillation=replay", f"out={tmp_path}/replays"]
    stage("respond", how)
    written, text = Rows(tmp_path / "replays", "respond"), Rows(root / "responses", "respond")
    counts = read_manifest(tmp_path / "replays", "respond")["counts"]
    assert counts["responses"] == (text.splits == "train").sum()
    assert 0 < counts["replays"] == len(written) - counts["responses"]
    assert counts["replays"] + counts["without_rejection"] == counts["responses"]
    assert set(written.splits) == {"train"}
    for change in ("distillation.replay.per_response=2", f"inputs.drafter={root}/finetune/kld-seed1", "seed=1"):
        with pytest.raises(ArtifactError, match="was made differently"):
            stage("respond", [*how, change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distillation.replay.per_response=0", r"respond.replay is .*'per_response': 0.*at least 1 of each"),
        ("inputs.responses=null", "needs the target's responses: give distillation=replay"),
        ("inputs.responses=references", "has responses by 'reference': respond.by=replay needs the target's own"),
    ],
)
def test_replays_of_what_the_target_has_not_written_are_refused(world, tmp_path, monkeypatch, change, message):
    overrides, root = world
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "responses", "references")
    manifest = json.loads((tmp_path / "references" / "manifest.json").read_text())
    manifest["settings"]["by"] = "reference"
    (tmp_path / "references" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        stage("respond", [*overrides, "distillation=replay", f"out={tmp_path}/replays", change])
    assert not (tmp_path / "replays").exists()
