"""Assemble the batches of a training step: sequences with a mask of the positions to predict.

Shapes: B sequences, T tokens of the longest one, N predicted positions of the batch, H the target's hidden size.
"""

import math
from collections.abc import Sequence as Sequences
from typing import Any, NamedTuple

import numpy as np
import torch

from drafter.losses.distributions import Drawn, Sparse


class Batch(NamedTuple):
    """B sequences, padded on the right to T tokens.

    Attributes:
        target_mask_BT: True where the *next* token is to be predicted: L - 1 positions in a packed sequence of L
            tokens, one per response token in a response.
        is_text_B: marks packed text, which keeps the next-token loss in distillation.
        temperature_B: the temperature at which a response was drawn, in millionths; -1 for text. It is an integer
            because training in bfloat16 would round a float.
        cached_N: the target's cached hidden states or sparse distributions at the True positions of the responses, in
            row-major order.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    target_mask_BT: torch.Tensor
    is_text_B: torch.Tensor
    temperature_B: torch.Tensor
    cached_N: torch.Tensor | Sparse | None = None  # hidden states (N, H), or sparse distributions


class Sequence(NamedTuple):
    """One sample. Its first `num_context` tokens are context and are not predicted."""

    ids_T: np.ndarray
    num_context: int
    is_text: bool
    cached_N: torch.Tensor | Drawn | None = None
    temperature: float = math.nan


def collate(samples: list[Sequence]) -> Batch:
    """Pad samples to the longest one. Padding has the id 0, and the masks exclude it from attention and loss."""
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
        input_ids,
        attention,
        mask,
        is_text,
        torch.tensor(millionths),
        _join_cached([sample.cached_N for sample in samples]),
    )


def check_tokens(ids: np.ndarray, vocabulary: int | None, where: object) -> None:
    """Refuse ids for which the models' embeddings have no row. On a GPU the lookup would fail without a message.

    Args:
        ids: token ids.
        vocabulary: rows of the smaller embedding, or None to accept any id.
        where: the file or directory that the ids were read from, for the error.

    Raises:
        ValueError: an id is too large; names `where` and the largest id.
    """
    if vocabulary is not None and len(ids) and (largest := int(ids.max())) >= vocabulary:
        raise ValueError(
            f"{where} has the token id {largest}, and the models' embeddings have {vocabulary} rows: it is damaged, or "
            f"was made with another tokenizer"
        )


def by_budget(lengths: Sequences[int], budget: int) -> list[list[int]]:
    """Return indices sorted by length, in batches of at most `budget` tokens with padding, or of a single index."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def response_mask(batch: Batch) -> torch.Tensor:
    """Return the mask of the positions whose next token belongs to a response, shape (B, T)."""
    return batch.target_mask_BT & ~batch.is_text_B[:, None]


def next_tokens(batch: Batch) -> torch.Tensor:
    """Return the token after each position, shape (B, T). The last column is arbitrary and never predicted."""
    return batch.input_ids_BT.roll(-1, dims=1)


def response_sequence(row: dict[str, Any], cached_N: torch.Tensor | Drawn | None = None) -> Sequence:
    """Return a sample from a row of responses (see responses.COLUMNS), with the prompt as its context."""
    ids = np.concatenate([row["prompt_ids"], row["response_ids"]])
    return Sequence(ids, len(row["prompt_ids"]), False, cached_N, row["temperature"])


def _join_cached(parts: list[torch.Tensor | Drawn | None]) -> torch.Tensor | Sparse | None:
    """Concatenate what is cached for the samples. Packed text has nothing."""
    drawn = [part for part in parts if isinstance(part, Drawn)]
    if drawn:
        return Drawn.cat(drawn).weighted()
    hidden = [part for part in parts if isinstance(part, torch.Tensor)]
    return torch.cat(hidden) if hidden else None
