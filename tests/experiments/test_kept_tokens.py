"""Settings that the identity has only where they are used: what they choose, refuse and identify.

They are `kept_tokens`, `sampled_tokens`, `finetune.acceptance_rules` and `pretrain.distillation`.
"""

import json
import logging
import shutil

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from drafter.artifacts.manifest import read_manifest
from drafter.losses.trimmed import Kept, Trimmed
from drafter.models.loading import vocabulary_width
from drafter.models.trimming import read_kept, write_kept
from experiments.export import check_head
from experiments.finetune import check
from experiments.running.composing import concerning, first_key
from experiments.running.inputs import target_source
from experiments.running.jobs import Job
from experiments.running.keeping import check_kept, check_stages, choose_tokens, packed_text
from experiments.running.losses import build_loss
from experiments.running.teaching import check_teacher, teaching_settings
from experiments.running.training import training_settings
from tests.experiments.test_pipeline import stage


@pytest.fixture
def config():
    """Return a function that composes a stage's config, as its command line does."""
    before = HydraConfig.instance().cfg

    def compose_stage(name, *overrides):
        cfg = compose(name, ["scale=smoke", *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    with initialize_config_module("conf", version_base="1.3"):
        yield compose_stage
    HydraConfig.instance().cfg = before


def unread():
    raise AssertionError("the texts are not needed")
    yield


def test_the_most_frequent_tokens_and_the_ends_are_kept(config):
    cfg = config("pretrain", "pretrain.kept_tokens=4")
    texts = [np.array([9, 9, 9, 30, 30]), np.array([7, 7, 30, 12])]
    rows = vocabulary_width(target_source(cfg))
    kept = choose_tokens(cfg, "pretrain", None, texts).kept
    chosen = set(kept.ids_K.tolist())
    assert {9, 30} <= chosen
    assert len(chosen) == 4
    assert 12 not in chosen  # an end of text is kept although no text has it
    assert len(kept.place_V) == rows
    assert choose_tokens(config("pretrain"), "pretrain", None, unread()) == (None, None)


def test_a_trimmed_drafter_keeps_its_tokens(config, tmp_path):
    write_kept(tmp_path, [3, 5, 8])
    for override in ("finetune.kept_tokens=null", "finetune.kept_tokens=3"):
        cfg = config("finetune", override)
        assert check_kept(cfg, "finetune", str(tmp_path))
        assert choose_tokens(cfg, "finetune", str(tmp_path), unread()).kept.ids_K.tolist() == [3, 5, 8]
    with pytest.raises(ValueError, match=r"finetune.kept_tokens is 4, but .* is trimmed to 3 tokens, which it keeps"):
        check_kept(config("finetune", "finetune.kept_tokens=4"), "finetune", str(tmp_path))


def test_a_drafter_with_sampled_tokens_keeps_all(config):
    cfg = config("pretrain", "pretrain.kept_tokens=4", "pretrain.sampled_tokens=9", "seed=5")
    texts = [np.array([9, 9, 9, 30, 30])]
    kept = choose_tokens(config("pretrain", "pretrain.kept_tokens=4"), "pretrain", None, texts).kept
    chosen = choose_tokens(cfg, "pretrain", None, texts)
    assert check_kept(cfg, "pretrain", None)
    assert chosen.kept is None
    assert chosen.sampled.kept.ids_K.tolist() == kept.ids_K.tolist()
    assert (chosen.sampled.number, chosen.sampled.seed) == (9, 5)
    assert len(chosen.sampled.of_step(0).rows) == 13


def test_acceptance_rules_are_checked_first_and_identify_a_run_where_they_are_not_the_default(config):
    settings = [
        training_settings(config("finetune", *overrides), "finetune")
        for overrides in ([], ["finetune.acceptance_rules=[ratio]"], ["finetune.acceptance_rules=[ratio,argmax]"])
    ]
    assert "acceptance_rules" not in settings[0]
    assert settings[1] == settings[0]
    assert settings[2] == {**settings[0], "acceptance_rules": ["ratio", "argmax"]}
    with pytest.raises(ValueError, match="the acceptance rule is 'typical', must be ratio, argmax or match"):
        check(config("finetune", "finetune.acceptance_rules=[typical]"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune.sampled_tokens=9"], r"sampled_tokens is 9, but finetune.kept_tokens is null: give the number"),
        (["finetune.sampled_tokens=0", "finetune.kept_tokens=96"], r"is 0, must be above 0 and at most 4000"),
        (["finetune.sampled_tokens=4001", "finetune.kept_tokens=96"], r"is 4001, must be above 0 and at most 4000"),
    ],
)
def test_a_number_of_sampled_tokens_that_cannot_be_drawn_is_refused(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        check_kept(config("finetune", *overrides), "finetune", None)
    check_kept(config("finetune", "finetune.sampled_tokens=4000", "finetune.kept_tokens=96"), "finetune", None)


def test_a_trimmed_drafter_is_not_trained_with_sampled_tokens(config, tmp_path):
    write_kept(tmp_path, [3, 5, 8])
    for number in ("null", "3"):
        cfg = config("finetune", f"finetune.kept_tokens={number}", "finetune.sampled_tokens=9")
        with pytest.raises(ValueError, match=r"sampled_tokens is 9, but .* is trimmed to 3 tokens, and the rows"):
            check_kept(cfg, "finetune", str(tmp_path))


def test_a_pipeline_that_would_trim_the_drafter_before_sampling_is_refused(config):
    pretraining = config("pretrain", "pretrain.kept_tokens=8")
    finetuning = config("finetune", "finetune.kept_tokens=9", "finetune.sampled_tokens=5")
    jobs = [Job("pretrain", pretraining, None), Job("finetune", finetuning, None)]
    with pytest.raises(ValueError, match=r"finetune.sampled_tokens is 5, but pretrain.kept_tokens is 8 and would trim"):
        check_stages(jobs)
    pretraining.pretrain.sampled_tokens = 4
    check_stages(jobs)
    pretraining.pretrain.sampled_tokens = None
    finetuning.inputs.drafter = "elsewhere"
    check_stages(jobs)


@pytest.mark.parametrize("number", [0, -1, 4096, 10**6])
def test_a_number_of_tokens_beyond_the_vocabulary_is_refused(config, number):
    with pytest.raises(ValueError, match=f"pretrain.kept_tokens is {number}, must be above 0 and below the 4096 rows"):
        check_kept(config("pretrain", f"pretrain.kept_tokens={number}"), "pretrain", None)


def test_a_long_text_is_counted_in_parts_of_equal_distance(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.running.keeping.COUNTED", 4000)
    np.save(tmp_path / "long.npy", np.arange(50_000, dtype=np.uint16))
    parts = np.concatenate(list(packed_text(tmp_path / "long.npy")))
    assert len(parts) == 4000
    assert parts[0] == 0
    assert parts[-1] == 49_999
    np.save(tmp_path / "short.npy", np.arange(1000, dtype=np.uint16))
    assert sorted(np.concatenate(list(packed_text(tmp_path / "short.npy")))) == list(range(1000))


def test_settings_that_are_not_used_leave_the_identity_as_it_was(config):
    plain = config("pretrain")
    settings = {**training_settings(plain, "pretrain"), **teaching_settings(plain)}
    assert not {"kept_tokens", "sampled_tokens", "distillation", "target_dtype"} & set(settings)
    assert not {"kept_tokens", "sampled_tokens"} & set(training_settings(config("finetune"), "finetune"))
    unused = config("pretrain", "loss@pretrain.distillation.loss=tvd", "pretrain.distillation.batch_tokens=512")
    assert {**training_settings(unused, "pretrain"), **teaching_settings(unused)} == settings
    used = config("pretrain", "pretrain.distillation.weight=0.5", "pretrain.kept_tokens=9")
    found = {**training_settings(used, "pretrain"), **teaching_settings(used)}
    assert found["kept_tokens"] == 9
    assert "sampled_tokens" not in found
    sampled = config("pretrain", "pretrain.kept_tokens=9", "pretrain.sampled_tokens=5")
    assert training_settings(sampled, "pretrain")["sampled_tokens"] == 5
    assert found["distillation"] == {"weight": 0.5, "loss": {"name": "kld", "temperature": 1.0, "top_p": 1.0}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretrain.distillation.weight=1.5"], r"pretrain.distillation.weight is 1.5, must be from 0 to 1"),
        (["pretrain.distillation.weight=0.5", "loss@pretrain.distillation.loss=block"], "one of a block of tokens"),
        (["pretrain.distillation.weight=0.5", "pretrain.distillation.loss.temperature=0"], "temperature is 0"),
        (["pretrain.distillation.weight=0.5", "target.parallel=tensor"], "target.parallel is 'tensor', but pretrain"),
    ],
)
def test_a_distillation_that_cannot_be_computed_is_refused(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        check_teacher(config("pretrain", *overrides), trimmed=False)


def test_the_function_of_the_distillation_is_chosen_by_its_config(config):
    change = "pretrain.distillation.loss._target_=drafter.losses.tvd"
    with pytest.raises(ValueError, match="write another config, conf/loss/<name>"):
        teaching_settings(config("pretrain", "pretrain.distillation.weight=0.5", change))


def test_the_pipeline_gives_the_loss_of_pretraining_to_pretraining(config):
    assert first_key("loss@pretrain.distillation.loss=tvd") == "pretrain"
    assert concerning("pretrain", ["loss@pretrain.distillation.loss=tvd"])
    assert not concerning("finetune", ["loss@pretrain.distillation.loss=tvd"])


def test_a_loss_that_does_not_know_trimmed_drafters_is_refused():
    build_loss({"_target_": "tests.experiments.test_kept_tokens.own", "_partial_": True})
    with pytest.raises(ValueError, match="cannot be computed for a trimmed drafter"):
        build_loss({"_target_": "tests.experiments.test_kept_tokens.own", "_partial_": True}, trimmed=True)
    knows_trimmed = {"_target_": "tests.experiments.test_kept_tokens.own_of_kept", "_partial_": True}
    build_loss(knows_trimmed, trimmed=True)
    with pytest.raises(ValueError, match="or give kept_tokens=null"):
        build_loss(knows_trimmed, trimmed=True, sampled=True)


def own(logits_p, logits_q):
    return (logits_p.softmax(-1) - logits_q.softmax(-1)).abs().sum(-1)


def own_of_kept(logits_p, logits_q):
    if isinstance(logits_q, Trimmed):
        logits_q = logits_q.full()[:, logits_q.kept.ids_K]
    return own(logits_p, logits_q)


def test_a_drafter_that_was_trained_trimmed_is_not_exported(tmp_path):
    write_kept(tmp_path, [1, 2])
    for made_by in ("pretrain", "finetune"):
        with pytest.raises(ValueError, match="was trained to propose 2 tokens alone"):
            check_head(str(tmp_path), made_by)
    check_head(str(tmp_path), "trim")
    (tmp_path / "steps" / "kld-step5").mkdir(parents=True)
    write_kept(tmp_path / "steps" / "kld-step5", [1])
    with pytest.raises(ValueError, match="was trained to propose 1 tokens alone"):
        check_head(str(tmp_path / "steps" / "kld-step5"), None)


def test_a_sparse_cache_for_a_trimmed_drafter_is_refused_before_the_first_stage(config):
    def jobs(*overrides):
        names = ("pretrain", "cache", "finetune")
        return [Job(name, config(name, *concerning(name, list(overrides))), None) for name in names]

    for setting in ("pretrain.kept_tokens=9", "finetune.kept_tokens=9"):
        with pytest.raises(ValueError, match=f"{setting.replace('=', ' is ')}, and a sparse cache has no distribution"):
            check_stages(jobs(setting, "cache=sparse"))
        check_stages(jobs(setting))
        check_stages(jobs(setting, "cache=sparse", "inputs.cache=null"))
    check_stages(jobs("cache=sparse"))


@pytest.mark.end_to_end
def test_a_drafter_is_pretrained_and_finetuned_trimmed_and_evaluated(world, tmp_path, caplog):
    overrides, root = world
    for name in ("data", "responses", "cache"):
        shutil.copytree(root / name, tmp_path / name)
    here = [*overrides, f"root={tmp_path}"]
    text = ["pretrain.kept_tokens=12", "pretrain.distillation.weight=0.5"]
    stage("pretrain", [*here, *text, f"out={tmp_path}/by_text"])
    stage("pretrain", [*here, *text, f"inputs.responses={tmp_path}/responses", f"out={tmp_path}/drafter"])
    pretrained = read_manifest(tmp_path / "drafter", "pretrain")
    assert set(pretrained["inputs"]) >= {"target", "responses", "data"}
    assert 0 < pretrained["counts"]["val/acceptance_rate"] < pretrained["counts"]["val/kept_mass"] < 1
    assert "val/loss" not in pretrained["counts"]
    ids = read_kept(tmp_path / "drafter")
    assert len(ids) == 12
    assert len(read_kept(tmp_path / "by_text")) == 12
    sparse = [*here, "loss=kld", "seed=1"]
    stage("finetune", [*sparse, "name=own", "finetune.keep_every=3", "finetune.validate_every=3"])
    made = tmp_path / "finetune" / "own"
    assert read_kept(made) == ids
    assert [read_kept(path) for path in (made / "steps").iterdir()] == [ids]
    counts = read_manifest(made, "finetune")["counts"]
    assert "val/kld" not in counts
    # From a whole drafter, the list comes from the responses.
    whole = [f"inputs.drafter={root}/drafter", "name=chosen", "finetune.kept_tokens=12"]
    stage("finetune", [*sparse, *whole])
    assert read_kept(tmp_path / "finetune" / "chosen") == ids
    # With others sampled in each step, the drafter proposes all tokens.
    sampling = [*whole, "name=sampled", "finetune.sampled_tokens=10", "finetune.keep_every=3"]
    sampling.append("finetune.acceptance_rules=[ratio,argmax]")
    stage("finetune", [*sparse, *sampling, "finetune.validate_every=3"])
    sampled = tmp_path / "finetune" / "sampled"
    for path in (sampled, *(sampled / "steps").iterdir()):
        assert read_kept(path) is None
        check_head(str(path), "finetune")
    manifest = read_manifest(sampled, "finetune")
    assert manifest["settings"]["sampled_tokens"] == 10
    assert manifest["counts"]["val/kld"] > 0
    assert manifest["counts"]["val/block_efficiency_sampled_argmax"] >= 1
    stage("evaluate", [*here, f"drafters=[{made},{sampled}]", f"out={tmp_path}/evaluate"])
    for name in ("own", "sampled"):
        evaluated = read_manifest(tmp_path / "evaluate" / name, "evaluate")["counts"]
        assert evaluated["greedy_outputs_unlike_the_target"] == 0
    with caplog.at_level(logging.INFO):
        stage("finetune", [*sparse, "name=own", "finetune.keep_every=3", "finetune.validate_every=3"])
    assert "is up to date" in caplog.text
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    manifest["inputs"]["responses"] = "others"
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="responses others"):
        stage("finetune", [*sparse, *whole, "name=wrong"])


def test_kept_ids_are_sorted_and_unique():
    assert Kept.from_ids([5, 1, 5], 6).ids_K.tolist() == [1, 5]
