"""Assemble the batches of a training step: sequences with a mask of the positions to predict.

Shapes: B sequences, T tokens of the longest one, N predicted positions of the batch, H the target's hidden size.
"""

import itertools
import math
from collections.abc import Sequence as Sequences
from typing import Any, NamedTuple

import numpy as np
import torch

from drafter.losses.distributions import Drawn, Sparse


class States(NamedTuple):
    """What an exact cache has of the target at N positions.

    Attributes:
        hidden_NH: the last hidden states.
        log_z_N: the logarithm of the normaliser: log q(x) = logit(x) - log Z at temperature 1.
        top_N: the most likely token. It and log Z are None if an earlier version made the cache.
    """

    hidden_NH: torch.Tensor
    log_z_N: torch.Tensor | None = None
    top_N: torch.Tensor | None = None

    @classmethod
    def cat(cls, parts: "list[States]") -> "States":
        """Concatenate the positions of all parts."""
        known = all(part.log_z_N is not None for part in parts)
        return cls(*(torch.cat(field) for field in list(zip(*parts, strict=True))[: 3 if known else 1]))

    def first(self, count: int) -> "States":
        """Return the first `count` positions."""
        return States(*[field[:count] for field in self if field is not None])


class Batch(NamedTuple):
    """B sequences, padded on the right to T tokens.

    Attributes:
        target_mask_BT: True where the *next* token is to be predicted: L - 1 positions in a packed sequence of L
            tokens, one per response token in a response.
        is_text_B: marks packed text, which keeps the next-token loss in distillation.
        temperature_B: the temperature at which a response was drawn, in millionths; -1 for text. It is an integer
            because training in bfloat16 would round a float.
        cached_N: the target's cached states or sparse distributions at the True positions of the responses, in
            row-major order.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    target_mask_BT: torch.Tensor
    is_text_B: torch.Tensor
    temperature_B: torch.Tensor
    cached_N: States | Sparse | None = None

    def uncached(self, device: torch.device) -> "Batch":  # a method named `to` would be called by Lightning
        """Return the sequences on a device, without what is cached of the target."""
        return Batch._make([*(part.to(device) for part in self if isinstance(part, torch.Tensor)), None])


class Sequence(NamedTuple):
    """One sample.

    Attributes:
        ids_T: the tokens.
        num_context: the number of tokens at the beginning that are given and not predicted.
        is_text: whether it is packed text.
        cached_N: what is cached of the target at the N predicted tokens.
        temperature: at which the responses were drawn.
        turns: in a conversation, the numbers of tokens of its parts: given, predicted, given, predicted, … None means
            that all tokens after the context are predicted.
    """

    ids_T: np.ndarray
    num_context: int
    is_text: bool
    cached_N: States | Drawn | None = None
    temperature: float = math.nan
    turns: Sequences[int] | None = None

    def predicted(self) -> list[tuple[int, int]]:
        """Return the start and end of each part that is predicted.

        >>> Sequence(np.arange(9), 2, False, turns=[2, 3, 1, 3]).predicted()
        [(2, 5), (6, 9)]
        """
        if self.turns is None:
            return [(self.num_context, len(self.ids_T))]
        ends = list(itertools.accumulate(self.turns))
        return list(zip(ends[0::2], ends[1::2], strict=True))


def cut(sequence: Sequence, length: int) -> Sequence:
    """Return the first `length` tokens of a sample, with what is predicted and cached there.

    >>> cut(Sequence(np.arange(9), 2, False, turns=[2, 3, 1, 3]), 7).turns
    [2, 3, 1, 1]
    """
    if len(sequence.ids_T) <= length:
        return sequence
    kept = sequence._replace(ids_T=sequence.ids_T[:length], num_context=min(sequence.num_context, length))
    if sequence.turns is not None:
        ends = np.minimum(np.cumsum(sequence.turns), length)
        kept = kept._replace(turns=np.diff(ends, prepend=0).tolist())
    count = sum(end - start for start, end in kept.predicted())
    return kept if kept.cached_N is None else kept._replace(cached_N=kept.cached_N.first(count))


def collate(samples: list[Sequence]) -> Batch:
    """Pad samples to the longest one. Padding has the id 0, and the masks exclude it from attention and loss."""
    shape = len(samples), max(len(sample.ids_T) for sample in samples)
    input_ids, attention = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.ids_T)
        input_ids[row, :length] = torch.from_numpy(sample.ids_T.astype(np.int64))
        attention[row, :length] = 1
        for start, end in sample.predicted():
            mask[row, start - 1 : end - 1] = True
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


def response_sequence(row: dict[str, Any], cached_N: States | Drawn | None = None) -> Sequence:
    """Return a sample from a row of responses (see responses.COLUMNS), whose responses are predicted.

    Rows that an earlier version wrote have no `turns`: they are a prompt and one response.
    """
    prompt_ids, response_ids = row["prompt_ids"], row["response_ids"]
    turns = [int(length) for length in row.get("turns", (len(prompt_ids), len(response_ids)))]
    given = np.split(prompt_ids, np.cumsum(turns[0::2])[:-1])
    generated = np.split(response_ids, np.cumsum(turns[1::2])[:-1])
    ids = np.concatenate([part for turn in zip(given, generated, strict=True) for part in turn])
    return Sequence(ids, turns[0], False, cached_N, row["temperature"], turns)


def responses_of(mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row and the number of positions of each response, shapes (R,) and (R,), in row-major order.

    The positions of a response are consecutive. Between two responses of a row there is at least one other position.

    >>> [values.tolist() for values in responses_of(torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 0, 0]]).bool())]
    [[0, 0, 1], [2, 1, 1]]
    """
    change_BT = torch.nn.functional.pad(mask_BT.int(), (1, 1)).diff(dim=1)
    starts_R2, ends_R2 = change_BT.eq(1).nonzero(), change_BT.eq(-1).nonzero()
    return starts_R2[:, 0], ends_R2[:, 1] - starts_R2[:, 1]


def _join_cached(parts: list[States | Drawn | None]) -> States | Sparse | None:
    """Concatenate what is cached for the samples. Packed text has nothing."""
    drawn = [part for part in parts if isinstance(part, Drawn)]
    if drawn:
        return Drawn.cat(drawn).weighted()
    states = [part for part in parts if isinstance(part, States)]
    return States.cat(states) if states else None
