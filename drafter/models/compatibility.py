"""Check that a drafter is compatible with a target: that both give the same meaning to the same token id.

An engine whose drafter has another vocabulary fails at load time at best, and silently corrupts its output at worst.
Training, evaluation and export therefore check the pair first. The check reads tokenizers and configs alone, so that an
incompatible pair is refused before any model is loaded.
"""

import hashlib
import logging
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter.models.inspection import vocabulary_rows
from drafter.models.loading import context_limit, load_model, load_tokenizer, vocabulary_width
from drafter.models.source import Model, ModelSource
from drafter.models.trimming import read_kept, trim

log = logging.getLogger(__name__)
PAD = "give pad_vocabulary=true: the drafter gets the target's number of rows"


class VocabularyError(ValueError):
    """Target and drafter do not give the same meaning to the same token id."""


class Difference(NamedTuple):
    """A difference between two models.

    Attributes:
        what: the property that differs.
        target, drafter: its value in each model.
        remedy: what to do about it.
        fatal: whether the two models cannot be used together.
    """

    what: str
    target: str
    drafter: str
    remedy: str
    fatal: bool

    def __str__(self) -> str:
        remedy = self.remedy[0].upper() + self.remedy[1:]
        return f"{self.what}: the target has {self.target}, the drafter {self.drafter}. {remedy}"


def differences(target: Model, drafter: Model) -> list[Difference]:
    """Return all differences between two models that matter to an engine."""
    drafter = drafter_source(drafter, target)
    target_tokenizer, drafter_tokenizer = load_tokenizer(target), load_tokenizer(drafter)
    found = [
        compare_vocabularies(target_tokenizer, drafter_tokenizer),
        compare_rows(vocabulary_width(target), vocabulary_width(drafter)),
        *(
            Difference(what, one, other, "the export has the target's", fatal=False)
            for what, (one, other) in {
                "special tokens": (special_tokens(target_tokenizer), special_tokens(drafter_tokenizer)),
                "chat template": (template(target_tokenizer), template(drafter_tokenizer)),
            }.items()
            if one != other
        ),
        compare_contexts(context_limit(target), context_limit(drafter)),
    ]
    return [difference for difference in found if difference]


def check_pair(target: Model, drafter: Model, pad: bool = False) -> list[Difference]:
    """Return the harmless differences of a pair. Raise on harmful ones, except padding if `pad` is true.

    Args:
        target, drafter: the pair.
        pad: whether `load_drafter` will give the drafter as many embedding rows as the target has.

    Raises:
        VocabularyError: the models cannot be used together. The message has all reasons, with remedies.
    """
    found = differences(target, drafter)
    if fatal := [one for one in found if one.fatal and not (pad and one.remedy == PAD)]:
        reasons = "\n".join(f"  {one}" for one in fatal)
        names = [ModelSource.from_model(model).path for model in (drafter, target)]
        raise VocabularyError(f"{names[0]} is no drafter for {names[1]}:\n{reasons}")
    return found


def drafter_source(drafter: Model, target: Model) -> ModelSource:
    """Return a drafter's source. For a path: in float32, and trusting remote code if the target's source does."""
    if isinstance(drafter, ModelSource):
        return drafter
    return ModelSource(str(drafter), trust_remote_code=ModelSource.from_model(target).trust_remote_code)


def load_drafter(drafter: Model, target: Model, pad: bool = False, whole: bool = False) -> PreTrainedModel:
    """Load a drafter in float32 after checking that it is compatible with the target.

    The drafter gets as many embedding rows as the target has. Its output embedding is trimmed if the directory says so
    (see `trimming`), unless it is to be `whole`, which training needs.

    Raises:
        VocabularyError: the models cannot be used together; see `check_pair`.
    """
    source = drafter_source(drafter, target)
    for difference in check_pair(target, source, pad):
        log.info("%s and %s differ, %s", source.path, ModelSource.from_model(target).path, difference)
    model, kept = resize_vocabulary(load_model(source), vocabulary_width(target)), read_kept(source.path)
    return trim(model, kept) if kept and not whole else model


@torch.no_grad()
def resize_vocabulary(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """Give a model's embeddings `rows` rows, in place, and return the model.

    An added row belongs to no token. It is the mean of the existing rows, so its logit is the mean of theirs and never
    the largest.
    """
    before = vocabulary_rows(model)
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[before:] = embedding.weight[:before].mean(0)
    return model


def compare_vocabularies(target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase) -> Difference | None:
    """Return the first id to which the two vocabularies assign different pieces, or None."""
    ours, theirs = target.get_vocab(), drafter.get_vocab()
    if ours == theirs:
        return None
    piece = min(
        (piece for piece in ours | theirs if ours.get(piece) != theirs.get(piece)),
        key=lambda piece: (min(ids[piece] for ids in (ours, theirs) if piece in ids), ours.get(piece, len(ours))),
    )
    sides = [
        f"{len(vocabulary)} tokens, "
        + (f"{piece!r} as id {vocabulary[piece]}" if piece in vocabulary else f"no {piece!r}")
        for vocabulary in (ours, theirs)
    ]
    remedy = "train a drafter for this target, from this one with init=transplant"
    return Difference(
        "vocabulary",
        sides[0],
        sides[1],
        remedy,
        fatal=True,
    )


def compare_rows(target: int, drafter: int) -> Difference | None:
    """Return a difference in the number of embedding rows, or None. With equal vocabularies it is only padding."""
    if target == drafter:
        return None
    return Difference("rows of the embedding", str(target), str(drafter), PAD, fatal=True)


def compare_contexts(target: int, drafter: int) -> Difference | None:
    """Return a difference if the drafter's context is shorter than the target's, or None."""
    if drafter >= target:
        return None
    remedy = f"serve with a context of {drafter} tokens at most: beyond it, drafts are useless or the engine fails"
    return Difference("context", f"{target} tokens", f"{drafter}", remedy, fatal=False)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the ids of the bos, eos and pad tokens, as text."""
    return ", ".join(f"{name} {getattr(tokenizer, f'{name}_token_id')}" for name in ("bos", "eos", "pad"))


def template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the first 16 digits of the chat template's SHA-256, or "none"."""
    if tokenizer.chat_template is None:
        return "none"
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]
