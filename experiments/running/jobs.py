"""The jobs of a pipeline: which stages run with which configs. Nothing is run here."""

from collections.abc import Iterator
from typing import NamedTuple

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.reporting.identity import STEPS
from experiments.running.composing import cells, concerning, configured, first_key, input_key, override

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
    check_known(others, plan)
    return list(planned(plan, others))


def planned(plan: DictConfig, others: list[str]) -> Iterator[Job]:
    """Yield every run of every stage, in order; `others` are the overrides of the stages."""
    yield job("prepare", others)
    yield job("pretrain", others)
    finetunings = [job("finetune", others, cell) for cell in finetuned(plan)]
    written = [one.choice("distillation") for one in finetunings if not one.cfg.distillation.rounds]
    for name in dict.fromkeys(["target", *written]):  # each set once, however many finetunings read it
        yield job("respond", others, [f"distillation={name}"])
        yield job("cache", others, [f"distillation={name}"])
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
    yield job("evaluate", others)
    yield job("tables", others)


def finetuned(plan: DictConfig) -> list[list[str]]:
    """Return the overrides of each finetuning."""
    found = [[f"loss={loss}", f"seed={seed}"] for seed in plan.seeds or [] for loss in plan.losses]
    for experiment in plan.experiments:
        for cell in cells("finetune", experiment):
            ours = [override for override in cell if override.partition("=")[0] != "seed"]
            seeds = [f"seed={seed}" for seed in plan.seeds] if plan.seeds else list(set(cell) - set(ours))
            found += [cell for cell in ([*ours, seed] for seed in seeds) if cell not in found]
    return found


def job(stage: str, others: list[str], overrides: list[str] | None = None) -> Job:
    """Compose a stage with the overrides of the command line and its own."""
    cfg = configured(stage, [*concerning(stage, others), *(overrides or [])])
    return Job(stage, cfg, HydraConfig.instance().cfg)


def evaluated(trained: list[Job], others: list[str], out: str, how: DictConfig, below: str = "") -> Job:
    """Return an evaluation of the drafters of these finetunings, in a directory of its own."""
    drafters = override("drafters", [f"{one.cfg.out}{below}" for one in trained])
    gammas = ",".join(map(str, how.num_speculative_tokens))
    overrides = [f"out=${{root}}/{out}", drafters, f"evaluate.num_speculative_tokens=[{gammas}]"]
    return job("evaluate", others, overrides)


def check_known(arguments: list[str], plan: DictConfig) -> None:
    """Refuse an override that belongs to no stage.

    Raises:
        ValueError: names the override and the keys that there are.
    """
    stages = [compose(name) for name in STAGES]
    known = sorted(set(map(str, plan)).union(*stages) - {"stage_overrides"})
    inputs = sorted({name for cfg in stages for name in cfg.inputs})
    for argument in arguments:
        if first_key(argument) not in known:
            raise ValueError(f"'{argument}' is a setting of no stage: '{first_key(argument)}' is none of {known}")
        if first_key(argument) == "inputs" and input_key(argument) not in inputs:
            raise ValueError(f"'{argument}' is a setting of no stage: its inputs are {inputs}")
