"""On-policy distillation: rounds of answers by the drafter of the round before, judged by the target.

DistillSpec (arXiv 2310.08461) and GKD (arXiv 2306.13649) let the drafter write what it is trained on, since that is
what it drafts when it serves. Here each round is a distillation set, its cache and a finetuning of their own, so that
all that holds for those holds for these: resumable, on any number of ranks, and each with its manifest.
"""

from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import cache, respond
from experiments.composing import concerning, configured, first_key


def run(cfg: DictConfig, finetune: Callable[[DictConfig], None]) -> None:
    """`distillation.rounds` rounds -> ${root}/rounds/<name>/<round>, the last one's drafter -> cfg.out.

    Args:
        cfg: a finetuning's config.
        finetune: one finetuning on a set that is there.
    """
    before = HydraConfig.instance().cfg
    given = [override for override in HydraConfig.get().overrides.task if first_key(override) != "distillation"]
    given.append(f"distillation={HydraConfig.get().runtime.choices['distillation']}")
    rounds, steps, drafter = cfg.distillation.rounds, cfg.finetune.max_steps, cfg.inputs.drafter
    OmegaConf.resolve(cfg)
    try:
        for number in range(1, rounds + 1):
            folder, last = f"{cfg.root}/rounds/{cfg.name}/{number}", number == rounds
            answers, judged = (configured(name, concerning(name, given)) for name in ("respond", "cache"))
            answers.out, answers.inputs.data, answers.inputs.drafter = f"{folder}/responses", cfg.inputs.data, drafter
            judged.out, judged.inputs.responses = f"{folder}/cache", answers.out
            trained = cfg.copy()
            trained.inputs.drafter, trained.inputs.cache = drafter, judged.out
            trained.finetune.max_steps = steps * number // rounds - steps * (number - 1) // rounds
            trained.out = cfg.out if last else f"{folder}/drafter"
            trained.name = cfg.name if last else f"{cfg.name}-round{number}"
            respond.main(answers)
            cache.main(judged)
            finetune(trained)
            drafter = trained.out
    finally:
        HydraConfig.instance().cfg = before
