"""Hold the weights of copying heads as they were computed, while all other weights are trained.

The first training steps are large, and would undo what `models.copying` computed before it counts for the loss.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from drafter.models.copying import copying_weights


class _Held(NamedTuple):
    """A part of a weight, and its values."""

    weight: nn.Parameter
    part: tuple[slice, ...]
    values: torch.Tensor


def hold(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Give held weights no gradient, and their values again after each step, which may have decayed them.

    Raises:
        ValueError: the model is sharded.
    """
    held = [_Held(weight, part, weight.detach()[part].clone()) for weight, part in copying_weights(model)]
    if any(isinstance(one.weight, DTensor) for one in held):
        raise ValueError(
            "a drafter with copying heads cannot be sharded: leave out trainer=fsdp2, or give another init"
        )

    def restore(*_: Any) -> None:
        with torch.no_grad():
            for one in held:
                one.weight[one.part] = one.values

    for one in held:
        if one.weight.requires_grad:
            one.weight.register_hook(_without(one.part))
    if held:
        optimizer.register_step_post_hook(restore)


def _without(part: tuple[slice, ...]) -> Any:
    def clear(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[part] = 0
        return gradient

    return clear
