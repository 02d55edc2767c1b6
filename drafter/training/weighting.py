"""What each response position weighs in the distillation loss: a function of the predicted positions and their batch.

Weights are relative: the loss is their weighted mean over all ranks. They carry no gradient. Shapes: N positions.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from drafter.data.batches import Batch, response_mask
from drafter.losses.block_losses import windowed_products
from drafter.losses.chunked import Head, Predicted
from drafter.losses.divergences import kld
from drafter.losses.objective import Objective, Positions
from drafter.models.inspection import hidden_states

Weighting = Callable[..., torch.Tensor]  # (predicted, batch) -> weights_N


def uniform(predicted: Predicted, batch: Batch) -> torch.Tensor:
    """One each: the paper's mean over positions."""
    return torch.ones(len(predicted.hidden_NH), device=predicted.hidden_NH.device)


def prefix_confidence(
    predicted: Predicted, batch: Batch, *, num_speculative_tokens: int = 3, smoothing: float = 0.5
) -> torch.Tensor:
    """D-PACE: a position weighs what its token adds to the expected accepted length (arXiv 2605.18810, equations 7, 8).

    In a block that starts at s, the token at s + j weighs sum_{m >= j} prod_{i <= m} c_{s+i}, where the confidence is
    c = (1 - smoothing) p(x) + smoothing for the token x that the target wrote. That paper's drafters have fixed blocks;
    ours can start a block anywhere, so a position adds up its weights in every block that it is in.

    Raises:
        ValueError: smoothing is not in (0, 1].
    """
    if not 0 < smoothing <= 1:
        raise ValueError(f"weighting.smoothing is {smoothing}, must be above 0, at most 1")

    def confidence(logits_p_NV: torch.Tensor, _: torch.Tensor, *, positions: Positions) -> torch.Tensor:
        return logits_p_NV.float().softmax(-1).gather(-1, positions.tokens_N[:, None])[:, 0]

    confidence_N = (1 - smoothing) * predicted.values(Objective(confidence, needs_positions=True)) + smoothing
    reach_NG = windowed_products(confidence_N, predicted.positions.following_N, num_speculative_tokens)
    value_NG = reach_NG.flip(1).cumsum(1).flip(1)
    weights_N = torch.zeros_like(confidence_N)
    for step in range(min(num_speculative_tokens, len(weights_N))):
        # Where a block is cut by its response's end, the value is zero.
        weights_N[step:] += value_NG[: len(weights_N) - step, step]
    return weights_N


def furthest_behind(
    predicted: Predicted, batch: Batch, *, reference: PreTrainedModel, share: float = 0.4
) -> torch.Tensor:
    """AdaSPEC: one for the `share` of this rank's positions where the drafter is furthest behind a reference drafter.

    Behind is KL(q || p) minus KL(q || reference) (arXiv 2510.19779, section 3.2); the reference is a drafter distilled
    before. What even it cannot learn is left out, and so is what the drafter knows already.

    Raises:
        ValueError: share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"weighting.share is {share}, must be above 0, at most 1")
    reference.to(predicted.hidden_NH.device)
    with torch.no_grad():
        hidden_BTH = hidden_states(reference, batch.input_ids_BT, batch.attention_mask_BT)
    mask_BT = response_mask(batch)
    theirs = predicted._replace(hidden_NH=hidden_BTH[mask_BT], head=Head.of(reference.get_output_embeddings()))
    behind_N = predicted.values(kld) - theirs.values(kld)
    chosen = behind_N.topk(round(share * len(behind_N))).indices
    return torch.zeros_like(behind_N).index_fill_(0, chosen, 1.0)
