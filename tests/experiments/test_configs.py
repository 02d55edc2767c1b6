"""Tests of the configs: every config composes and resolves, and unknown keys and options are refused."""

import re
from pathlib import Path

import hydra
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf, open_dict

import experiments.running.composing  # noqa: F401  (it registers the resolvers of the configs)
from drafter.training.optimizers import Together
from experiments.running.training import optimization
from tests.conftest import small_model
from tests.objectives import at_positions

CONF = Path(__file__).parents[2] / "conf"
STAGES = ("prepare", "pretrain", "respond", "cache", "finetune", "evaluate", "gamma", "compare", "tables", "curves")
SCALES = sorted(path.stem for path in (CONF / "scale").glob("*.yaml"))
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
LOSSES = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra_session():
    """Start Hydra on `conf`, as the pipeline does, and restore its global state afterwards."""
    before = HydraConfig.instance().cfg
    with initialize_config_module("conf", version_base="1.3"):
        yield
    HydraConfig.instance().cfg = before


def compose_config(name, *overrides):
    """Return a config without Hydra's section, which stays where ${hydra:...} looks for it."""
    cfg = compose(name, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def resolve(cfg):
    """Return all values, with interpolations resolved. Raise if a value cannot be resolved or is missing."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def stage_of(group, option):
    """Return the stage in the command of an option's header, or finetune, which has every group."""
    header = re.match(r"(?:#.*\n)*", (CONF / group / f"{option}.yaml").read_text()).group()
    named = [name for name in re.findall(r"experiments\.(\w+)", header) if name in (*STAGES, "plan", "measure")]
    return named[0] if named else "finetune"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_composes_and_resolves_at_every_scale(stage, scale):
    values = resolve(compose_config(stage, f"scale={scale}"))
    assert values["scale"]["name"] == scale
    assert values["root"] == f"runs/{scale}"
    assert values["out"].startswith(f"runs/{scale}/")
    assert stage in values or stage in ("tables", "curves")


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_every_option_of_every_group_composes(group, option):
    cfg = compose_config(stage_of(group, option), f"{group}={option}")
    assert HydraConfig.get().runtime.choices[group] == option
    missing = OmegaConf.missing_keys(cfg)
    assert not missing or option in ("files", "existing", "transplant", "own_words")  # their paths are the user's
    if not missing:
        resolve(cfg)


def test_only_paths_of_files_are_required_and_the_documented_command_gives_them():
    assert OmegaConf.missing_keys(compose_config("prepare", "data=files")) == {
        "data.pretraining.path",
        "data.instructions.questions.path",
    }
    command = ["data=files", "data.pretraining.path=text.jsonl", "data.instructions.questions.path=questions.jsonl"]
    data = resolve(compose_config("prepare", *command))["data"]
    assert data["pretraining"]["path"] == "text.jsonl"
    assert {name: source["path"] for name, source in data["instructions"].items()} == {"questions": "questions.jsonl"}


@pytest.mark.parametrize("name", ["pipeline", "tiny_target"])
def test_the_other_primary_configs_compose_and_resolve(name):
    assert resolve(compose_config(name))


def test_a_smoke_run_is_a_small_tiny_run():
    smoke, tiny = (resolve(compose_config("prepare", f"scale={scale}")) for scale in ("smoke", "tiny"))
    assert smoke["scale"].keys() == tiny["scale"].keys()
    assert smoke["target"] == tiny["target"]
    assert smoke["scale"]["num_responses"] < tiny["scale"]["num_responses"]
    assert set(smoke["data"]["packages"]) < set(tiny["data"]["packages"])


def test_every_scale_sets_the_same_values():
    keys = {scale: set(resolve(compose_config("prepare", f"scale={scale}"))["scale"]) for scale in SCALES}
    assert len({frozenset(names) for names in keys.values()}) == 1, keys


def test_the_papers_setting_composes_from_its_parts():
    cfg = compose_config("prepare", "target=llama2_7b_chat", "drafter=llama2_115m", "data=paper")
    values = resolve(cfg)
    assert values["target"]["path"] == "meta-llama/Llama-2-7b-chat-hf"
    assert values["drafter"]["hidden_size"] == 1024
    assert values["data"]["name"] == "paper"
    assert "packages" not in values["data"]


def test_the_papers_scale_chooses_the_papers_models_data_and_tasks():
    compose_config("pretrain", "scale=llama2")
    chosen = HydraConfig.get().runtime.choices
    assert {group: chosen[group] for group in ("target", "drafter", "data", "task")} == {
        "target": "llama2_7b_chat",
        "drafter": "llama2_115m",
        "data": "paper",
        "task": "paper",
    }


def test_a_group_on_the_command_line_overrides_the_choice_of_the_scale():
    compose_config("pretrain", "scale=llama2", "target=tiny")
    assert HydraConfig.get().runtime.choices["target"] == "tiny"


@pytest.mark.parametrize("stage", STAGES)
def test_data_that_the_target_writes_choose_its_tasks_unless_others_are_given(stage):
    for overrides, task in (
        (["data=self"], "self"),
        (["data=self", "scale=smoke"], "self"),
        (["data=self", "task=files"], "files"),
        (["data=self", "scale=llama2"], "paper"),
    ):
        compose_config(stage, *overrides)
        assert HydraConfig.get().runtime.choices["task"] == task


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_gives_one_value_per_position(loss):
    function = hydra.utils.instantiate(compose_config("finetune", f"loss={loss}").loss)
    generator = torch.Generator().manual_seed(0)
    logits_p_NV, logits_q_NV = (torch.randn(6, 11, generator=generator) for _ in range(2))
    logits_p_NV.requires_grad_()
    values_N = at_positions(function, 6, 11)(logits_p_NV, logits_q_NV)
    assert values_N.shape == (6,)
    assert values_N.isfinite().all()
    values_N.mean().backward()
    assert logits_p_NV.grad.isfinite().all()
    assert logits_p_NV.grad.abs().sum() > 0


def test_a_finetuning_is_named_after_its_loss_and_seed():
    for loss in LOSSES:
        values = resolve(compose_config("finetune", f"loss={loss}", "seed=3"))
        assert values["name"] == f"{loss}-seed3"
        assert values["out"] == f"runs/tiny/finetune/{loss}-seed3"


def test_moving_the_root_moves_every_input_and_output():
    for stage in STAGES:
        values = resolve(compose_config(stage, "root=elsewhere"))
        drafters = [name for name in values.get("drafters", []) if name != "ngram"]  # which has no directory
        paths = [values["out"], *values.get("inputs", {}).values(), *drafters]
        assert all(path.startswith("elsewhere/") for path in paths if path is not None), paths


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("pretrain", "pretrain.max_stepss=3"),
        ("finetune", "loss.temprature=2"),
        ("respond", "cache.dtype=float32"),
        ("prepare", "targt=tiny"),
    ],
)
def test_an_unknown_key_fails_and_is_named(stage, override):
    with pytest.raises(ConfigCompositionException) as refusal:
        compose(stage, [override])
    assert override.partition("=")[0] in str(refusal.value)


@pytest.mark.parametrize(("group", "options"), [("loss", LOSSES), ("scale", SCALES)])
def test_an_unknown_option_fails_with_the_list_of_options(group, options):
    with pytest.raises(hydra.errors.MissingConfigException) as refusal:
        compose("finetune", [f"{group}=no_such_option"])
    assert "no_such_option" in str(refusal.value)
    for option in options:
        assert re.search(rf"^\s*{option}$", str(refusal.value), re.MULTILINE)


def test_the_config_chooses_optimizer_and_schedule():
    cfg = compose_config("pretrain", "optimizer=muon", "schedule=wsd", "schedule.decay=0.5")
    how = optimization(cfg)
    assert isinstance(how.optimizer(small_model().requires_grad_(True), 1e-3), Together)
    assert how.schedule(75, 100) == 0.5


def test_muon_is_refused_where_matrices_are_sharded():
    cfg = compose_config("finetune", "optimizer=muon", "trainer=fsdp2")
    with pytest.raises(ValueError, match="optimizer=muon needs complete matrices"):
        optimization(cfg)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "base"))
def test_a_command_writes_no_log_into_the_working_directory(name):
    settings = compose(name, return_hydra_config=True).hydra
    folder = OmegaConf.to_container(settings, resolve=False)["run"]["dir"]
    assert folder != "." or "file" not in settings.job_logging.handlers
