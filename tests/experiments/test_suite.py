"""The sweeps of conf/experiment, run by the pipeline and as Hydra multiruns, some with a cell that fails.

tests/experiments/test_plan.py has the fast tests of which cells a sweep has.
"""

import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafter.artifacts.manifest import read_jsonl, read_manifest
from drafter.artifacts.rows import Rows
from experiments.pipeline import main

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def suite(world, tmp_path_factory):
    """Run all cells of two losses and of experiment=data with one seed, in a copy of a finished run's root."""
    overrides, finished = world
    root = tmp_path_factory.mktemp("suite") / "run"
    shutil.copytree(finished, root)
    command = [
        *overrides,
        f"root={root}",
        "losses=[kld,tvdpp]",
        "seeds=[1]",
        "experiments=[data]",
        "along.losses=[kld]",
    ]
    main(command)
    return command, root


def test_every_variant_is_trained_and_evaluated_once(suite):
    _, root = suite
    variants = (
        "responses_10",
        "responses_33",
        "text_0",
        "text_50",
        "greedy",
        "reference",
        "drafter",
        "mixture",
        "replay",
    )
    names = {f"tvdpp-{name}-seed1" for name in variants}
    for folder in ("variants", "evaluate_variants"):
        assert {path.parent.name for path in (root / folder).glob("*/manifest.json")} == names
    for name in names:
        rows = read_jsonl(root / "evaluate_variants" / name / "counts.jsonl")
        assert {row["gamma"] for row in rows} == {3}
        counts = read_manifest(root / "evaluate_variants" / name, "evaluate")["counts"]
        assert (f"{counts['series']}-seed{counts['seed']}", counts["loss"]) == (name, "tvdpp")
        assert counts["variant"] in variants
    base = AutoModelForCausalLM.from_pretrained(root / "finetune" / "tvdpp-seed1").state_dict()
    for name in names:
        found = AutoModelForCausalLM.from_pretrained(root / "variants" / name).state_dict()
        assert any(not torch.equal(found[key], base[key]) for key in base), name


def test_each_distillation_set_has_the_splits_temperatures_and_lengths_of_its_config(suite):
    _, root = suite
    assert set(Rows(root / "responses-greedy", "respond").splits) == {"train"}
    assert {row["temperature"] for row in Rows(root / "responses-greedy", "respond")} == {0}
    target, reference = Rows(root / "responses", "respond"), Rows(root / "responses-reference", "respond")
    assert set(target.splits) == {"train", "validation"}
    assert all(3 <= len(row["response_ids"]) <= 8 for row in reference)
    assert not any(row["truncated"] for row in reference if len(row["response_ids"]) < 8)
    assert not (root / "responses-drafter").exists()  # each finetuning writes its own


def test_the_responses_of_each_round_are_written_by_the_drafter_of_the_round_before(suite):
    _, root = suite
    for name in ("tvdpp-drafter-seed1", "tvdpp-mixture-seed1", "tvdpp-replay-seed1"):
        rounds, drafters = root / "rounds" / name, []
        for number in (1, 2, 3):
            responses = read_manifest(rounds / str(number) / "responses", "respond")
            trained = rounds / str(number) / "drafter" if number < 3 else root / "variants" / name
            found = read_manifest(trained, "finetune")
            assert responses["inputs"]["drafter"] == found["inputs"]["drafter"]
            assert found["settings"]["max_steps"] == 2
            drafters.append(responses["inputs"]["drafter"])
        assert len(set(drafters)) == 3


def test_the_kept_steps_are_evaluated(suite):
    _, root = suite
    (kept,) = (root / "finetune" / "kld-seed1" / "steps").iterdir()
    assert kept.name == "kld-seed1-step5"
    found = read_manifest(root / "evaluate_steps" / kept.name, "evaluate")["counts"]
    assert (found["series"], found["loss"], found["seed"], found["step"]) == ("kld", "kld", 1, 5)


@pytest.mark.parametrize(
    ("made", "stage", "content"),
    [
        ("variants/tvdpp-drafter-seed1", "finetune", "model.safetensors"),
        ("evaluate_variants/tvdpp-greedy-seed1", "evaluate", "samples.jsonl"),
    ],
)
def test_the_command_in_a_manifest_makes_its_run_again(suite, tmp_path, made, stage, content):
    _, root = suite
    before = read_manifest(root / made, stage)
    assert before["config"]["root"] == str(root)
    assert before["environment"]["commit"]
    shutil.move(root / made, tmp_path / "away")
    command = shlex.split(before["command"])
    assert command[:2] == ["python", "-m"]
    environment = {
        **os.environ,
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }  # as in this process: see conftest.py
    try:
        subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, env=environment)
        after = read_manifest(root / made, stage)
    finally:
        shutil.rmtree(root / made, ignore_errors=True)
        shutil.move(tmp_path / "away", root / made)
    assert after["command"] == before["command"]
    assert after["files"][content] == before["files"][content]
    assert (after["settings"], after["inputs"]) == (before["settings"], before["inputs"])


def test_a_cell_that_fails_does_not_stop_the_others_and_is_named(suite, tmp_path):
    command, finished = suite
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    for name in ("kld-seed1", "tvdpp-seed1"):
        shutil.rmtree(root / "finetune" / name)
        shutil.rmtree(root / "evaluate" / name)
    (root / "finetune" / "kld-seed1").mkdir()
    (root / "finetune" / "kld-seed1" / "something.json").write_text("{}")
    with pytest.raises(
        RuntimeError, match=r"1 of the finetunings failed; everything else is done:\n  .*kld-seed1: .*has files but"
    ):
        main([*command[:-4], f"root={root}", "losses=[kld,tvdpp]", "seeds=[1]"])
    assert (root / "evaluate" / "tvdpp-seed1" / "manifest.json").exists()
    assert (root / "finetune" / "kld-seed1" / "something.json").read_text() == "{}"


def test_a_multirun_names_its_failed_cell_and_finishes_the_rest(suite, tmp_path):
    command, _ = suite
    overrides = [
        part for part in command if part.split("=")[0] not in ("losses", "seeds", "experiments", "along.losses")
    ]
    folder = tmp_path / "out"
    (folder / "tvd-seed1").mkdir(parents=True)
    (folder / "tvd-seed1" / "something.json").write_text("{}")
    sweep = [
        sys.executable,
        "-m",
        "experiments.finetune",
        "-m",
        "loss=kld,tvd,nla",
        "seed=1",
        f"out={folder}/${{name}}",
    ]
    concerned = [part for part in overrides if part.split(".")[0] not in ("finetune",)]
    result = subprocess.run([*sweep, *concerned, "finetune.max_steps=2"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "1 cells of the sweep failed; all others are finished:" in result.stderr
    assert "loss=tvd seed=1" in result.stderr.split("all others are finished:")[1]
    assert {path.parent.name for path in folder.glob("*/manifest.json")} == {"kld-seed1", "nla-seed1"}


@pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="needs the extra joblib: pip install -e '.[joblib]'",
)
def test_joblib_runs_cells_side_by_side_and_names_the_one_that_failed(suite, tmp_path):
    command, _ = suite
    overrides = [
        part for part in command if part.split("=")[0] not in ("losses", "seeds", "experiments", "along.losses")
    ]
    (tmp_path / "tvd-seed1").mkdir()
    (tmp_path / "tvd-seed1" / "something.json").write_text("{}")
    sweep = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "loss=kld,tvd,nla", "seed=1"]
    where = [f"out={tmp_path}/${{name}}", "finetune.max_steps=2"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.finetune", *sweep, *overrides, *where], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "loss=tvd seed=1" in done.stderr.split("1 cells of the sweep failed")[1]
    assert {path.parent.name for path in tmp_path.glob("*/manifest.json")} == {"kld-seed1", "nla-seed1"}
