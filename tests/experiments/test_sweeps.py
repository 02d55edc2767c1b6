"""Tests of sweeps over any key: each cell has a directory named by its swept values, and finished cells are skipped."""

import json
import sys

import pytest
import wandb
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from experiments import finetune
from experiments.running import recording
from experiments.running.composing import as_name, configured, override, swept_keys
from tests.experiments.test_pipeline import snapshot

VALUES = [
    "plain",
    "it's",
    "a\\b",
    "back\\",
    "quote\\'",
    'say "so"',
    "[1]",
    "a=b,c:d",
    "ü ~ {x}",
    "",
    " spaced ",
    "null",
    "7",
]


@pytest.fixture
def hydra_session():
    with initialize_config_module("conf", version_base="1.3"):
        yield


@pytest.mark.parametrize("value", [*VALUES, 3, 0.25, True, None, [1, "a b"], {"x": [True, "it's"]}])
def test_an_override_made_in_code_has_its_value_after_parsing(hydra_session, value):
    assert OmegaConf.to_object(compose("curves", [override("only", [value])]))["only"] == [value]


def test_swept_keys_are_those_with_several_values_and_the_last_override_counts():
    assert swept_keys(["loss=kld,tvd", "seed=1,2", "+x.y=range(3)", "seed=1", "finetune.max_steps=3"]) == [
        "loss",
        "x.y",
    ]
    assert swept_keys(["weighting=uniform", "finetune.kinds=[a,b]"]) == []


@pytest.mark.parametrize(
    ("stage", "overrides", "out"),
    [
        ("finetune", ["loss=kld", "loss.temperature=0.3"], "finetune/kld-temperature_0.3-seed0"),
        ("finetune", ["weighting=dpace", "seed=2"], "finetune/kld-weighting_dpace-seed2"),
        ("finetune", ["variant=text_0", "loss=tvd"], "variants/tvd-text_0-seed0"),
        ("finetune", ["finetune.kinds=[a,b]"], f"finetune/kld-kinds_{as_name(['a', 'b'])}-seed0"),
        (
            "finetune",
            ["loss.temperature=2.0", "+x.temperature=1"],
            "finetune/kld-loss.temperature_2.0-x.temperature_1-seed0",
        ),
        ("pretrain", ["drafter.hidden_size=64", "seed=3"], "drafter-hidden_size_64-seed_3"),
        ("respond", ["distillation=greedy", "respond.top_p=0.5"], "responses-greedy-top_p_0.5"),
        ("cache", ["cache=sparse"], "cache-cache_sparse"),
        ("evaluate", ["+evaluate.sampling.temperature=1.0"], "evaluate-temperature_1.0"),
        ("prepare", ["data=docstrings_smoke", "scale=tiny"], "data-data_docstrings_smoke"),
    ],
)
def test_a_cell_is_named_by_its_swept_values(hydra_session, stage, overrides, out):
    keys = ",".join(sorted(one.partition("=")[0].lstrip("+") for one in overrides))
    assert configured(stage, [*overrides, f"swept=[{keys}]"]).out == f"runs/tiny/{out}"


def test_different_values_have_different_names():
    values = ["a/b", "a b", "a_b", "a" * 60, "a" * 61, ["x"], "x", "ü", 0.1, 1e-4]
    names = [as_name(value) for value in values]
    assert len(set(names)) == len(values)
    assert all("/" not in name and " " not in name and len(name) <= 47 for name in names)


@pytest.fixture
def sweep(world, tmp_path, monkeypatch):
    """Return a function that runs a sweep like the command line and returns the manifests of its cells by name."""
    overrides, _ = world

    def run(*params, logger="csv"):
        kept = [part for part in overrides if part != "logger=csv"]
        fixed = [f"logger={logger}", f"out={tmp_path}/out/${{name}}", "finetune.max_steps=1"]
        monkeypatch.setattr(sys, "argv", ["finetune", "-m", *kept, *fixed, f"hydra.sweep.dir={tmp_path}", *params])
        finetune.main()
        found = sorted((tmp_path / "out").glob("*/manifest.json"))
        return {path.parent.name: json.loads(path.read_text()) for path in found}

    return run


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (["loss.temperature=0.3,1.0"], ["temperature_0.3-", "temperature_1.0-"]),
        (["loss.top_p=0.9,1.0"], ["top_p_0.9-", "top_p_1.0-"]),
        (["finetune.learning_rate=1e-3,2e-3"], ["learning_rate_0.001-", "learning_rate_0.002-"]),
        (["finetune.text_share=0.0,0.2"], ["text_share_0.0-", "text_share_0.2-"]),
        (["weighting=uniform,dpace"], ["weighting_dpace-", "weighting_uniform-"]),
        (["weighting=dpace", "weighting.smoothing=0.4,0.6"], ["smoothing_0.4-", "smoothing_0.6-"]),
        (["trainer.gradient_clip_val=0.5,1.0"], ["gradient_clip_val_0.5-", "gradient_clip_val_1.0-"]),
        (["trainer.precision=32-true,bf16-true"], ["precision_32-true-", "precision_bf16-true-"]),
        (["seed=0,1"], ["", ""]),
    ],
    ids=lambda value: value[-1] if "=" in value[0] else "",
)
def test_a_sweep_over_any_key_has_one_directory_per_cell(sweep, params, names):
    found = sweep(*params)
    seeds = (0, 1) if params == ["seed=0,1"] else (0, 0)
    assert list(found) == [f"kld-{name}seed{seed}" for name, seed in zip(names, seeds, strict=True)]
    one, two = ({**manifest["settings"], "series": "", "swept": None} for manifest in found.values())
    assert one != two  # the swept values are part of a cell's identity


@pytest.mark.end_to_end
def test_a_sweep_over_two_keys_has_a_directory_and_a_wandb_run_per_cell_and_repeats_none(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs, settings = [], recording.run_settings

    def noted(*how):
        runs.append({**settings(*how), "dir": str(tmp_path)})
        return dict(runs[-1])

    monkeypatch.setattr("experiments.running.training.run_settings", noted)
    params = "loss.temperature=0.5,1.0", "seed=1,2"
    found = sweep(*params, logger="wandb")
    names = {f"kld-temperature_{temperature}-seed{seed}" for temperature in (0.5, 1.0) for seed in (1, 2)}
    assert set(found) == {run["name"] for run in runs} == names
    assert {run["group"] for run in runs} == {"kld-temperature_0.5", "kld-temperature_1.0"}  # one line each
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 4
    before = snapshot(tmp_path / "out")
    assert sweep(*params, logger="wandb") == found
    assert snapshot(tmp_path / "out") == before
    assert len(runs) == 4
    wandb.finish()
