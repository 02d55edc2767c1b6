"""What a training step sees: sequences with a mask of the places to predict.

Shapes: B sequences, T tokens of the longest one, N predicted places of the whole batch, H the target's hidden size.
"""

from typing import Any, NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """B sequences, padded on the right to T tokens.

    `target_mask_BT` is True where the *next* token is to be predicted: L - 1 places in a packed sequence, one per
    response token in a response. `is_text_B` marks packed text, which keeps the next-token loss in distillation.
    `hidden_NH` holds the target's cached hidden states at the True places of the responses, in row-major order.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    target_mask_BT: torch.Tensor
    is_text_B: torch.Tensor
    hidden_NH: torch.Tensor | None = None


class Sequence(NamedTuple):
    """One sample: token ids, whose first `num_context` tokens are given and not predicted."""

    ids_T: np.ndarray
    num_context: int
    is_text: bool
    hidden_NH: torch.Tensor | None = None


def collate(samples: list[Sequence]) -> Batch:
    """Pad to the longest sample. Padding's ids are 0; the mask keeps them out of attention and loss."""
    length = max(len(sample.ids_T) for sample in samples)
    input_ids = torch.zeros(len(samples), length, dtype=torch.long)
    attention = torch.zeros(len(samples), length, dtype=torch.long)
    mask = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        end = len(sample.ids_T)
        input_ids[row, :end] = torch.from_numpy(sample.ids_T.astype(np.int64))
        attention[row, :end] = 1
        mask[row, sample.num_context - 1 : end - 1] = True
    hidden = [sample.hidden_NH for sample in samples if sample.hidden_NH is not None]
    is_text = torch.tensor([sample.is_text for sample in samples])
    return Batch(input_ids, attention, mask, is_text, torch.cat(hidden) if hidden else None)


def response_mask(batch: Batch) -> torch.Tensor:
    """The places whose next token is a response's, shape (B, T)."""
    return batch.target_mask_BT & ~batch.is_text_B[:, None]


def response_sequence(row: dict[str, Any], hidden_NH: torch.Tensor | None = None) -> Sequence:
    """A row of responses (see responses.SCHEMA) as a sample: the prompt is context, the response is predicted."""
    ids = np.array(row["prompt_ids"] + row["response_ids"])
    return Sequence(ids, len(row["prompt_ids"]), is_text=False, hidden_NH=hidden_NH)
