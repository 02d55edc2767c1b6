"""Build a loss from its config, after trying it on two positions, so that wrong settings fail before any compute."""

import hydra
import torch
from omegaconf import DictConfig

from drafter.losses.distributions import Target
from drafter.losses.objective import Loss, Positions, check_chunks, objective_of
from drafter.losses.trimmed import Kept, Trimmed

POSITIONS = Positions(torch.zeros(2, dtype=torch.long), torch.tensor([1, 0]))
TRIMMED = Trimmed.from_logits(torch.zeros(2, 3), Kept.from_ids([0, 1], 3))  # for a drafter of two of three tokens


def build_loss(section: DictConfig, trimmed: bool = False) -> Loss:
    """Build the loss.

    Args:
        section: its config.
        trimmed: whether the drafter proposes some tokens alone.

    Raises:
        ValueError: the loss does not take its settings, or it cannot be computed for a trimmed drafter.
    """
    loss: Loss = hydra.utils.instantiate(section)
    try_loss(loss, torch.zeros(2, 2))
    check_chunks(loss)
    if trimmed:
        try:
            try_loss(loss, TRIMMED)
        except (AttributeError, RuntimeError) as problem:
            raise ValueError(
                f"the loss cannot be computed for a trimmed drafter ({problem}): see drafter.losses.trimmed."
                f"Trimmed, or give kept_tokens=null"
            ) from problem
    return loss


def try_loss(loss: Loss, target: Target) -> None:
    """Compute the loss once, at two positions over a vocabulary of two tokens.

    Raises:
        ValueError: the loss does not take the settings that its config gives it.
    """
    try:
        objective_of(loss)(torch.zeros(2, 2), target, POSITIONS)
    except TypeError as problem:
        raise ValueError(f"loss: {problem}") from problem
