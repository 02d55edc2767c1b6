"""Two ranks under torchrun, on CPU with gloo, have the results of one process."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from drafter.artifacts.manifest import read_jsonl

pytestmark = pytest.mark.end_to_end

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
STEPS = "finetune.max_steps=3"


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("loss", ["kld", "tvdpp"])
def test_two_ranks_train_the_drafter_that_one_process_trains(tmp_path, loss):
    run(sys.executable, "-m", "tests.two_ranks", str(tmp_path / "one.pt"), loss)
    run(*TORCHRUN, "-m", "tests.two_ranks", str(tmp_path / "two.pt"), loss)
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    for name, value in one["drafter"].items():
        # The same sums in another order, over eight steps of AdamW.
        torch.testing.assert_close(two["drafter"][name], value, rtol=1e-3, atol=1e-4)
    assert len(one["yardsticks"]) == 6
    assert two["yardsticks"] == pytest.approx(one["yardsticks"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stage", ["respond", "cache"])
def test_two_ranks_write_the_files_that_one_process_writes(world, tmp_path, stage):
    overrides, root = world
    run(*TORCHRUN, "-m", f"experiments.{stage}", *overrides, f"out={tmp_path}/two")
    two, one = manifest(tmp_path / "two"), manifest(root / {"respond": "responses", "cache": "cache"}[stage])
    assert (two["counts"], two["inputs"], two["files"].keys()) == (one["counts"], one["inputs"], one["files"].keys())
    if stage == "respond":
        assert two["files"] == one["files"]


def test_two_ranks_finetune_and_evaluate(world, tmp_path):
    overrides, root = world
    run(*TORCHRUN, "-m", "experiments.finetune", *overrides, "loss=tvdpp", STEPS, f"out={tmp_path}/finetune/two")
    assert manifest(tmp_path / "finetune" / "two")["counts"]["steps"] == 3
    drafters = f"drafters=[{tmp_path}/finetune/*,{root}/drafter]"
    run(*TORCHRUN, "-m", "experiments.evaluate", *overrides, drafters, f"out={tmp_path}/evaluate")
    assert {path.parent.name for path in tmp_path.glob("evaluate/*/manifest.json")} == {"two", "drafter"}
    assert all(len(read_jsonl(tmp_path / "evaluate" / name / "counts.jsonl")) == 12 for name in ("two", "drafter"))


def test_two_ranks_run_a_sweep_cell_by_cell_and_on_policy_rounds(world, tmp_path):
    overrides, root = world
    sweep = ["-m", "loss=kld,tvd", "seed=1", STEPS, f"out={tmp_path}/${{name}}"]
    run(*TORCHRUN, "-m", "experiments.finetune", *sweep, *overrides)
    assert {path.parent.name for path in tmp_path.glob("*/manifest.json")} == {"kld-seed1", "tvd-seed1"}
    shutil.copytree(root, tmp_path / "root")
    here = [*overrides, f"root={tmp_path}/root", "variant=drafter", "distillation.rounds=2"]
    run(*TORCHRUN, "-m", "experiments.finetune", *here, "loss=kld", STEPS)
    assert manifest(tmp_path / "root" / "variants" / "kld-drafter-seed0")["counts"]["steps"] == 2
    assert manifest(tmp_path / "root" / "rounds" / "kld-drafter-seed0" / "1" / "drafter")["counts"]["steps"] == 1
