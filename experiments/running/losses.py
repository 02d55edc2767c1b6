"""Build a loss from its config, after trying it on two positions, so that wrong settings fail before any compute."""

import hydra
import torch
from omegaconf import DictConfig

from drafter.losses.distributions import Target
from drafter.losses.objective import Loss, Positions, check_chunks, objective_of
from drafter.losses.trimmed import Kept, Trimmed

POSITIONS = Positions(torch.zeros(2, dtype=torch.long), torch.tensor([1, 0]))
KEPT = Kept.from_ids([0, 1], 6)
TRIMMED = Trimmed.from_logits(torch.zeros(2, 6), KEPT)  # for a drafter of two of six tokens
SAMPLED = TRIMMED._replace(kept=KEPT._replace(sampled_S=torch.tensor([3, 5])))  # for one trained with two more


def build_loss(section: DictConfig, trimmed: bool = False, sampled: bool = False) -> Loss:
    """Build the loss.

    Args:
        section: its config.
        trimmed: whether the drafter is trained with some tokens alone.
        sampled: whether some of them are sampled.

    Raises:
        ValueError: the loss does not take its settings, or it cannot be computed with some tokens alone.
    """
    loss: Loss = hydra.utils.instantiate(section)
    try_loss(loss, torch.zeros(2, 2))
    check_chunks(loss)
    if trimmed:
        try:
            try_loss(loss, SAMPLED if sampled else TRIMMED)
        except (AttributeError, RuntimeError) as problem:
            raise ValueError(
                f"the loss cannot be computed for a trimmed drafter ({problem}): see drafter.losses.trimmed."
                f"Trimmed, or give kept_tokens=null"
            ) from problem
    return loss


def try_loss(loss: Loss, target: Target) -> None:
    """Compute the loss once, at two positions over a vocabulary of two tokens, or over the rows that `target` keeps.

    Raises:
        ValueError: the loss does not take the settings that its config gives it.
    """
    rows = len(target.kept.rows) if isinstance(target, Trimmed) else 2
    try:
        objective_of(loss)(torch.zeros(2, rows), target, POSITIONS)
    except TypeError as problem:
        raise ValueError(f"loss: {problem}") from problem
