"""Restrict a drafter's output embedding to the tokens that its target uses most (VocabTrim, arXiv 2506.22694).

The output embedding is a large part of a small drafter, and most tokens of a vocabulary are rare. The trimmed head
keeps the rows of the tokens that are most frequent in the target's responses. All others have a logit of minus infinity
and are never drafted. Decoding stays lossless, since verification is correct for any distribution of the drafter: the
target itself generates the tokens that the drafter cannot propose.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from drafter.artifacts.storage import write_file
from drafter.models.inspection import vocabulary_rows

KEPT = "kept_tokens.json"


class TrimmedHead(nn.Module):
    """An output embedding of K of V tokens: hidden (..., H) -> logits (..., V), minus infinity at the other tokens."""

    kept_K: torch.Tensor

    def __init__(self, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, kept_K: torch.Tensor, tied: bool):
        super().__init__()
        self.out_features, width = weight_VH.shape
        self.register_buffer("kept_K", kept_K)
        self.weight = nn.Parameter(weight_VH[kept_K].clone(), requires_grad=False)
        self.bias = None if bias_V is None else nn.Parameter(bias_V[kept_K].clone(), requires_grad=False)
        # A tied table remains for looking up single rows. It is no longer read completely, so c does not count it.
        self.uncounted_parameters = self.out_features * width if tied else 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits over the full vocabulary."""
        scores = nn.functional.linear(hidden, self.weight, self.bias)
        logits = scores.new_full((*scores.shape[:-1], self.out_features), -torch.inf)
        logits[..., self.kept_K] = scores
        return logits


def most_used(texts: Iterable[list[int]], vocabulary: int) -> np.ndarray:
    """Return all ids, shape (V,), from the most to the least frequent in `texts`. On a tie the smaller id is first."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for text in texts:
        np.add.at(counts, text, 1)
    return np.argsort(-counts, kind="stable")


def trim(model: PreTrainedModel, kept: Iterable[int]) -> PreTrainedModel:
    """Restrict a model's output embedding to the kept tokens, in place, and return the model.

    Raises:
        ValueError: no tokens are kept, or one of them is not in the model's vocabulary.
    """
    rows, ids = vocabulary_rows(model), sorted(set(kept))
    if not ids or ids[0] < 0 or ids[-1] >= rows:
        raise ValueError(
            f"the kept tokens are {ids[:1]} to {ids[-1:]}; there must be at least one, with ids below {rows}"
        )
    head, tied = model.get_output_embeddings(), bool(model.config.tie_word_embeddings)
    kept_K = torch.tensor(ids, device=head.weight.device)
    model.set_output_embeddings(TrimmedHead(head.weight.detach(), getattr(head, "bias", None), kept_K, tied))
    return model


def write_kept(directory: Path, kept: Iterable[int]) -> None:
    """Write the list of kept tokens to a directory with an untrimmed model.

    `load_drafter` then trims the model. Other loaders ignore the file and load the full model.
    """
    write_file(directory / KEPT, json.dumps(sorted(map(int, kept))).encode())


def read_kept(directory: str | Path) -> list[int] | None:
    """Return the tokens that the output embedding of a drafter keeps, or None if it keeps all."""
    path = Path(directory) / KEPT
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
