"""Build the drafter that pretraining, or finetuning without it, starts from. Config: conf/init."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter.models.compatibility import check_pair, drafter_source, load_drafter
from drafter.models.copying import add_copying_heads, check_can_copy
from drafter.models.fingerprints import model_fingerprint
from drafter.models.initialization import (
    build_drafter,
    check_width,
    project_embeddings,
    special_ids,
    take_layers,
    transplant,
)
from drafter.models.loading import load_model, load_output_embedding, load_tokenizer, meta_model, vocabulary_width
from drafter.models.slicing import check_can_slice, rotate, slice_hidden_states
from drafter.models.source import ModelSource
from experiments.running.inputs import plain, target_source

KINDS = ("scratch", "existing", "layers", "projected", "copying", "transplant")
OWN_SIZES = ("scratch", "projected", "copying")  # kinds of which conf/drafter says the sizes
OF_A_MODEL = ("existing", "transplant")  # kinds that start from the model at init.path
NOT_IDENTIFYING = ("path", "revision", "steps", "suffix")  # a fingerprint and the steps of training are in its place
SEQUENCE = 256  # tokens of a sequence of the text by which directions are chosen


def empty_drafter(cfg: DictConfig, target: PreTrainedModel) -> PreTrainedModel:
    """Return the drafter without weights (on the meta device), for checks and estimates.

    Args:
        cfg: the config of a stage.
        target: the target without weights.

    Raises:
        ValueError: a setting of the start is wrong, or the start does not suit the target.
    """
    how, text = cfg.init, target.config.get_text_config()
    if how.kind not in KINDS:
        raise ValueError(f"init.kind is '{how.kind}', must be one of {', '.join(KINDS)}")
    if how.kind == "layers":
        made = take_layers(target, list(how.layers))
        if how.hidden_size is None:
            return made
        check_width(how.hidden_size, text.hidden_size)
        check_can_slice(made, how.hidden_size)
        return rotate(made, torch.empty(text.hidden_size, how.hidden_size, device="meta"))
    if how.kind in OF_A_MODEL:
        model = meta_model(_source(cfg))
        model.config.get_text_config().vocab_size = model.config.vocab_size = text.vocab_size
        with torch.device("meta"):
            return type(model)(model.config)
    if how.kind in ("projected", "copying"):
        check_width(cfg.drafter.hidden_size, text.hidden_size)
    with torch.device("meta"):
        made = build_drafter(plain(cfg.drafter), text.vocab_size, {})
    if how.kind == "copying":
        check_can_copy(made)
    return made


def check_start(cfg: DictConfig) -> None:
    """Check that an existing drafter has the target's vocabulary.

    Raises:
        VocabularyError: the two cannot be used together.
    """
    if cfg.init.kind == "existing":
        check_pair(target_source(cfg), _source(cfg), cfg.pad_vocabulary)


def new_drafter(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the drafter with trainable weights in float32."""
    starts: dict[str, Callable[[], PreTrainedModel]] = {
        "scratch": lambda: _random(cfg, tokenizer),
        "existing": lambda: load_drafter(_source(cfg), target_source(cfg), cfg.pad_vocabulary, whole=True),
        "layers": lambda: _layers(cfg),
        "projected": lambda: _projected(cfg, tokenizer),
        "copying": lambda: _copying(cfg, tokenizer),
        "transplant": lambda: _transplanted(cfg, tokenizer),
    }
    return starts[cfg.init.kind]().float().requires_grad_(True).train()


def start_identity(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings that determine the start, and the fingerprint of the model that it is made from."""
    kind = cfg.init.kind
    settings = {"drafter": plain(cfg.drafter)} if kind in OWN_SIZES else {}
    if kind == "scratch":
        return settings, {}
    ours = {name: value for name, value in plain(cfg.init).items() if name not in NOT_IDENTIFYING}
    model = _source(cfg) if kind in OF_A_MODEL else target_source(cfg)
    return settings | {"init": ours}, {"init": model_fingerprint(model)}


def _source(cfg: DictConfig) -> ModelSource:
    return drafter_source(cfg.init.path, target_source(cfg))._replace(revision=cfg.init.revision)


def _random(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    rows = vocabulary_width(target_source(cfg))
    return build_drafter(plain(cfg.drafter), rows, special_ids(tokenizer, rows))


def _layers(cfg: DictConfig) -> PreTrainedModel:
    made = take_layers(load_model(target_source(cfg)), list(cfg.init.layers)).float().eval()
    if cfg.init.hidden_size is None:
        return made
    text_T = _text(cfg, "heldout")
    count = max(1, len(text_T) // SEQUENCE)
    ids_BT = text_T[: count * SEQUENCE].view(count, -1)
    return slice_hidden_states(made, cfg.init.hidden_size, ids_BT)


def _projected(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    target = load_model(target_source(cfg))
    given, made = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    return project_embeddings(_random(cfg, tokenizer), given.detach(), made.detach())


def _copying(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    head: Any = load_output_embedding(target_source(cfg)).get_output_embeddings()
    embedding = head.weight.detach()
    counts_V = torch.bincount(_text(cfg, "train"), minlength=len(embedding)).float()
    return add_copying_heads(_random(cfg, tokenizer), embedding, counts_V)


def _text(cfg: DictConfig, split: str) -> torch.Tensor:
    """Return the first init.tokens tokens of the prepared text, shape (T,)."""
    text_T = np.load(Path(cfg.inputs.data) / f"{split}.npy", mmap_mode="r")
    return torch.from_numpy(text_T[: cfg.init.tokens].astype(np.int64))


def _transplanted(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    source = _source(cfg)
    return transplant(load_model(source), load_tokenizer(source), tokenizer, vocabulary_width(target_source(cfg)))
