"""What a training step sees: sequences with a mask of the places to predict.

Shapes: B sequences, T tokens of the longest one, N predicted places of the whole batch, H the target's hidden size.
"""

import math
from collections.abc import Sequence as Sequences
from typing import Any, NamedTuple

import numpy as np
import torch

from drafter.losses.distributions import Drawn, Sparse


class Batch(NamedTuple):
    """B sequences, padded on the right to T tokens.

    `target_mask_BT` is True where the *next* token is to be predicted: L - 1 places in a packed sequence, one per
    response token in a response. `is_text_B` marks packed text, which keeps the next-token loss in distillation.
    `temperature_B` is what a response was drawn at, in millionths; an integer, since training in bfloat16 would round a
    float. Text has none: -1.
    `cached_N` holds what is cached of the target at the True places of the responses, in row-major order.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    target_mask_BT: torch.Tensor
    is_text_B: torch.Tensor
    temperature_B: torch.Tensor
    cached_N: torch.Tensor | Sparse | None = None  # hidden states (N, H), or sparse distributions


class Sequence(NamedTuple):
    """One sample: token ids, whose first `num_context` tokens are given and not predicted."""

    ids_T: np.ndarray
    num_context: int
    is_text: bool
    cached_N: torch.Tensor | Drawn | None = None
    temperature: float = math.nan


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
    is_text = torch.tensor([sample.is_text for sample in samples])
    millionths = [round(1e6 * sample.temperature) if sample.temperature >= 0 else -1 for sample in samples]
    return Batch(
        input_ids, attention, mask, is_text, torch.tensor(millionths), _joined([sample.cached_N for sample in samples])
    )


def check_tokens(ids: np.ndarray, vocabulary: int | None, where: object) -> None:
    """Refuse ids for which the models' embeddings have no row; on a GPU the lookup would fail without a message.

    Args:
        vocabulary: rows of the smaller embedding; None: any id will do.
        where: what the ids were read from.

    Raises:
        ValueError: names it, and the largest id.
    """
    if vocabulary is not None and len(ids) and (largest := int(ids.max())) >= vocabulary:
        raise ValueError(
            f"{where} has the token id {largest}, and the models' embeddings have {vocabulary} rows: it is damaged, or "
            f"was made with another tokenizer"
        )


def by_budget(lengths: Sequences[int], budget: int) -> list[list[int]]:
    """Indices sorted by length, in batches that take at most `budget` tokens, padding included, or hold one index."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def response_mask(batch: Batch) -> torch.Tensor:
    """The places whose next token is a response's, shape (B, T)."""
    return batch.target_mask_BT & ~batch.is_text_B[:, None]


def next_tokens(batch: Batch) -> torch.Tensor:
    """The token after each position, shape (B, T); the last column is arbitrary, and never predicted."""
    return batch.input_ids_BT.roll(-1, dims=1)


def response_sequence(row: dict[str, Any], cached_N: torch.Tensor | Drawn | None = None) -> Sequence:
    """A row of responses (see responses.COLUMNS) as a sample: the prompt is context, the response is predicted."""
    ids = np.concatenate([row["prompt_ids"], row["response_ids"]])
    return Sequence(ids, len(row["prompt_ids"]), False, cached_N, row["temperature"])


def _joined(parts: list[torch.Tensor | Drawn | None]) -> torch.Tensor | Sparse | None:
    """What is cached of all samples, one after the other; packed text has nothing."""
    drawn = [part for part in parts if isinstance(part, Drawn)]
    if drawn:
        return Drawn.cat(drawn).weighted()
    hidden = [part for part in parts if isinstance(part, torch.Tensor)]
    return torch.cat(hidden) if hidden else None
