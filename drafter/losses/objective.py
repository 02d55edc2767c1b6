"""`Objective`: a training loss together with a declaration of what it needs beside the logits at a position.

Most losses are plain functions of two tensors of logits, with one value per position. Some need more: the positions
that follow (losses of a block of drafted tokens), or a mean over all positions of all ranks (TVD++ with batch
statistics). The output embedding and the loss are computed in chunks, on several ranks. A loss that needs more than one
position has to declare it, or its value would depend on how the batch is divided.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from drafter.losses.distributions import Target

# (logits_p_NV, logits_q_NV) -> values (N,), perhaps with further keyword arguments.
Loss = Callable[..., torch.Tensor]
Function = TypeVar("Function", bound=Loss)


class Positions(NamedTuple):
    """The response positions of a batch, one complete response after another.

    Attributes:
        tokens_N: the token of the response at each position.
        following_N: the number of positions of the same response that come after each position.
    """

    tokens_N: torch.Tensor
    following_N: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """A loss and its needs.

    Attributes:
        values: (logits_p_NV, logits_q_NV) -> values (N,). It also takes the keyword `positions` if `needs_positions`,
            and the keyword `mean_reward` if there is a `batch_mean`.
        needs_positions: whether it reads `Positions`.
        lookahead: the number of following positions of the same response that a value depends on.
        batch_mean: (logits_p_NV, logits_q_NV) -> statistics (N,). Their mean over all positions of all ranks is the
            keyword `mean_reward`. `with_mean` fills it in, which is required before the loss is computed in chunks.
    """

    values: Loss
    needs_positions: bool = False
    lookahead: int = 0
    batch_mean: Loss | None = None

    def __call__(
        self,
        logits_p_NV: torch.Tensor,
        logits_q_NV: Target,
        positions: Positions | None = None,
        mean_reward: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the value at each position, shape (N,).

        Without `mean_reward`, a loss with a `batch_mean` assumes that the given positions are the complete batch.

        Raises:
            ValueError: the loss needs positions and none are given.
        """
        given: dict[str, Any] = {}
        if self.needs_positions:
            if positions is None:
                raise ValueError("the loss depends on the following positions: pass `positions`")
            given["positions"] = positions
        if self.batch_mean is not None and mean_reward is not None:
            given["mean_reward"] = mean_reward
        return self.values(logits_p_NV, logits_q_NV, **given)

    def with_mean(self, mean_reward: torch.Tensor) -> "Objective":
        """Return the objective with the mean over the batch filled in, so that it can be computed in chunks."""
        return Objective(partial(self.values, mean_reward=mean_reward), self.needs_positions, self.lookahead)


def declares(objective: Callable[[Loss, Mapping[str, Any]], Objective]) -> Callable[[Function], Function]:
    """Declare what a loss function needs.

    Args:
        objective: (configured function, its settings by name) -> Objective.

    Returns:
        A decorator that attaches `objective` to the function, where `objective_of` finds it.
    """

    def attach(function: Function) -> Function:
        function.objective = objective  # type: ignore[attr-defined]
        return function

    return attach


def objective_of(loss: Loss | Objective) -> Objective:
    """Return a configured loss as an Objective.

    A function that needs more than the logits at a position declares it with `declares`. Of a function that declares
    nothing, it is assumed that a value depends on the logits at its position alone; `check_chunks` verifies that.
    """
    if isinstance(loss, Objective):
        return loss
    function: Any = loss
    settings: dict[str, Any] = {}
    while isinstance(function, partial):  # a loop, since partial() does not flatten Hydra's subclass of it
        function, settings = function.func, {**function.keywords, **settings}
    declared: Callable[[Loss, Mapping[str, Any]], Objective] | None = getattr(function, "objective", None)
    return declared(loss, settings) if declared else Objective(loss)


def check_chunks(loss: Loss | Objective) -> None:
    """Raise if an undeclared dependency makes the value at one position depend on the other positions.

    The loss is computed at eight random positions over sixteen tokens, once together and once in two halves. A loss
    that draws random numbers, and a loss that declares its needs, are not checked.

    Raises:
        ValueError: the values differ, so the loss needs something that it does not declare.
    """
    objective = objective_of(loss)
    if objective.needs_positions or objective.batch_mean is not None:
        return
    random = torch.Generator().manual_seed(0)
    logits_p, logits_q = (torch.randn(8, 16, generator=random, dtype=torch.float64) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        together, again = objective(logits_p, logits_q), objective(logits_p, logits_q)
        halves = [objective(logits_p[part], logits_q[part]) for part in (slice(0, 4), slice(4, 8))]
    if torch.equal(together, again) and not torch.allclose(torch.cat(halves), together):
        raise ValueError(
            "the loss at a position depends on the other positions that are computed with it, so that training would "
            "depend on the chunk size: declare what it needs, as drafter.losses.tvdpp does "
            "(see drafter/losses/objective.py)"
        )
