"""The jobs of a pipeline: which stages run with which configs. Nothing is run here."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.reporting.identity import STEPS
from experiments.running.composing import cells, concerning, config_keys, configured, first_key, input_key, override
from experiments.running.data_settings import by_name, has_docstrings
from experiments.running.recipes import INSTRUCTIONS

log = logging.getLogger(__name__)
STAGES = ("prepare", "pretrain", "respond", "cache", "finetune", "evaluate", "tables")


class Job(NamedTuple):
    """One run of a stage: its config, and the config with Hydra's own part."""

    stage: str
    cfg: DictConfig
    hydra: DictConfig

    def choice(self, group: str) -> str | None:
        """Return which option of a config group was chosen."""
        choice: str | None = self.hydra.hydra.runtime.choices.get(group)
        return choice


def all_jobs(plan: DictConfig) -> list[Job]:
    """Return the runs of the stages that the config of a pipeline asks for, in order.

    Raises:
        ValueError: an override belongs to no stage.
    """
    others = list(plan.stage_overrides)
    check_overrides(others, plan)
    return list(iterate_jobs(plan, others))


def iterate_jobs(plan: DictConfig, others: list[str]) -> Iterator[Job]:
    """Yield every run of every stage, in order. Each stage receives those of the overrides `others` that it knows."""
    yield compose_job("prepare", others)
    chosen = finetuning_overrides(plan)
    starts = {tuple(override for override in cell if first_key(override) == "init") for cell in chosen}
    for start in sorted({(), *starts}):  # each start once, however many finetunings begin with it
        yield compose_job("pretrain", others, list(start))
    finetunings = without_references([compose_job("finetune", others, cell) for cell in chosen])
    distillations = [one.choice("distillation") for one in finetunings if not one.cfg.distillation.rounds]
    for name in dict.fromkeys(["target", *distillations]):  # each set once, however many finetunings read it
        yield compose_job("respond", others, [f"distillation={name}"])
        yield compose_job("cache", others, [f"distillation={name}"])
    yield from finetunings
    variants = [one for one in finetunings if one.choice("variant")]
    if variants:
        yield evaluation_job(variants, others, "evaluate_variants", plan.of_variants)
    unvaried = [one for one in finetunings if not one.choice("variant")]
    kept = [
        one
        for one in unvaried
        if one.choice("loss") in plan.along.losses
        and one.cfg.seed in plan.along.seeds
        and 0 < one.cfg.finetune.keep_every < one.cfg.finetune.max_steps
    ]
    if kept:
        yield evaluation_job(kept, others, "evaluate_steps", plan.of_variants, f"/{STEPS}/*")
    yield compose_job("evaluate", others)
    yield compose_job("tables", others)


def finetuning_overrides(plan: DictConfig) -> list[list[str]]:
    """Return the overrides of each finetuning: every loss with every seed, and the cells of the experiments' sweeps."""
    found = [[f"loss={loss}", f"seed={seed}"] for seed in plan.seeds or [] for loss in plan.losses]
    for experiment in plan.experiments:
        for cell in cells("finetune", experiment):
            ours = [override for override in cell if override.partition("=")[0] != "seed"]
            seeds = [f"seed={seed}" for seed in plan.seeds] if plan.seeds else list(set(cell) - set(ours))
            found += [cell for cell in ([*ours, seed] for seed in seeds) if cell not in found]
    return found


def without_references(finetunings: list[Job]) -> list[Job]:
    """Leave out the variants that train on reference answers where all instructions are self-written and have none."""
    variants = {variant for job in finetunings if (variant := job.choice("variant")) and lacks_references(job.cfg)}
    if variants:
        log.warning("variant=%s is left out: self-written instructions have no answers", ",".join(sorted(variants)))
    return [job for job in finetunings if job.choice("variant") not in variants]


def lacks_references(cfg: DictConfig) -> bool:
    """Return whether a finetuning is on reference answers, and no source of instructions has any."""
    if cfg.distillation.by != "reference" or has_docstrings(cfg):
        return False
    return len(by_name(cfg, INSTRUCTIONS)) == len(cfg.data.instructions)


def compose_job(stage: str, others: list[str], overrides: list[str] | None = None) -> Job:
    """Compose a stage with those of the overrides `others` that it knows, and with `overrides`, which are its own."""
    cfg = configured(stage, [*concerning(stage, others), *(overrides or [])])
    return Job(stage, cfg, HydraConfig.instance().cfg)


def evaluation_job(finetunings: list[Job], others: list[str], out: str, how: DictConfig, below: str = "") -> Job:
    """Return the job that evaluates the drafters of these finetunings.

    Args:
        finetunings: the jobs that make the drafters.
        others: the overrides of the command line.
        out: the name of the evaluation's directory under the root.
        how: has `num_speculative_tokens`, the γ to evaluate at.
        below: what follows the directory of a finetuning in the path of its drafters.
    """
    drafters = override("drafters", [f"{one.cfg.out}{below}" for one in finetunings])
    gammas = ",".join(map(str, how.num_speculative_tokens))
    overrides = [f"out=${{root}}/{out}", drafters, f"evaluate.num_speculative_tokens=[{gammas}]"]
    return compose_job("evaluate", others, overrides)


def check_overrides(arguments: list[str], plan: DictConfig) -> None:
    """Check that each override belongs to a stage or to the pipeline.

    Raises:
        ValueError: an override belongs to none; the error names it and the known keys.
    """
    if not arguments:
        return
    stages = [config_keys(name) for name in STAGES]
    known = sorted(set(map(str, plan)).union(*(keys.settings for keys in stages)) - {"stage_overrides"})
    inputs = sorted(frozenset().union(*(keys.inputs for keys in stages)))
    for argument in arguments:
        if first_key(argument) not in known:
            raise ValueError(f"'{argument}' is a setting of no stage: '{first_key(argument)}' is none of {known}")
        if first_key(argument) == "inputs" and input_key(argument) not in inputs:
            raise ValueError(f"'{argument}' is a setting of no stage: its inputs are {inputs}")
