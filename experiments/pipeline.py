"""All stages in one process: prepare, pretrain, respond, cache, finetune, evaluate, tables.

Config: conf/pipeline.yaml. The pipeline finetunes with every pair of a loss and a seed, and for every cell of the
sweeps in `experiments` (conf/experiment). The distillation sets that these need are made once. Each stage is composed
from its own config with the same overrides, as on its own command line. A stage that is up to date is skipped, so
that the same command continues an interrupted pipeline. A finetuning that fails does not stop the others; it is named
at the end.
"""

import contextlib
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from drafter.artifacts.manifest import MANIFEST
from drafter.artifacts.storage import Folder
from experiments import cache, evaluate, finetune, prepare, pretrain, respond, tables
from experiments.reporting.conclusions import conclusions
from experiments.reporting.identity import STEPS
from experiments.reporting.results import read_evaluations
from experiments.running.commands import pipeline_command
from experiments.running.composing import override
from experiments.running.jobs import Job, all_jobs
from experiments.running.keeping import check_stages
from experiments.running.lengths import check_lengths
from experiments.running.named_drafters import model_of
from experiments.running.progress import announce, quiet

MODULES = {
    "prepare": prepare,
    "pretrain": pretrain,
    "respond": respond,
    "cache": cache,
    "finetune": finetune,
    "evaluate": evaluate,
    "tables": tables,
}


@pipeline_command("pipeline")
def main(plan: DictConfig) -> None:
    """Run the stages.

    Raises:
        RuntimeError: finetunings failed; it is raised once everything else is done.
    """
    quiet()
    check_ranks(plan.ranks)
    jobs = all_jobs(plan)
    check(jobs)
    failed: dict[str, Exception] = {}
    for number, job in enumerate(jobs, start=1):
        announce(job.stage, job.cfg.out, number, len(jobs))
        if job.stage == "evaluate":
            models = {name: model_of(name) or name for name in job.cfg.drafters}
            job.cfg.drafters = [name for name, path in models.items() if path.removesuffix(f"/{STEPS}/*") not in failed]
        try:
            run(job, plan.ranks)
        except Exception as problem:
            if job.stage != "finetune":
                raise
            logging.exception("%s failed", job.cfg.out)
            failed[job.cfg.out] = problem
    if not (last := jobs[-1].cfg).dry_run:
        evaluations = read_evaluations(Path(last.root) / "evaluate", last.base, last.acceptance_rule)
        print("\n" + "\n".join(conclusions(evaluations, last.out)), flush=True)
    if failed:
        named = "\n".join(f"  {out}: {problem}" for out, problem in failed.items())
        raise RuntimeError(f"{len(failed)} of the finetunings failed; everything else is done:\n{named}")


def check(jobs: list[Job]) -> None:
    """Check the settings of every stage before the first one computes.

    Raises:
        ValueError: a setting is wrong; the error names it.
    """
    for job in jobs:
        if job.stage != "tables":
            MODULES[job.stage].check(job.cfg)
    check_stages(jobs)
    reported = next((job.cfg.acceptance_rule for job in jobs if job.stage == "tables"), None)
    prompt_tokens = next(job.cfg.prepare.max_prompt_tokens for job in jobs if job.stage == "prepare")
    for job in jobs:
        answers = {"respond.max_new_tokens": job.cfg.respond.max_new_tokens} if job.stage == "respond" else {}
        if job.stage == "evaluate":
            check_reported(job.cfg.evaluate.acceptance_rules, reported)
            answers = {f"task.{name}.max_new_tokens": how.max_new_tokens for name, how in job.cfg.task.items()}
        check_lengths(job.cfg, prompt_tokens, answers, training=job.stage == "respond")


def check_reported(rules: Sequence[str], reported: str | None) -> None:
    """Raise ValueError if the report is about an acceptance rule that is not among those of an evaluation."""
    if reported and reported not in rules:
        raise ValueError(
            f"acceptance_rule is '{reported}', which the report is about, must be among evaluate.acceptance_rules, "
            f"which are {list(rules)}"
        )


def check_ranks(ranks: Mapping[str, int]) -> None:
    """Raise ValueError if a number of processes is none."""
    for stage, number in ranks.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"ranks.{stage} is {number}, must be a whole number, 1 or above")


def run(job: Job, ranks: Mapping[str, int]) -> None:
    """Run one stage exactly as its own command would, in as many processes as `ranks` gives it, or in this one."""
    HydraConfig.instance().cfg = job.hydra
    number = ranks.get(job.stage, 1)
    if number > 1 and not job.cfg.dry_run and is_pending(job):
        overrides = list(job.hydra.hydra.overrides.task)
        if job.stage == "evaluate":
            overrides.append(override("drafters", list(job.cfg.drafters)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        run_to_the_end([*torchrun, "-m", f"experiments.{job.stage}", *overrides])
    MODULES[job.stage].main(job.cfg)  # which finds nothing left to do if other processes have done it


def is_pending(job: Job) -> bool:
    """Return whether a stage has anything left to compute. One whose settings have changed may count as finished."""
    if job.stage == "evaluate":
        return evaluate.is_pending(job.cfg)
    return not Folder(job.cfg.out).exists(MANIFEST)


def run_to_the_end(command: list[str]) -> None:
    """Run a program and wait for it. When this process is interrupted, end the program before this process ends.

    Raises:
        subprocess.CalledProcessError: the program failed.
    """
    with subprocess.Popen(command) as process:
        try:
            status = process.wait()
        except BaseException:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # Ctrl-C also reaches the program
            process.terminate()
            process.wait()
            raise
    if status:
        raise subprocess.CalledProcessError(status, command)


if __name__ == "__main__":
    main()
