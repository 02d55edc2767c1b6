"""What a training loss needs beside the logits at its own positions.

Most losses are plain functions of two tensors of logits, with one value for each position. Some need more: the
positions that follow (losses of a whole block of drafts), or a mean over all positions of all ranks (TVD++ with the
statistics of the batch). The head and the loss are computed in chunks, on several ranks; a loss that needs more than
its chunk has to say so, or its value would depend on how the batch is cut.

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
    """The response positions of a batch, one whole response after another.

    `tokens_N` is the token that the target wrote at each position. `following_N` is the number of positions of the same
    response that come after it.
    """

    tokens_N: torch.Tensor
    following_N: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """A loss and what it needs.

    Attributes:
        values: (logits_p_NV, logits_q_NV) -> values (N,). It also takes the keyword `positions` if `needs_positions`,
            and the keyword `mean_reward` if there is a `batch_mean`.
        needs_positions: whether it reads `Positions`.
        lookahead: the number of positions after its own that a value depends on, within one response.
        batch_mean: (logits_p_NV, logits_q_NV) -> statistics (N,). Their mean over all positions of all ranks is the
            keyword `mean_reward`.
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

        Without `mean_reward`, a loss with a `batch_mean` takes the given positions for the whole batch.

        Raises:
            ValueError: the loss needs positions and there are none.
        """
        given: dict[str, Any] = {}
        if self.needs_positions:
            if positions is None:
                raise ValueError("this loss looks past its own position: it needs `positions`")
            given["positions"] = positions
        if self.batch_mean is not None and mean_reward is not None:
            given["mean_reward"] = mean_reward
        return self.values(logits_p_NV, logits_q_NV, **given)

    def with_mean(self, mean_reward: torch.Tensor) -> "Objective":
        """Return the objective with the batch's mean filled in, so that it can be computed in chunks."""
        return Objective(partial(self.values, mean_reward=mean_reward), self.needs_positions, self.lookahead)


def declares(objective: Callable[[Loss, Mapping[str, Any]], Objective]) -> Callable[[Function], Function]:
    """Declare what a loss function needs.

    Args:
        objective: (the configured function, its settings by name) -> its Objective.
    """

    def attach(function: Function) -> Function:
        function.objective = objective  # type: ignore[attr-defined]
        return function

    return attach


def objective_of(loss: Loss | Objective) -> Objective:
    """Return a configured loss as an Objective.

    A function that needs more than its own positions says so with `declares`. A function that declares nothing is taken
    for one whose value at a position depends on the logits there alone; `check_chunks` refuses it if that is not so.
    """
    if isinstance(loss, Objective):
        return loss
    function: Any = loss
    settings: dict[str, Any] = {}
    while isinstance(function, partial):  # Hydra's partial objects are a subclass, which partial() does not flatten
        function, settings = function.func, {**function.keywords, **settings}
    declared: Callable[[Loss, Mapping[str, Any]], Objective] | None = getattr(function, "objective", None)
    return declared(loss, settings) if declared else Objective(loss)


def check_chunks(loss: Loss | Objective) -> None:
    """Refuse a loss whose value at a position depends on which other positions are computed with it.

    Eight positions over sixteen tokens are computed together, and in two halves.

    Raises:
        ValueError: the values differ, so the loss needs something that it does not declare.
    """
    objective = objective_of(loss)
    random = torch.Generator().manual_seed(0)
    logits_p, logits_q = (torch.randn(8, 16, generator=random, dtype=torch.float64) for _ in range(2))
    if objective.needs_positions or objective.batch_mean is not None:
        return  # it declares what it needs
    with torch.random.fork_rng(devices=[]):
        whole, again = objective(logits_p, logits_q), objective(logits_p, logits_q)
        halves = [objective(logits_p[part], logits_q[part]) for part in (slice(0, 4), slice(4, 8))]
    if torch.equal(whole, again) and not torch.allclose(torch.cat(halves), whole):
        raise ValueError(
            "the loss gives a position another value when other positions are computed with it, so that training "
            "would depend on the chunk size: declare what it needs, as drafter.losses.tvdpp does "
            "(see drafter/losses/objective.py)"
        )
