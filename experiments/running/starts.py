"""Build the drafter that pretraining, or finetuning without it, starts from. Config: conf/init."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter.models.compatibility import check_pair, drafter_source, load_drafter
from drafter.models.fingerprints import model_fingerprint
from drafter.models.initialization import (
    build_drafter,
    check_width,
    project_embeddings,
    special_ids,
    take_layers,
    transplant,
)
from drafter.models.loading import load_model, load_tokenizer, meta_model, vocabulary_width
from drafter.models.slicing import check_can_slice, rotate, slice_hidden_states
from drafter.models.source import ModelSource
from drafter.models.trimming import read_kept
from experiments.running.inputs import plain, target_source

KINDS = ("scratch", "existing", "layers", "projected", "transplant")
SEQUENCE = 256  # tokens of a sequence of the text by which directions are chosen


def empty_drafter(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the drafter without weights (on the meta device), after checking the start's settings.

    Raises:
        ValueError: a setting is wrong, or the start does not suit the target.
    """
    target, how = target_source(cfg), cfg.init
    if how.kind not in KINDS:
        raise ValueError(f"init.kind is '{how.kind}', must be one of {', '.join(KINDS)}")
    if cfg.init.kind == "layers":
        made = take_layers(meta_model(target), list(how.layers))
        if how.hidden_size is None:
            return made
        width = made.config.get_text_config().hidden_size
        check_width(how.hidden_size, width)
        check_can_slice(made)
        return rotate(made, torch.empty(width, how.hidden_size, device="meta"))
    if how.kind == "existing":
        check_pair(target, _source(cfg), cfg.pad_vocabulary)
        if read_kept(how.path):
            raise ValueError(f"init.path is {how.path}, which is trimmed: give the one it was made from")
        return _with_rows(meta_model(_source(cfg)), vocabulary_width(target))
    if how.kind == "transplant":
        return _with_rows(meta_model(_source(cfg)), vocabulary_width(target))
    if how.kind == "projected":
        check_width(cfg.drafter.hidden_size, meta_model(target).get_input_embeddings().weight.shape[1])
    with torch.device("meta"):
        return _random(cfg, tokenizer)


def new_drafter(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the drafter with trainable weights in float32."""
    starts: dict[str, Callable[[], PreTrainedModel]] = {
        "scratch": lambda: _random(cfg, tokenizer),
        "existing": lambda: load_drafter(cfg.init.path, target_source(cfg), cfg.pad_vocabulary),
        "layers": lambda: _layers(cfg),
        "projected": lambda: _projected(cfg, tokenizer),
        "transplant": lambda: _transplanted(cfg, tokenizer),
    }
    return starts[cfg.init.kind]().float().requires_grad_(True).train()


def start_identity(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings that determine the start, and the fingerprint of the model that it is made from."""
    kind = cfg.init.kind
    settings = {"drafter": plain(cfg.drafter)} if kind in ("scratch", "projected") else {}
    if kind == "scratch":
        return settings, {}
    ours = {name: value for name, value in plain(cfg.init).items() if name not in ("path", "revision", "steps")}
    model = target_source(cfg) if kind in ("layers", "projected") else _source(cfg)
    return settings | {"init": ours}, {"init": model_fingerprint(model)}


def _source(cfg: DictConfig) -> ModelSource:
    return drafter_source(cfg.init.path, target_source(cfg))._replace(revision=cfg.init.revision)


def _random(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    rows = vocabulary_width(target_source(cfg))
    return build_drafter(plain(cfg.drafter), rows, special_ids(tokenizer, rows))


def _with_rows(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """Return a model without weights with so many rows of the embedding."""
    model.config.get_text_config().vocab_size = model.config.vocab_size = rows
    with torch.device("meta"):
        return type(model)(model.config)


def _layers(cfg: DictConfig) -> PreTrainedModel:
    made = take_layers(load_model(target_source(cfg)), list(cfg.init.layers)).float().eval()
    if cfg.init.hidden_size is None:
        return made
    text = np.load(Path(cfg.inputs.data) / "heldout.npy", mmap_mode="r")
    count = max(1, min(len(text), cfg.init.tokens) // SEQUENCE)
    ids_BT = torch.from_numpy(text[: count * SEQUENCE].astype(np.int64)).view(count, -1)
    return slice_hidden_states(made, cfg.init.hidden_size, ids_BT)


def _projected(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    target = load_model(target_source(cfg))
    given, made = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    return project_embeddings(_random(cfg, tokenizer), given.detach(), made.detach())


def _transplanted(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    source = _source(cfg)
    return transplant(load_model(source), load_tokenizer(source), tokenizer, vocabulary_width(target_source(cfg)))
