"""On-policy distillation: rounds of answers by the drafter of the round before, judged by the target.

DistillSpec (arXiv 2310.08461) and GKD (arXiv 2306.13649) let the drafter write what it is trained on, since that is
what it drafts when it serves. Here each round is a distillation set, its cache and a finetuning of their own, so that
all that holds for those holds for these: resumable, on any number of ranks, and each with its manifest.
"""

from collections.abc import Callable
from types import ModuleType

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import cache, respond
from experiments.composing import concerning, configured, first_key, quoted


def run(cfg: DictConfig, finetune: Callable[[DictConfig], None]) -> None:
    """`distillation.rounds` rounds -> ${root}/rounds/<name>/<round>, the last one's drafter -> cfg.out.

    Args:
        cfg: a finetuning's config.
        finetune: one finetuning on a set that is there.
    """
    before, given = HydraConfig.instance().cfg, HydraConfig.get().overrides.task
    written = f"distillation={HydraConfig.get().runtime.choices['distillation']}"
    elsewhere = [override for override in given if first_key(override) != "distillation"]
    rounds, steps, drafter = cfg.distillation.rounds, cfg.finetune.max_steps, cfg.inputs.drafter
    OmegaConf.resolve(cfg)
    try:
        for number in range(1, rounds + 1):
            folder, last = f"{cfg.root}/rounds/{cfg.name}/{number}", number == rounds
            answers, judged = f"{folder}/responses", f"{folder}/cache"
            trained = cfg.out if last else f"{folder}/drafter"
            writer = f"inputs.drafter={quoted(drafter)}"
            reading = [f"out={quoted(answers)}", f"inputs.data={quoted(cfg.inputs.data)}", writer]
            judging = [f"out={quoted(judged)}", f"inputs.responses={quoted(answers)}"]
            step(respond, [*concerning("respond", elsewhere), written, *reading])
            step(cache, [*concerning("cache", elsewhere), written, *judging])
            of_round = steps * number // rounds - steps * (number - 1) // rounds
            overrides = [writer, f"inputs.cache={quoted(judged)}", f"finetune.max_steps={of_round}"]
            name = cfg.name if last else f"{cfg.name}-round{number}"
            overrides += [f"out={quoted(trained)}", f"name={quoted(name)}", "distillation.rounds=0"]
            finetune(configured("finetune", [*given, *overrides]))
            drafter = trained
    finally:
        HydraConfig.instance().cfg = before


def step(module: ModuleType, overrides: list[str]) -> None:
    """One stage of a round, as its own command line would run it."""
    module.main(configured(module.__name__.rsplit(".", 1)[-1], overrides))
