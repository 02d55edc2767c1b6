"""Every strategy for training, on CPU with gloo on two ranks, has the curve and the drafter of one plain process."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drafter.artifacts.manifest import read_jsonl, read_manifest
from drafter.artifacts.rows import Rows
from drafter.data.target_cache import restore
from tests.conftest import save_llama
from tests.experiments.test_pipeline import stage
from tests.training.test_ddp import TORCHRUN, manifest, run, run_on_two_ranks

pytestmark = pytest.mark.end_to_end

STEPS = ["loss=tvdpp", "finetune.max_steps=6", "finetune.validate_every=3"]
FSDP2, LIVE, ACCUMULATE = ["trainer=fsdp2"], ["inputs.cache=null"], ["trainer.accumulate_grad_batches=2"]
PARTS = ["finetune.batch_tokens=150"]  # several forward passes per step, not equally many on both ranks
STRATEGIES = {  # DDP alone: test_ddp.py
    "fsdp2": FSDP2,
    "accumulate_checkpointing": [*ACCUMULATE, "finetune.gradient_checkpointing=true", *PARTS],
    "target_fsdp": [*LIVE, "target.parallel=fsdp"],
    "bf16": ["trainer.precision=bf16-mixed"],
    "all_fsdp2": [*LIVE, "target.parallel=fsdp", *FSDP2, "finetune.gradient_checkpointing=true", *PARTS],
}
# Overrides that change the result, and are therefore given to the single process too.
ALSO_ALONE = {
    "target_fsdp": LIVE,
    "all_fsdp2": LIVE,
    "bf16": STRATEGIES["bf16"],
    "accumulate_checkpointing": ACCUMULATE,
}


def curve(folder):
    with (folder / "logs" / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """Return a function that runs one process with the given overrides, once."""
    overrides, _ = world
    made = {}

    def run_of(extra):
        key = tuple(extra)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("alone") / "out"
            stage("finetune", [*overrides, *STEPS, *extra, f"out={made[key]}"])
        return made[key]

    return run_of


def test_two_ranks_have_the_curve_and_the_drafter_of_one_process(world, alone, tmp_path, subtests):
    overrides, _ = world
    run_on_two_ranks(
        tmp_path,
        [("finetune", [*overrides, *STEPS, *STRATEGIES[name], f"out={tmp_path}/{name}"]) for name in STRATEGIES],
    )
    for strategy in STRATEGIES:
        with subtests.test(strategy):
            one = alone(ALSO_ALONE.get(strategy, []))
            check_equal(tmp_path / strategy, one, loose=20 if strategy == "bf16" else 1)


def test_a_compiled_drafter_has_the_curve_of_an_ordinary_one(world, alone, tmp_path):
    overrides, _ = world
    compiled = ["finetune.compile=true", f"out={tmp_path}/out"]
    run(sys.executable, "-m", "experiments.finetune", *overrides, *STEPS, *compiled)
    check_equal(tmp_path / "out", alone([]))


def check_equal(found, expected, loose=1):
    """Compare curves and drafters.

    Sums in another order are enlarged by AdamW's division by the root of small numbers. bfloat16 has 8 bits.
    """
    assert manifest(found)["counts"]["steps"] == 6
    assert len(curve(found)) == len(curve(expected)) == 4
    for ours, theirs in zip(curve(found), curve(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3 * loose, abs=1e-4 * loose)
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        assert value.dtype == torch.float32
        assert weights[name].sub(value).abs().max() < 2e-3 * loose, name


@pytest.mark.parametrize("resumed_by", ["fsdp2", "alone"])
def test_a_killed_run_of_two_ranks_resumes_to_the_curve_of_an_uninterrupted_run(world, alone, tmp_path, resumed_by):
    overrides, _ = world
    longer = ["finetune.max_steps=26", "finetune.validate_every=4"]
    command = ["-m", "experiments.finetune", *overrides, *STEPS, *longer, f"out={tmp_path}/out"]
    process = subprocess.Popen([*TORCHRUN, *command, *FSDP2], start_new_session=True, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    run(*([*TORCHRUN, *command, *FSDP2] if resumed_by == "fsdp2" else [sys.executable, *command]))
    for found, expected in zip(curve(tmp_path / "out"), curve(alone(longer)), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_preempted_cluster_job_is_requeued_and_ends_with_the_same_curve(world, alone, tmp_path):
    overrides, _ = world
    # Not TVD++, which divides by a deviation that is nearly 0 once all drafts are accepted, and so enlarges rounding.
    longer = ["loss=kld", "finetune.max_steps=80", "finetune.validate_every=4"]
    command = ["-m", "experiments.finetune", *overrides, *STEPS, *longer, f"out={tmp_path}/out", "cluster=local"]
    jobs = f"hydra.launcher.submitit_folder={tmp_path}/jobs"
    process = subprocess.Popen([sys.executable, *command, jobs], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
        assert process.poll() is None
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"submitit.core._submit" in (line := path.read_bytes()) and bytes(tmp_path) in line:
                os.kill(int(path.parent.name), signal.SIGUSR2)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "failed" not in errors
    assert any("Requeued job" in path.read_text() for path in (tmp_path / "jobs").glob("*log.*"))
    for found, expected in zip(curve(tmp_path / "out"), curve(alone(longer)), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_two_ranks_share_one_target_and_generate_as_one_process(world, tmp_path):
    overrides, root = world
    save_llama(tmp_path / "target", root.parent / "target")
    overrides = [*overrides, f"target.path={tmp_path}/target", f"++inputs.data={root}/data", "scale.num_responses=16"]
    steps = {"respond": [], "cache": [f"inputs.responses={tmp_path}/respond-one"]}
    for name, extra in steps.items():
        stage(name, [*overrides, *extra, f"out={tmp_path}/{name}-one"])
    split = ["target.parallel=tensor"]
    run_on_two_ranks(
        tmp_path,
        [(name, [*overrides, *extra, *split, f"out={tmp_path}/{name}-two"]) for name, extra in steps.items()],
    )
    one, two = (Rows(tmp_path / f"respond-{name}", "respond") for name in ("one", "two"))
    assert [row["response_ids"].tolist() for row in two] == [row["response_ids"].tolist() for row in one]
    counts = (read_manifest(tmp_path / f"cache-{name}", "cache")["counts"] for name in ("one", "two"))
    assert len({one["output_embedding"] for one in counts}) == 1  # gathered from both ranks
    one, two = (Rows(tmp_path / f"cache-{name}", "cache") for name in ("one", "two"))
    for expected, found in zip(one, two, strict=True):
        expected, found = (restore(row, rows.schema) for row, rows in ((expected, one), (found, two)))
        for name in ("hidden_NH", "log_z_N"):
            ours, theirs = (getattr(states, name).float() for states in (found, expected))
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)  # stored in bfloat16
    sparse = [*overrides, *steps["cache"], "cache=sparse", "cache.format.num_samples=8", "cache.format.top_k=4"]
    stage("cache", [*sparse, f"out={tmp_path}/sparse-one"])
    run(*TORCHRUN, "-m", "experiments.cache", *sparse, f"out={tmp_path}/sparse-two", "target.parallel=tensor")
    one, two = (Rows(tmp_path / f"sparse-{name}", "cache") for name in ("one", "two"))
    for expected, found in zip(one, two, strict=True):
        assert found["ids"].tolist() == expected["ids"].tolist()
    evaluate = [*overrides, f"drafters=[{root}/drafter]"]
    stage("evaluate", [*evaluate, f"out={tmp_path}/evaluate-one"])
    run(*TORCHRUN, "-m", "experiments.evaluate", *evaluate, f"out={tmp_path}/evaluate-two", "target.parallel=tensor")
    one, two = (read_jsonl(tmp_path / f"evaluate-{name}" / "drafter" / "counts.jsonl") for name in ("one", "two"))
    for field in ("tokens", "target_calls", "accepted"):
        assert [row[field] for row in two] == [row[field] for row in one]


@pytest.mark.parametrize(
    ("name", "parallel", "message"),
    [
        ("respond", "fsdp", r"target\.parallel is 'fsdp', but respond takes null .* or tensor"),
        ("finetune", "tensor", r"target\.parallel is 'tensor', but finetune takes null .* or fsdp"),
        ("cache", "tensor", r"target\.parallel is 'tensor', .* the ranks of torchrun: there are none"),
    ],
)
def test_an_unsupported_value_of_target_parallel_is_refused(world, tmp_path, name, parallel, message):
    overrides, _ = world
    with pytest.raises(ValueError, match=message):
        stage(name, [*overrides, f"target.parallel={parallel}", "++inputs.cache=null", f"out={tmp_path}/out"])
