"""A drafter that scores the tokens that its target uses most, and no other (VocabTrim, arXiv 2506.22694).

Much of a small drafter is its output embedding, and most of a vocabulary is hardly ever written. The head keeps the
rows of the tokens that the target's responses use most; the others score minus infinity, so that none is drafted.
Decoding stays lossless, since the accept test takes any distribution of the drafter's: what it cannot draft, the target
adds itself.
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
    """An output embedding of K of V tokens: hidden (..., H) -> logits (..., V), minus infinity at the others."""

    kept_K: torch.Tensor

    def __init__(self, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, kept_K: torch.Tensor, tied: bool):
        super().__init__()
        self.out_features, width = weight_VH.shape
        self.register_buffer("kept_K", kept_K)
        self.weight = nn.Parameter(weight_VH[kept_K].clone(), requires_grad=False)
        self.bias = None if bias_V is None else nn.Parameter(bias_V[kept_K].clone(), requires_grad=False)
        # A tied table is looked up from now on, a row a token, and no longer read whole: c does not count it.
        self.uncounted_parameters = self.out_features * width if tied else 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary."""
        scores = nn.functional.linear(hidden, self.weight, self.bias)
        logits = scores.new_full((*scores.shape[:-1], self.out_features), -torch.inf)
        logits[..., self.kept_K] = scores
        return logits


def most_used(texts: Iterable[list[int]], vocabulary: int) -> np.ndarray:
    """All ids, shape (V,), from the most frequent to the least; ties go to the smaller id."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for text in texts:
        np.add.at(counts, text, 1)
    return np.argsort(-counts, kind="stable")


def trim(model: PreTrainedModel, kept: Iterable[int]) -> PreTrainedModel:
    """The model, changed in place to score these tokens alone.

    Raises:
        ValueError: there are none, or one that is no token of the model's.
    """
    rows, ids = vocabulary_rows(model), sorted(set(kept))
    if not ids or ids[0] < 0 or ids[-1] >= rows:
        raise ValueError(
            f"the kept tokens are {ids[:1]} to {ids[-1:]}; they must be ids below {rows}, and at least one"
        )
    head, tied = model.get_output_embeddings(), bool(model.config.tie_word_embeddings)
    kept_K = torch.tensor(ids, device=head.weight.device)
    model.set_output_embeddings(TrimmedHead(head.weight.detach(), getattr(head, "bias", None), kept_K, tied))
    return model


def write_kept(directory: Path, kept: Iterable[int]) -> None:
    """Beside an untrimmed model's files: which tokens its head keeps. Loaders that do not know the file load all."""
    write_file(directory / KEPT, json.dumps(sorted(map(int, kept))).encode())


def read_kept(directory: str | Path) -> list[int] | None:
    """The tokens that the head of this drafter keeps; None where it keeps all."""
    path = Path(directory) / KEPT
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
