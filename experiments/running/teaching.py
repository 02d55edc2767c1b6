"""The target that a drafter is pretrained on, beside the text: the settings `pretrain.distillation`."""

from typing import Any

import hydra
from omegaconf import DictConfig

from drafter.losses.objective import objective_of
from drafter.models.loading import load_target
from drafter.models.sharding import check_parallel
from drafter.training.frozen import FrozenTarget
from drafter.training.modules import Teacher
from experiments.running.identity import named_values
from experiments.running.inputs import target_source
from experiments.running.losses import build_loss

LOSS = "loss@pretrain.distillation.loss"  # the config group


def check_teacher(cfg: DictConfig, trimmed: bool) -> None:
    """Raise on a distillation that cannot be computed on text.

    Args:
        cfg: the config of the stage.
        trimmed: whether the drafter is trained with some tokens alone.

    Raises:
        ValueError: names the setting.
    """
    how = cfg.pretrain.distillation
    if not 0 <= how.weight <= 1:
        raise ValueError(f"pretrain.distillation.weight is {how.weight}, must be from 0 to 1")
    if how.weight:
        check_parallel(cfg.target.parallel, "fsdp", "pretrain")
        loss = build_loss(how.loss, trimmed, sampled=bool(cfg.pretrain.sampled_tokens))
        if objective_of(loss).needs_positions:
            raise ValueError(
                "pretrain.distillation.loss is one of a block of tokens that the target generated: the "
                "text is not, so give another one, such as kld"
            )


def teaching_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of the distillation that determine the result; none if pretraining does not distil."""
    how = cfg.pretrain.distillation
    if not how.weight:
        return {}
    taught = {"weight": how.weight, "loss": named_values(how.loss, LOSS)}
    return {"distillation": taught, "target_dtype": cfg.target.dtype}


def build_teacher(cfg: DictConfig) -> Teacher | None:
    """Load the target if pretraining distils it."""
    how = cfg.pretrain.distillation
    if not how.weight:
        return None
    target = FrozenTarget(load_target(target_source(cfg)), cfg.target.parallel == "fsdp", how.batch_tokens)
    return Teacher(target, hydra.utils.instantiate(how.loss), how.weight)
