"""Weightings of the response positions in the distillation loss: functions of the predicted positions and the batch.

Weights are relative, since the loss is a weighted mean over all ranks. They have no gradient.

Shapes: N positions, G tokens of a block (gamma).
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from drafter.data.batches import Batch, response_mask
from drafter.data.forward import hidden_at
from drafter.losses.block_losses import windowed_products
from drafter.losses.chunked import Head, Predicted
from drafter.losses.distributions import Target, at_tokens, outcomes
from drafter.losses.divergences import kld
from drafter.losses.objective import Objective, Positions

Weighting = Callable[..., torch.Tensor]  # (predicted, batch) -> weights_N


def uniform(predicted: Predicted, batch: Batch) -> torch.Tensor:
    """Return a weight of one for each position: the paper's mean over positions."""
    return torch.ones(len(predicted.hidden_NH), device=predicted.hidden_NH.device)


def dpace(
    predicted: Predicted, batch: Batch, *, num_speculative_tokens: int = 3, smoothing: float = 0.5
) -> torch.Tensor:
    """Weight each position by its token's contribution to the expected accepted length (D-PACE).

    Source: arXiv 2605.18810, equations 7 and 8. In a block that starts at s, the weight of the token at s + j is
    sum_{m >= j} prod_{i <= m} c_{s+i}, where c = (1 - smoothing) p(x) + smoothing is the drafter's confidence in the
    response's token x. In that paper, blocks start at fixed positions. Here a block may start anywhere, so the weight
    of a position is the sum of its weights in all blocks that contain it.

    Raises:
        ValueError: smoothing is not in (0, 1], or num_speculative_tokens is below 1.
    """
    if not 0 < smoothing <= 1:
        raise ValueError(f"weighting.smoothing is {smoothing}, must be above 0 and at most 1")

    def confidence(logits_p_NV: torch.Tensor, target: Target, *, positions: Positions) -> torch.Tensor:
        p_NV = outcomes(logits_p_NV.float(), target).softmax(-1)
        return at_tokens(p_NV, target, positions.tokens_N, absent=0.0)

    confidence_N = (1 - smoothing) * predicted.values(Objective(confidence, needs_positions=True)) + smoothing
    accepted_NG = windowed_products(confidence_N, predicted.positions.following_N, num_speculative_tokens)
    value_NG = accepted_NG.flip(1).cumsum(1).flip(1)
    weights_N = torch.zeros_like(confidence_N)
    for step in range(min(num_speculative_tokens, len(weights_N))):
        # The value is zero where a block would continue past the end of its response.
        weights_N[step:] += value_NG[: len(weights_N) - step, step]
    return weights_N


def adaspec(
    predicted: Predicted,
    batch: Batch,
    *,
    reference: PreTrainedModel,
    share: float = 0.4,
    batch_tokens: int | None = None,
) -> torch.Tensor:
    """Select the positions where the drafter lags most behind a reference drafter (AdaSPEC).

    Source: arXiv 2510.19779, section 3.2. The weight is 1 for the `share` of this rank's positions with the largest
    KL(q || p) - KL(q || reference), and 0 for the others. This leaves out the positions that even the reference cannot
    predict, and those that the drafter predicts as well already.

    Args:
        reference: a drafter that was distilled before.
        share: the fraction of positions that are selected.
        batch_tokens: the most tokens of a forward pass of the reference; see `data.forward`.

    Raises:
        ValueError: share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"weighting.share is {share}, must be above 0 and at most 1")
    reference.to(predicted.hidden_NH.device)
    with torch.no_grad():
        hidden_NH = hidden_at(reference, batch, response_mask(batch), batch_tokens)
    head = Head.from_module(reference.get_output_embeddings(), predicted.kept)
    excess_N = predicted.values(kld) - predicted._replace(hidden_NH=hidden_NH, head=head).values(kld)
    selected = excess_N.topk(round(share * len(excess_N))).indices
    return torch.zeros_like(excess_N).index_fill_(0, selected, 1.0)
