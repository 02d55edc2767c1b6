"""A decoder for models with states: recurrent, linear-attention and convolution layers (Qwen3-Next, Falcon-H1, Mamba).

A state summarises all tokens that were read, and a rejected draft cannot be taken out of it. The decoder therefore
copies the states before a call that may have to be undone. To undo one, it puts the copies back and reads the accepted
tokens again, with a call of their own. This is exact, and costs up to one call more per block.

The copies are of whatever transformers' cache layers keep. A model whose states are elsewhere (RecurrentGemma, RWKV)
cannot be decoded like this; `capabilities` finds that out.
"""

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from drafter.decoding.decoders import logits_of


def keeps_states(config: Any) -> bool:
    """Return whether some layers of an architecture keep states, as transformers chooses their caches by the config.

    Raises:
        ValueError, KeyError, AttributeError: transformers has no caches for this config.
    """
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


class StatefulDecoder:
    """One sequence of a model with states, called as a `decoders.Decoder` is.

    Args:
        model: the model.
        one_at_a_time: read one token per call after the first call. Some models (Mamba, Jamba) begin from an empty
            state if a later call has several tokens.
    """

    def __init__(self, model: PreTrainedModel, one_at_a_time: bool = False):
        self.model, self.one_at_a_time, self.call = model, one_at_a_time, logits_of(model)
        # Without them, some models (Bamba) place the tokens of every call at the beginning.
        self.takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        self._begin()

    def _begin(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.tokens: list[int] = []
        self._copy()

    def forward(self, ids: list[list[int]], starts: list[int], keep: int) -> torch.Tensor:
        """Return the logits of the last `keep` tokens, shape (1, keep, V)."""
        (new,), (start,) = ids, starts
        if start < len(self.tokens):
            self._return_to(start)
        elif len(new) > 1:  # a verification, or a block's first call of the drafter
            self._copy()
        return self._read(new, keep)

    def _return_to(self, start: int) -> None:
        kept = self.tokens[:start]
        if start < self.copied_length:
            self._begin()
        else:
            for layer, values in zip(self.cache.layers, self.copies, strict=False):
                vars(layer).update({name: _copy_of(value) for name, value in values.items()})
            del self.tokens[self.copied_length :]
        if len(self.tokens) < start:
            self._read(kept[len(self.tokens) :], 1)
        self._copy()

    def _copy(self) -> None:
        self.copied_length = len(self.tokens)
        self.copies = [{name: _copy_of(value) for name, value in vars(layer).items()} for layer in self.cache.layers]

    def _read(self, ids: list[int], keep: int) -> torch.Tensor:
        parts = [[token] for token in ids] if self.one_at_a_time and self.tokens else [ids]
        return torch.cat([self._call(part, min(keep, len(part))) for part in parts], 1)[:, -keep:]

    def _call(self, ids: list[int], keep: int) -> torch.Tensor:
        device, start = self.model.device, len(self.tokens)
        positions = torch.arange(start, start + len(ids), device=device)[None]
        arguments = {"position_ids": positions} if self.takes_positions else {}
        self.tokens += ids
        return self.call(torch.tensor([ids], device=device), self.cache, keep, **arguments)

    def keep_rows(self, rows: list[int]) -> None:
        """Do nothing: there is only one row."""

    def replace_row(self, row: int, ids: list[int]) -> None:
        """Do nothing: there is only one sequence."""


def _copy_of(value: Any) -> Any:
    """Copy the states, which calls change in place. Keys and values are replaced by each call, and not copied."""
    if not isinstance(value, dict):
        return value
    return {key: one.clone() if isinstance(one, torch.Tensor) else one for key, one in value.items()}
