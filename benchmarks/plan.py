"""Compare the plan of the embedded default with measurements: time and memory of each stage.

    python -m benchmarks.plan [--root runs/tiny]      (after `make demo`; about 6 minutes, on a quiet machine)

Each stage is planned for hardware=cpu, and then runs alone into a new directory, from the inputs of the finished root.
Its time is that of its manifest, without the start of Python; its memory is the largest resident size of its process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_module

from drafter.artifacts.manifest import read_manifest
from experiments.plan import world_of
from experiments.planning.estimates import estimates
from experiments.running.composing import gather_stage_overrides
from experiments.running.jobs import all_jobs

STAGES = ("pretrain", "respond", "cache", "finetune", "evaluate")


def measured(stage, root, out):
    """Run a stage alone; return its seconds and its peak memory in bytes."""
    more = {
        "finetune": ["loss=tvdpp", "finetune.keep_every=0"],
        "evaluate": [f"drafters=[{root}/finetune/tvdpp-seed1]"],
    }
    command = [sys.executable, "-m", f"experiments.{stage}", f"root={root}", f"out={out}", "logger=csv", "seed=7"]
    process = subprocess.Popen([*command, *more.get(stage, [])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{stage} failed: {' '.join(command)}")
    finished = next(Path(out).rglob("manifest.json")).parent  # an evaluation lies one level deeper
    return read_manifest(finished, stage)["seconds"], usage.ru_maxrss * 1024


def main():
    """Print one line per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="runs/tiny")
    root = parser.parse_args().root
    with initialize_config_module("conf", version_base="1.3"):
        drafter = f"drafters=[{root}/finetune/tvdpp-seed1]"
        given = gather_stage_overrides("plan", ["hardware=cpu", "plan.gpus=1", "losses=[tvdpp]", drafter])
        settings = compose("plan", given)
        jobs = all_jobs(settings)
        expected = {stage.name: stage for job in jobs for stage in estimates(job, world_of(settings, jobs))}
    print("| stage | time: planned | measured | ratio | memory: planned | measured | ratio |\n" + "| --- " * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            seconds, memory = measured(stage, root, f"{folder}/{stage}")
            one = expected[stage]
            print(
                f"| {stage} | {one.seconds:.0f} s | {seconds:.0f} s | {one.seconds / seconds:.2f} | "
                f"{one.total_memory / 1e9:.2f} GB | {memory / 1e9:.2f} GB | {one.total_memory / memory:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
