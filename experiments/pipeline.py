"""All stages in one process: prepare, pretrain, respond, cache, finetune, evaluate, tables.

Config: conf/pipeline.yaml. What is finetuned is losses x seeds and the cells of the named experiments' sweeps
(conf/experiment); the sets that these need are made once for all. Each stage is composed from its own config with the
same overrides, as on its own command line, and skips itself where it is up to date, so an interrupted pipeline goes on
with the same command. A finetuning that fails does not stop the others, and is named at the end.
"""

import contextlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from transformers.utils.logging import disable_progress_bar

from experiments import cache, evaluate, finetune, prepare, pretrain, respond, tables
from experiments.commands import ended
from experiments.composing import cells, concerning, configured, first_key, input_key, override
from experiments.inputs import STEPS
from experiments.lengths import check_lengths

STAGES = (prepare, pretrain, respond, cache, finetune, evaluate, tables)
NAMES = tuple(module.__name__.rsplit(".", 1)[-1] for module in STAGES)


class Job(NamedTuple):
    """A stage's run, and what Hydra knows of it."""

    module: ModuleType
    cfg: DictConfig
    hydra: DictConfig

    def choice(self, group: str) -> str | None:
        """Which config was chosen of a group."""
        choice: str | None = self.hydra.hydra.runtime.choices.get(group)
        return choice


def main(arguments: list[str]) -> None:
    """Run the stages with the given overrides.

    Raises:
        RuntimeError: finetunings failed, once all others are done.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "lightning.pytorch", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    disable_progress_bar()  # of loading weights; the stages' own bars stay
    with initialize_config_module("conf", version_base="1.3"):
        plan, jobs = composed("pipeline", arguments)
        check(jobs)
        failed: dict[str, Exception] = {}
        for job in jobs:
            if job.module is evaluate:
                job.cfg.drafters = [path for path in job.cfg.drafters if path.removesuffix(f"/{STEPS}/*") not in failed]
            try:
                run(job, plan.evaluate_ranks)
            except Exception as problem:
                if job.module is not finetune:
                    raise
                logging.exception("%s failed", job.cfg.out)
                failed[job.cfg.out] = problem
    if failed:
        named = "\n".join(f"  {out}: {problem}" for out, problem in failed.items())
        raise RuntimeError(f"{len(failed)} of the finetunings failed, all else is done:\n{named}")


def check(jobs: list[Job]) -> None:
    """Find a wrong value of the last stage before the first one computes.

    Raises:
        ValueError: names it.
    """
    for job in jobs:
        if hasattr(job.module, "check"):
            job.module.check(job.cfg)
    prompt_tokens = next(job.cfg.prepare.max_prompt_tokens for job in jobs if job.module is prepare)
    for job in jobs:
        answers = {"respond.max_new_tokens": job.cfg.respond.max_new_tokens} if job.module is respond else {}
        if job.module is evaluate:
            answers = {f"task.{name}.max_new_tokens": how.max_new_tokens for name, how in job.cfg.task.items()}
        check_lengths(job.cfg, prompt_tokens, answers)


def composed(name: str, arguments: list[str]) -> tuple[DictConfig, list[Job]]:
    """A primary config of the pipeline's kind, and the jobs that it and the other overrides, the stages', ask for.

    Raises:
        ValueError: an override concerns no stage.
    """
    known = compose(name)
    plan = compose(name, [argument for argument in arguments if first_key(argument) in known])
    others = [argument for argument in arguments if first_key(argument) not in known]
    check_known(others)
    return plan, list(planned(plan, others))


def planned(plan: DictConfig, others: list[str]) -> Iterator[Job]:
    """Every run of every stage, in order."""
    yield job(prepare, others)
    yield job(pretrain, others)
    finetunings = [job(finetune, others, cell) for cell in finetuned(plan)]
    written = [one.choice("distillation") for one in finetunings if not one.cfg.distillation.rounds]
    for name in dict.fromkeys(["target", *written]):  # each set once, whatever reads it
        yield job(respond, others, [f"distillation={name}"])
        yield job(cache, others, [f"distillation={name}"])
    yield from finetunings
    variants = [one for one in finetunings if one.choice("variant")]
    if variants:
        yield evaluated(variants, others, "evaluate_variants", plan.of_variants)
    whole = [one for one in finetunings if one not in variants]
    kept = [
        one
        for one in whole
        if one.choice("loss") in plan.along.losses
        and one.cfg.seed in plan.along.seeds
        and 0 < one.cfg.finetune.keep_every < one.cfg.finetune.max_steps
    ]
    if kept:
        yield evaluated(kept, others, "evaluate_steps", plan.of_variants, f"/{STEPS}/*")
    yield job(evaluate, others)
    yield job(tables, others)


def finetuned(plan: DictConfig) -> list[list[str]]:
    """The overrides of each finetuning."""
    found = [[f"loss={loss}", f"seed={seed}"] for seed in plan.seeds or [] for loss in plan.losses]
    for experiment in plan.experiments:
        for cell in cells("finetune", experiment):
            ours = [override for override in cell if override.partition("=")[0] != "seed"]
            seeds = [f"seed={seed}" for seed in plan.seeds] if plan.seeds else list(set(cell) - set(ours))
            found += [cell for cell in ([*ours, seed] for seed in seeds) if cell not in found]
    return found


def job(module: ModuleType, others: list[str], overrides: list[str] | None = None) -> Job:
    """A stage with the pipeline's overrides and its own."""
    name = module.__name__.rsplit(".", 1)[-1]
    cfg = configured(name, [*concerning(name, others), *(overrides or [])])
    return Job(module, cfg, HydraConfig.instance().cfg)


def evaluated(trained: list[Job], others: list[str], out: str, how: DictConfig, below: str = "") -> Job:
    """An evaluation of these finetunings' drafters in a directory of its own."""
    drafters = override("drafters", [f"{one.cfg.out}{below}" for one in trained])
    gammas = ",".join(map(str, how.num_speculative_tokens))
    overrides = [f"out=${{root}}/{out}", drafters, f"evaluate.num_speculative_tokens=[{gammas}]"]
    return job(evaluate, others, overrides)


def check_known(arguments: list[str]) -> None:
    """Refuse an override that concerns no stage.

    Raises:
        ValueError: names it.
    """
    stages = [compose(name) for name in NAMES]
    known = sorted(set().union(*stages))
    inputs = sorted({name for cfg in stages if "inputs" in cfg for name in cfg.inputs})
    for argument in arguments:
        if first_key(argument) not in known:
            raise ValueError(f"'{argument}' is a setting of no stage: '{first_key(argument)}' is none of {known}")
        if first_key(argument) == "inputs" and input_key(argument) not in inputs:
            raise ValueError(f"'{argument}' is a setting of no stage: its inputs are {inputs}")


def run(job: Job, evaluate_ranks: int = 1) -> None:
    """One stage, as its own command line would run it; an evaluation by several processes, if so asked."""
    HydraConfig.instance().cfg = job.hydra
    if job.module is evaluate and evaluate_ranks > 1 and not job.cfg.dry_run and evaluate.is_pending(job.cfg):
        overrides = [*job.hydra.hydra.overrides.task, override("drafters", list(job.cfg.drafters))]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={evaluate_ranks}"]
        run_to_the_end([*torchrun, "-m", "experiments.evaluate", *overrides])
    job.module.main(job.cfg)


def run_to_the_end(command: list[str]) -> None:
    """A program that starts others: where this process is interrupted, it ends, and ends them, before this one does.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with subprocess.Popen(command) as process:
        try:
            status = process.wait()
        except BaseException:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # Ctrl-C reaches it too
            process.terminate()
            process.wait()
            raise
    if status:
        raise subprocess.CalledProcessError(status, command)


if __name__ == "__main__":
    with ended("experiments.pipeline"):
        main(sys.argv[1:])
