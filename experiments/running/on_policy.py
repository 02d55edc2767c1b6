"""On-policy distillation: in each round, the drafter of the previous round generates the responses to train on.

DistillSpec (arXiv 2310.08461) and GKD (arXiv 2306.13649) train the drafter on text that it generated itself, because
that is what it proposes when it serves. Each round here is an ordinary distillation set, cache and finetuning. It can
therefore be resumed, runs on any number of ranks, and has manifests.
"""

from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.running.caching import cache
from experiments.running.composing import concerning, configured, first_key, override
from experiments.running.identity import finetuned_identity
from experiments.running.inputs import plain
from experiments.running.responding import respond


def run(cfg: DictConfig, finetune: Callable[[DictConfig], None]) -> None:
    """Run `distillation.rounds` rounds in ${root}/rounds/<name>/<round>; the last drafter is written to cfg.out.

    Args:
        cfg: the config of the finetuning.
        finetune: runs one finetuning on an existing distillation set.
    """
    before, given = HydraConfig.instance().cfg, HydraConfig.get().overrides.task
    others = [part for part in given if first_key(part) != "distillation"]
    how = [override(f"distillation.{key}", value) for key, value in plain(cfg.distillation).items() if key != "rounds"]
    written = [*others, f"distillation={HydraConfig.get().runtime.choices['distillation']}", *how]
    rounds, steps, drafter = cfg.distillation.rounds, cfg.finetune.max_steps, cfg.inputs.drafter
    OmegaConf.resolve(cfg)
    whole = finetuned_identity(cfg).series
    try:
        for number in range(1, rounds + 1):
            folder, last = f"{cfg.root}/rounds/{cfg.name}/{number}", number == rounds
            answers, judged = f"{folder}/responses", f"{folder}/cache"
            trained = cfg.out if last else f"{folder}/drafter"
            read = {"out": answers, "inputs.data": cfg.inputs.data, "inputs.drafter": drafter}
            reading = [override(key, value) for key, value in read.items()]
            respond(configured("respond", [*concerning("respond", written), *reading]))
            responses = override("inputs.responses", answers)
            cache(configured("cache", [*concerning("cache", written), override("out", judged), responses]))
            of_round = steps * number // rounds - steps * (number - 1) // rounds
            series = whole if last else f"{whole}-round{number}"
            name = cfg.name if last else f"{series}-seed{cfg.seed}"
            changed = {"inputs.drafter": drafter, "inputs.cache": judged, "finetune.max_steps": of_round}
            changed |= {"out": trained, "series": series, "name": name, "distillation.rounds": 0}
            finetune(configured("finetune", [*given, *(override(key, value) for key, value in changed.items())]))
            drafter = trained
    finally:
        HydraConfig.instance().cfg = before
