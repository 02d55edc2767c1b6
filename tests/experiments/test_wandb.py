"""Read back what an offline run records in Weights & Biases, with the tool `wandb leet inspect`."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
from omegaconf import OmegaConf

from drafter.training.resuming import Resuming
from experiments import tables
from tests.experiments.test_pipeline import stage
from tests.experiments.test_tables import pipeline_root, settings

WANDB = Path(sys.executable).parent / "wandb"


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Finetune with two seeds, and return what each recorded: seed -> the lines of `wandb leet inspect`."""
    overrides, root = world
    folder = tmp_path_factory.mktemp("wandb")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for seed in (1, 2):
            kept = [part for part in overrides if part != "logger=csv" and not part.startswith("root=")]
            inputs = [f"inputs.{name}={root}/{name}" for name in ("data", "drafter", "responses", "cache")]
            stage(
                "finetune",
                [*kept, *inputs, f"root={folder}/{seed}", "loss=kld", f"seed={seed}", "finetune.max_steps=2"],
            )
            (log,) = (folder / str(seed)).glob("wandb/offline-run-*/run-*.wandb")
            read = subprocess.run([WANDB, "leet", "inspect", "--json", str(log)], capture_output=True, text=True)
            assert read.returncode == 0, read.stderr
            found[seed] = read.stdout
    return found


def records(log):
    """Return what an offline run has recorded, in order."""
    read = subprocess.run([WANDB, "leet", "inspect", "--json", str(log)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    return [json.loads(line) for line in read.stdout.splitlines()]


@pytest.mark.end_to_end
def test_a_resumed_stage_is_one_run_in_which_each_step_is_logged_once(world, tmp_path, monkeypatch):
    overrides, root = world
    monkeypatch.setenv("WANDB_MODE", "offline")

    def fail(self, trainer, *_):
        if trainer.global_step == 14:
            raise RuntimeError("the power failed")

    kept = [part for part in overrides if part != "logger=csv" and not part.startswith("root=")]
    inputs = [f"inputs.{name}={root}/{name}" for name in ("data", "drafter", "responses", "cache")]
    command = [*kept, *inputs, f"root={tmp_path}", f"out={tmp_path}/out", "loss=kld", "finetune.max_steps=25"]
    command.append("finetune.validate_every=8")  # so that step 9, which logs the loss, is repeated
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power failed"):  # noqa: PT012
        patch.setattr(Resuming, "on_train_batch_end", fail, raising=False)
        stage("finetune", command)
    assert wandb.run is None
    time.sleep(1)  # its directories are named by the second
    stage("finetune", command)
    logs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda log: log.parent.name)
    starts = [records(log) for log in logs]
    runs = {line["run"]["run_id"] for start in starts for line in start if "run" in line}
    assert runs == {json.loads((tmp_path / "out" / "logs" / "wandb.json").read_text())["run"]}
    assert [line["exit"].get("exit_code") for start in starts for line in start if "exit" in line] == [1, 0]
    rows = [line["history"]["item"] for start in starts for line in start if "history" in line]
    for name, steps in {"val/kld": [0, 7, 15, 23, 25], "train/loss": [9, 19]}.items():
        assert [row["trainer/global_step"] for row in rows if name in row] == steps
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not [name for name in manifest["files"] if "wandb" in name]


def test_each_seed_records_its_name_its_loss_and_its_stage(runs):
    for seed, text in runs.items():
        assert f"kld-seed{seed}" in text
        run = next(json.loads(line) for line in text.splitlines() if '"run_group"' in line or '"runGroup"' in line)
        recorded = json.dumps(run)
        for part in ('"kld"', '"finetune"', '"smoke"'):
            assert part in recorded


def test_the_common_yardsticks_are_recorded(runs):
    for text in runs.values():
        for name in ("val/acceptance_rate", "val/kld", "val/tvd", "val/block_efficiency_greedy"):
            assert name in text


@pytest.mark.end_to_end
def test_the_tables_are_recorded_once_with_all_that_was_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    root = pipeline_root(tmp_path)
    logger = {"wandb": True, "project": "drafter", "group": None}
    cfg = OmegaConf.create(settings(root, root / "report", logger=logger, seed=0, scale={"name": "tiny"}))
    tables.main(cfg)
    tables.main(cfg)
    (log,) = root.glob("wandb/offline-run-*/run-*.wandb")
    read = subprocess.run([WANDB, "leet", "inspect", "--json", str(log)], capture_output=True, text=True)
    for part in ("tables/losses", "tables/gamma_3", "results-tiny", "runs.json", "figures/curves.png"):
        assert part in read.stdout, part
