"""Optimizers, and schedules of their learning rate.

An optimizer is a function of a model and a learning rate; a schedule is a function of the step and the number of steps,
which returns the factor of the learning rate.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from drafter.training.held import hold

Schedule = Callable[[int, int], float]


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.1, betas: Sequence[float] = (0.9, 0.95)
) -> torch.optim.Optimizer:
    """Build AdamW, with weight decay for matrices alone."""
    matrices, vectors = _by_dimension(parameter for parameter in model.parameters() if parameter.requires_grad)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(betas[0], betas[1]), fused=True)


def muon(
    model: Any,
    learning_rate: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    betas: Sequence[float] = (0.9, 0.95),
) -> torch.optim.Optimizer:
    """Build Muon for the matrices between the embeddings, and AdamW for the embeddings and all vectors.

    Muon makes the singular values of each update equal (Jordan, https://kellerjordan.github.io/posts/muon/). Its
    updates have the root mean square of AdamW's (arXiv 2502.16982), so that a learning rate suits both.

    An update needs complete matrices, so the model must not be sharded.
    """
    embeddings = {id(one.weight) for one in (model.get_input_embeddings(), model.get_output_embeddings())}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [one for one in trained if one.ndim == 2 and id(one) not in embeddings]
    others = [one for one in trained if one.ndim != 2 or id(one) in embeddings]
    tables, vectors = _by_dimension(others)
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return Together(
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=learning_rate, betas=(betas[0], betas[1]), fused=True),
    )


def _by_dimension(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices, and the vectors."""
    every = list(parameters)
    return [one for one in every if one.ndim >= 2], [one for one in every if one.ndim < 2]


class Together(torch.optim.Optimizer):
    """Several optimizers as one, each for its own parameters."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        groups = [group for one in optimizers for group in one.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.param_groups = groups  # the very groups, so that a schedule changes each optimizer's learning rate

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with each optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for one in self.optimizers:
            one.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all, in order."""
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of all, in order."""
        for one, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            one.load_state_dict(state)
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]


def cosine(step: int, steps: int, warmup: float = 0.02, end: float = 0.1) -> float:
    """Return a factor that rises linearly to 1 and then follows a cosine down to `end`.

    Args:
        step: the number of steps taken.
        steps: the number of steps of the training.
        warmup: steps of the rise, or its share of all steps if it is below 1.
        end: the factor at the end.
    """
    rise = _steps(warmup, steps)
    if step < rise:
        return (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, steps - rise))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def trapezoid(step: int, steps: int, warmup: float = 0.02, decay: float = 0.2, end: float = 0.0) -> float:
    """Return a factor that rises linearly to 1, stays there, and falls linearly to `end` ("WSD", arXiv 2404.06395).

    Without decay, the training may be stopped at any step, and prolonged by another that starts from its model.

    Args:
        step: the number of steps taken.
        steps: the number of steps of the training.
        warmup, decay: steps of the rise and of the fall, or their share of all steps if they are below 1.
        end: the factor at the end.
    """
    rise, fall = _steps(warmup, steps), _steps(decay, steps) if decay else 0
    if step < rise:
        return (step + 1) / rise
    remaining = steps - step
    return 1.0 if remaining >= fall else end + (1 - end) * max(0, remaining) / fall


def _steps(value: float, steps: int) -> int:
    """Return a number of steps, at least 1, that is given as such or as a share of all."""
    return max(1, round(value * steps if value < 1 else value))


class Optimization(NamedTuple):
    """How a model is trained: the optimizer and the schedule of its learning rate."""

    optimizer: Callable[[Any, float], torch.optim.Optimizer] = adamw
    schedule: Schedule = cosine

    def configure(self, model: nn.Module, learning_rate: float, steps: int) -> dict[str, Any]:
        """Return the optimizer and its schedule, as Lightning takes them."""
        optimizer = self.optimizer(model, learning_rate)
        hold(model, optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
