"""Generate many sequences side by side with the model alone, each with a temperature of its own.

All sequences advance by one token per call of the model. When one ends, the next prompt takes its row, so the batch
stays full until no prompt waits. The cache has room for the longest sequence that is being generated, not for the
longest that is possible: it grows with the sequences, and if it would exceed the limit, the sequences that were added
last are set aside and read again later.

Shapes: B rows, V vocabulary, N generated tokens of a sequence, H hidden size.
"""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from drafter.decoding.batched import RaggedDecoder
from drafter.warping import sample

STEP = 64  # tokens by which the cache grows
FREE_SHARE = 8  # wait until a row in so many is free, and read the new prompts together


class Generated(NamedTuple):
    """The tokens generated after a prompt, and the last hidden states that they were drawn from, shape (N, H)."""

    tokens: list[int]
    hidden_NH: torch.Tensor | None


@dataclass
class _Sequence:
    tokens: list[int]
    prompt_length: int
    temperature: float
    hidden: list[torch.Tensor] = field(default_factory=list)


class _Batch:
    """The sequences that are being generated, by row; None for a free row."""

    def __init__(self, model: PreTrainedModel, sequences: list[_Sequence], batch_tokens: int):
        self.decoder, self.batch_tokens = RaggedDecoder(model, 0), batch_tokens
        self.rows: list[_Sequence | None] = []
        self.waiting = sequences[::-1]  # the next one is the last

    @property
    def active(self) -> list[_Sequence]:
        return [one for one in self.rows if one]

    def arrange(self) -> None:
        """Set sequences aside if there is no room for all, give free rows to waiting ones, and resize the cache."""
        active = self.active
        while len(active) > 1 and len(active) * _longest(active) > self.batch_tokens:
            aside = active.pop()
            self.rows[self.rows.index(aside)] = None
            self.waiting.append(aside)
        added = self._next(active)
        needed, length = len(active) + len(added), _longest([*active, *added])
        if not needed:
            return self.rows.clear()
        if needed > len(self.rows) or length > self.decoder.positions.capacity or needed <= 0.75 * len(self.rows):
            kept = [number for number, one in enumerate(self.rows) if one]
            self.decoder.resize(kept, needed, max(length, min(length + STEP, self.batch_tokens // needed)))
            self.rows = [*active, *[None] * len(added)]
        free = [number for number, one in enumerate(self.rows) if one is None][: len(added)]
        if added:
            self.decoder.replace_rows(free, [one.tokens[:-1] for one in added])
        for row, one in zip(free, added, strict=True):
            self.rows[row] = one

    def _next(self, active: list[_Sequence]) -> list[_Sequence]:
        """Take the waiting sequences that are to be added now, in their order."""
        added: list[_Sequence] = []
        while self.waiting:
            together = [*active, *added, self.waiting[-1]]
            if len(together) > 1 and len(together) * (_longest(together) + STEP) > self.batch_tokens:
                break
            added.append(self.waiting.pop())
        if active and self.waiting and len(added) * FREE_SHARE < len(self.rows):
            self.waiting += added[::-1]
            return []
        return added

    def forward(self) -> torch.Tensor:
        """Return the logits of the next token of each row, shape (B, V). Those of free rows have no meaning."""
        ids = [[one.tokens[-1] if one else 0] for one in self.rows]
        return self.decoder.forward(ids, [len(one.tokens) - 1 if one else 0 for one in self.rows], 1)[:, -1]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    temperatures: Sequence[float],
    *,
    top_p: float,
    max_new_tokens: int,
    stop_ids: Collection[int],
    batch_tokens: int,
    states: torch.dtype | None = None,
) -> list[Generated]:
    """Return the tokens generated after each prompt, up to and including the first stop token.

    Random numbers come from torch's global generator. Prompts of equal tokens should follow each other: if they are
    added to the batch together, they are read once.

    Args:
        model: the model; `capabilities.check_side_by_side` tells whether it can be used.
        prompts: token ids, at least one each.
        temperatures: of each prompt's sampling; 0 is greedy.
        top_p: of the sampling.
        max_new_tokens: the most tokens to generate after a prompt.
        stop_ids: tokens that end a sequence.
        batch_tokens: the most tokens in the cache, padding included. A single sequence may exceed it.
        states: keep the input of the output embedding at each generated token, on the CPU in this dtype. It is the last
            hidden state if `has_plain_head(model)`. The tokens do not depend on it.

    Raises:
        ValueError: the model's logits are not finite, or its states are not in the dtype `states`.
    """
    sequences = [
        _Sequence(list(prompt), len(prompt), temperature)
        for prompt, temperature in zip(prompts, temperatures, strict=True)
    ]
    batch = _Batch(model, list(sequences), batch_tokens)
    batch.arrange()
    latest: list[torch.Tensor] = []  # the input of the output embedding in the latest call, shape (B, 1, H)
    with _inputs_of_head(model, latest) if states else nullcontext():
        while batch.active:
            logits_BV = batch.forward()
            # A sum is not finite if a summand is not, and takes a tenth of the time.
            if not logits_BV.sum(dtype=torch.float32).isfinite() and not logits_BV.isfinite().all():
                raise ValueError(
                    f"the model's logits are not finite after {_longest(batch.active)} tokens: try "
                    f"target.dtype=float32, and check that its weights are complete"
                )
            hidden_BH = latest[0][:, -1].to("cpu", states) if states else None
            if hidden_BH is not None and not hidden_BH.isfinite().all():
                raise ValueError(f"the model's hidden states exceed the range of {states}: keep them in bfloat16")
            temperature_B = torch.tensor(
                [one.temperature if one else 0.0 for one in batch.rows], device=logits_BV.device
            )
            for row, token in enumerate(sample(logits_BV, temperature_B, top_p).tolist()):
                if one := batch.rows[row]:
                    one.tokens.append(token)
                    if hidden_BH is not None:
                        one.hidden.append(hidden_BH[row])
                    if token in stop_ids or len(one.tokens) - one.prompt_length >= max_new_tokens:
                        batch.rows[row] = None
            batch.arrange()
    return [
        Generated(one.tokens[one.prompt_length :], torch.stack(one.hidden) if one.hidden else None) for one in sequences
    ]


def _inputs_of_head(model: PreTrainedModel, latest: list[torch.Tensor]) -> RemovableHandle:
    """Keep the input of each call of the output embedding in `latest`, until the handle is removed."""

    def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        latest[:] = inputs[:1]

    return model.get_output_embeddings().register_forward_pre_hook(keep, prepend=True)


def _longest(sequences: list[_Sequence]) -> int:
    return max((len(one.tokens) for one in sequences), default=0)
