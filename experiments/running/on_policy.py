"""On-policy distillation: in each round, the drafter of the previous round generates the responses to train on.

DistillSpec (arXiv 2310.08461) and GKD (arXiv 2306.13649) train the drafter on text that it generated itself, because
this is the text that it proposes in serving. Each round here is an ordinary distillation set, cache and finetuning.
Therefore it can be resumed, runs on any number of ranks, and has manifests.
"""

from collections.abc import Callable
from typing import Any

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
    hydra_config, overrides = HydraConfig.instance().cfg, HydraConfig.get().overrides.task
    others = [part for part in overrides if first_key(part) != "distillation"]
    fields = {key: value for key, value in plain(cfg.distillation).items() if key != "rounds"}
    chosen = f"distillation={HydraConfig.get().runtime.choices['distillation']}"
    settings = [*others, chosen, *(override(f"distillation.{key}", value) for key, value in fields.items())]
    rounds, steps, drafter = cfg.distillation.rounds, cfg.finetune.max_steps, cfg.inputs.drafter
    OmegaConf.resolve(cfg)
    last_series = finetuned_identity(cfg).series
    try:
        for number in range(1, rounds + 1):
            folder, is_last = f"{cfg.root}/rounds/{cfg.name}/{number}", number == rounds
            responses, distributions = f"{folder}/responses", f"{folder}/cache"
            paths = {"out": responses, "inputs.data": cfg.inputs.data, "inputs.drafter": drafter}
            respond(configured("respond", [*concerning("respond", settings), *_overrides(paths)]))
            paths = {"out": distributions, "inputs.responses": responses}
            cache(configured("cache", [*concerning("cache", settings), *_overrides(paths)]))
            series = last_series if is_last else f"{last_series}-round{number}"
            changed = {
                "inputs.drafter": drafter,
                "inputs.cache": distributions,
                "finetune.max_steps": steps * number // rounds - steps * (number - 1) // rounds,
                "out": cfg.out if is_last else f"{folder}/drafter",
                "series": series,
                "name": cfg.name if is_last else f"{series}-seed{cfg.seed}",
                "distillation.rounds": 0,
            }
            finetune(configured("finetune", [*overrides, *_overrides(changed)]))
            drafter = changed["out"]
    finally:
        HydraConfig.instance().cfg = hydra_config


def _overrides(values: dict[str, Any]) -> list[str]:
    return [override(key, value) for key, value in values.items()]
