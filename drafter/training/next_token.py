"""The next-token loss: cross-entropy of packed text, in chunks of positions.

Shapes: N positions, n of a chunk, V vocabulary, H hidden size.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from drafter.data.batches import Batch, next_tokens
from drafter.losses.chunked import Head, chunked_sum
from drafter.losses.trimmed import Kept
from drafter.models.inspection import hidden_states


def next_token_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy in nats over the predicted positions."""
    hidden_BTH, mask_BT = hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT), batch.target_mask_BT
    return next_token_mean(model, hidden_BTH[mask_BT], next_tokens(batch)[mask_BT])


def next_token_mean(
    model: PreTrainedModel, hidden_NH: torch.Tensor, tokens_N: torch.Tensor, kept: Kept | None = None
) -> torch.Tensor:
    """Return the cross-entropy in nats, the mean over those of the N next tokens that the model can propose."""
    if kept is not None:
        kept_N = kept.mask(tokens_N)
        hidden_NH, tokens_N = hidden_NH[kept_N], tokens_N[kept_N]
    return next_token_sum(model, hidden_NH, tokens_N, kept) / max(len(tokens_N), 1)


def next_token_sum(
    model: PreTrainedModel, hidden_NH: torch.Tensor, tokens_N: torch.Tensor, kept: Kept | None = None
) -> torch.Tensor:
    """Return the cross-entropy of the next tokens in nats, summed over N positions.

    If some tokens are `kept`, the model's distribution is that over them, and all next tokens have to be among them. If
    others are sampled, the loss of any other token is -log p(any other token): a lower bound of its cross-entropy.
    """
    places_N = tokens_N if kept is None else kept.place_V[tokens_N]

    def values(logits_nV: torch.Tensor, rows: slice) -> torch.Tensor:
        logits_nV = logits_nV.float() if kept is None else kept.outcomes(logits_nV.float())
        return F.cross_entropy(logits_nV, places_N[rows], reduction="none")

    return chunked_sum(values, hidden_NH, Head.from_module(model.get_output_embeddings(), kept))
