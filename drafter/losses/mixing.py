"""A weighted sum of other losses, as a loss.

The arguments are those of the losses in `divergences`.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from drafter.losses.distributions import Target
from drafter.losses.objective import Loss, Objective, Positions, declares, objective_of


def _mix_objective(_: Loss, settings: Mapping[str, Any]) -> Objective:
    """Return an objective with the union of the needs of the parts.

    Raises:
        ValueError: several parts need a `batch_mean`.
    """
    parts = [objective_of(part) for part in settings["parts"]]
    statistics = [part.batch_mean for part in parts if part.batch_mean is not None]
    if len(statistics) > 1:
        raise ValueError("loss.parts has several TVD++ with batch statistics, but a mix can have one mean reward only")
    return Objective(
        partial(mix, weights=settings["weights"], parts=parts),
        any(part.needs_positions for part in parts),
        max(part.lookahead for part in parts) if parts else 0,
        statistics[0] if statistics else None,
    )


@declares(_mix_objective)
def mix(
    logits_p_NV: torch.Tensor,
    logits_q_NV: Target,
    *,
    weights: Sequence[float],
    parts: Sequence[Loss | Objective],
    positions: Positions | None = None,
    mean_reward: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted sum of other losses, each with its own settings.

    Raises:
        ValueError: the numbers of weights and parts differ, or there are none.
    """
    if len(weights) != len(parts) or not parts:
        raise ValueError(f"loss.weights has {len(weights)} numbers for {len(parts)} loss.parts")
    values = [
        weight * objective_of(part)(logits_p_NV, logits_q_NV, positions, mean_reward)
        for weight, part in zip(weights, parts, strict=True)
    ]
    return torch.stack(values).sum(0)
