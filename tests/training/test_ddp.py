"""Two ranks under torchrun, on CPU with gloo, have the results of one process."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from drafter.artifacts.manifest import read_jsonl
from tests.experiments.test_pipeline import stage

pytestmark = pytest.mark.end_to_end

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
STEPS = "finetune.max_steps=3"


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def run_on_two_ranks(folder, commands):
    """Run stages, each with its overrides, one after the other in the same two ranks."""
    path = folder / "commands.json"
    path.write_text(json.dumps(commands))
    run(*TORCHRUN, "-m", "tests.several_commands", str(path))


def test_two_ranks_train_the_drafter_that_one_process_trains(tmp_path):
    run(sys.executable, "-m", "tests.two_ranks", str(tmp_path / "one.pt"), "tvdpp")
    run(*TORCHRUN, "-m", "tests.two_ranks", str(tmp_path / "two.pt"), "tvdpp")
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    for name, value in one["drafter"].items():
        # The same sums in another order, over eight steps of AdamW.
        torch.testing.assert_close(two["drafter"][name], value, rtol=1e-3, atol=1e-4)
    assert len(one["yardsticks"]) == 6
    assert two["yardsticks"] == pytest.approx(one["yardsticks"], rel=1e-3, abs=1e-4)


def test_two_ranks_run_every_stage(world, tmp_path, subtests):
    overrides, root = world
    shutil.copytree(root, tmp_path / "root")
    drafters = f"drafters=[{tmp_path}/finetune/*,{root}/drafter]"
    on_policy = [f"root={tmp_path}/root", "variant=drafter", "distillation.rounds=2", "loss=kld", STEPS]
    comparison = [drafters, f"inputs.cache={tmp_path}/cache", f"out={tmp_path}/compare"]
    commands = [
        ("respond", [f"out={tmp_path}/respond"]),
        ("cache", [f"out={tmp_path}/cache"]),
        ("finetune", ["loss=tvdpp", STEPS, f"out={tmp_path}/finetune/two"]),
        ("evaluate", [drafters, f"out={tmp_path}/evaluate"]),
        ("compare", comparison),
        ("finetune", on_policy),
    ]
    run_on_two_ranks(tmp_path, [(name, [*overrides, *own]) for name, own in commands])
    for name, of_one in {"respond": "responses", "cache": "cache"}.items():
        with subtests.test(name):
            two, one = manifest(tmp_path / name), manifest(root / of_one)
            assert [two[key] for key in ("counts", "inputs")] == [one[key] for key in ("counts", "inputs")]
            assert two["files"].keys() == one["files"].keys()
            if name == "respond":
                assert two["files"] == one["files"]
    with subtests.test("finetune and evaluate"):
        assert manifest(tmp_path / "finetune" / "two")["counts"]["steps"] == 3
        assert {path.parent.name for path in tmp_path.glob("evaluate/*/manifest.json")} == {"two", "drafter"}
        assert all(len(read_jsonl(tmp_path / "evaluate" / name / "counts.jsonl")) == 12 for name in ("two", "drafter"))
    with subtests.test("compare"):
        alone = [*comparison[:-1], f"out={tmp_path}/alone"]
        stage("compare", [*overrides, *alone])
        for name in ("two", "drafter"):
            two, one = (read_jsonl(tmp_path / out / name / "counts.jsonl") for out in ("compare", "alone"))
            assert two == one
        assert (tmp_path / "compare" / "compare.md").read_text() == (tmp_path / "alone" / "compare.md").read_text()
    with subtests.test("on-policy rounds"):
        assert manifest(tmp_path / "root" / "variants" / "kld-drafter-seed0")["counts"]["steps"] == 2
        assert manifest(tmp_path / "root" / "rounds" / "kld-drafter-seed0" / "1" / "drafter")["counts"]["steps"] == 1


def test_two_ranks_run_a_sweep_cell_by_cell(world, tmp_path):
    overrides, _ = world
    sweep = ["-m", "loss=kld,tvd", "seed=1", STEPS, f"out={tmp_path}/${{name}}"]
    run(*TORCHRUN, "-m", "experiments.finetune", *sweep, *overrides)
    assert {path.parent.name for path in tmp_path.glob("*/manifest.json")} == {"kld-seed1", "tvd-seed1"}
