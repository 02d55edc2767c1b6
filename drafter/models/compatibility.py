"""The gate before training, evaluation and export: do target and drafter give the same meaning to the same token id?

Engines that draft with a model of another vocabulary fail at load time at best, and corrupt text silently at worst. The
gate reads tokenizers and configs alone, so that it refuses before a model is loaded.
"""

import hashlib
import logging
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter.models.inspection import vocabulary_rows
from drafter.models.loading import Model, ModelSource, context_limit, load_model, load_tokenizer, vocabulary_width
from drafter.models.trimming import read_kept, trim

log = logging.getLogger(__name__)
PAD = "give pad_vocabulary=true: the drafter gets the target's number of rows"


class VocabularyError(ValueError):
    """Target and drafter do not give the same meaning to the same token id."""


class Difference(NamedTuple):
    """Something in which two models differ, what helps, and whether it keeps them from serving together."""

    what: str
    target: str
    drafter: str
    remedy: str
    fatal: bool

    def __str__(self) -> str:
        remedy = self.remedy[0].upper() + self.remedy[1:]
        return f"{self.what}: the target has {self.target}, the drafter {self.drafter}. {remedy}"


def differences(target: Model, drafter: Model) -> list[Difference]:
    """All that differs between two models, and matters to an engine."""
    drafter = partner(drafter, target)
    ours, theirs = load_tokenizer(target), load_tokenizer(drafter)
    found = [
        vocabularies(ours, theirs),
        widths(vocabulary_width(target), vocabulary_width(drafter)),
        *(
            Difference(what, one, other, "the export has the target's", fatal=False)
            for what, (one, other) in {
                "special tokens": (special_tokens(ours), special_tokens(theirs)),
                "chat template": (template(ours), template(theirs)),
            }.items()
            if one != other
        ),
        contexts(context_limit(target), context_limit(drafter)),
    ]
    return [difference for difference in found if difference]


def check_pair(target: Model, drafter: Model, pad: bool = False) -> list[Difference]:
    """What differs without harm; what does harm is refused, unless it is padding and `pad` says to mend it.

    Raises:
        VocabularyError: names all that makes the two no pair, and what helps.
    """
    found = differences(target, drafter)
    if fatal := [one for one in found if one.fatal and not (pad and one.remedy == PAD)]:
        told = "\n".join(f"  {one}" for one in fatal)
        names = [ModelSource.of(model).path for model in (drafter, target)]
        raise VocabularyError(f"{names[0]} is no drafter for {names[1]}:\n{told}")
    return found


def partner(drafter: Model, target: Model) -> ModelSource:
    """The drafter's source: in float32, and with code of its own if the target may have that (a path says neither)."""
    if isinstance(drafter, ModelSource):
        return drafter
    return ModelSource(str(drafter), trust_remote_code=ModelSource.of(target).trust_remote_code)


def load_drafter(path: str, target: Model, pad: bool = False) -> PreTrainedModel:
    """A drafter in float32 that has passed the gate, as wide as the target, and trimmed if that is how it was left.

    Raises:
        VocabularyError: see check_pair.
    """
    for difference in check_pair(target, path, pad):
        log.info("%s and %s differ, %s", path, ModelSource.of(target).path, difference)
    model, kept = with_rows(load_model(partner(path, target)), vocabulary_width(target)), read_kept(path)
    return trim(model, kept) if kept else model


@torch.no_grad()
def with_rows(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The model with so many rows in its embeddings.

    A row that is added stands for no token. It is the mean of all others, and so is its logit: it is never the largest.
    """
    before = vocabulary_rows(model)
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[before:] = embedding.weight[:before].mean(0)
    return model


def vocabularies(target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase) -> Difference | None:
    """The first id that has not the same piece in both."""
    ours, theirs = target.get_vocab(), drafter.get_vocab()
    if ours == theirs:
        return None
    piece = min(
        (piece for piece in ours | theirs if ours.get(piece) != theirs.get(piece)),
        key=lambda piece: (min(known[piece] for known in (ours, theirs) if piece in known), ours.get(piece, len(ours))),
    )
    sides = [
        f"{len(vocabulary)} tokens, "
        + (f"{piece!r} as id {vocabulary[piece]}" if piece in vocabulary else f"no {piece!r}")
        for vocabulary in (ours, theirs)
    ]
    return Difference("vocabulary", sides[0], sides[1], "train a drafter for this target", fatal=True)


def widths(target: int, drafter: int) -> Difference | None:
    """Embeddings of different heights over one vocabulary: the padding differs, and can be mended."""
    if target == drafter:
        return None
    return Difference("rows of the embedding", str(target), str(drafter), PAD, fatal=True)


def contexts(target: int, drafter: int) -> Difference | None:
    """A drafter that was made for shorter texts than the target."""
    if drafter >= target:
        return None
    remedy = f"serve with a context of {drafter} tokens at most"
    return Difference("context", f"{target} tokens", f"{drafter}", remedy, fatal=False)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """Which ids begin, end and pad a text."""
    return ", ".join(f"{name} {getattr(tokenizer, f'{name}_token_id')}" for name in ("bos", "eos", "pad"))


def template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's SHA-256, its first digits."""
    if tokenizer.chat_template is None:
        return "none"
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]
