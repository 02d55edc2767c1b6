"""A stage without its work: both models without weights, the first rows of its data, its inputs; nothing is written.

`dry_run=true`, or `--dry-run`, on any stage or the pipeline. What would fail after hours fails here, with the same
error: a model or data set that cannot be reached, a template that does not fit its rows, a prompt that is too long.
"""

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from drafter.artifacts import MANIFEST, read_jsonl
from drafter.corpus import source_files
from drafter.ends import end_of_turn_ids
from drafter.loading import context_limit, load_tokenizer, meta_model, vocabulary_width
from drafter.models import build_drafter, num_parameters, special_ids
from drafter.prompts import encode_prompt
from drafter.sources import matches, read_rows, render
from experiments.inputs import plain, target_source

ROWS = 3  # of each source


def show(cfg: DictConfig, stage: str, check: Callable[[DictConfig], object] = lambda cfg: None) -> None:
    """Check the settings, as the stage itself does, and print what it would work with.

    Raises:
        OSError: a model or a data set cannot be reached.
        ValueError: parts do not fit each other.
        KeyError: a template needs a field that its rows lack.
    """
    check(cfg)
    print(f"dry run of {stage} -> {cfg.out}")
    tokenizer = load_tokenizer(target_source(cfg))
    for line in (*models(cfg, tokenizer), *data(cfg, stage, tokenizer), *inputs(cfg), *batches(cfg, stage)):
        print(f"  {line}")


def models(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Target and drafter on the meta device, and the target's tokenizer."""
    path, source = cfg.target.path, target_source(cfg)
    rows = vocabulary_width(source)
    if len(tokenizer) > rows:
        raise ValueError(f"{path} has {rows} rows of embedding for {len(tokenizer)} tokens of its tokenizer")
    target = meta_model(source)
    with torch.device("meta"):
        drafter = build_drafter(plain(cfg.drafter), rows, special_ids(tokenizer))
    ratio = num_parameters(drafter) / num_parameters(target)
    context = context_limit(source)
    yield f"target {path}: {type(target).__name__}, {num_parameters(target):,} parameters, context {context:,}"
    ends = end_of_turn_ids(source, tokenizer)
    template = "its chat template" if tokenizer.chat_template else "no chat template: prompts stand as they are"
    yield f"tokenizer: {len(tokenizer):,} tokens, {rows:,} rows, ends at {ends}, {template}"
    yield f"drafter: {type(drafter).__name__}, {num_parameters(drafter):,} parameters, c = {ratio:.2%}"


def data(cfg: DictConfig, stage: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The first rows: of the sources before they are prepared, else of what was prepared."""

    def told(name: str, texts: list[str], as_prompts: bool) -> str:
        if not texts:
            raise ValueError(f"{name} has no row that its settings choose")
        encode = (lambda text: encode_prompt(tokenizer, text)) if as_prompts else tokenizer.tokenize
        lengths = [len(encode(text)) for text in texts]
        return f"{name}: rows of {lengths} tokens; the first begins {texts[0][:60]!r}"

    if stage == "prepare" and "packages" in cfg.data:
        yield f"data: {len(source_files(list(cfg.data.packages))):,} files of {len(cfg.data.packages)} packages"
    elif stage == "prepare":
        yield told(cfg.data.pretraining.path, first(cfg.data.pretraining), as_prompts=False)
        for source in cfg.data.instructions:
            yield told(source.path, first(source), as_prompts=True)
        for name, source in cfg.task.items():
            yield told(f"task {name}, {source.path}", first(source), as_prompts=True)
    elif "data" in cfg.inputs and (prepared := Path(cfg.inputs.data) / "instructions.jsonl").exists():
        yield told(str(prepared), [row["prompt"] for row in read_jsonl(prepared)[:ROWS]], as_prompts=True)


def first(source: DictConfig) -> list[str]:
    """The first rows that a source's settings choose, rendered."""
    where: dict[str, Any] = plain(source.where) if "where" in source else {}
    rows = (row for row in read_rows(source.path, source.split, source.name, source.revision) if matches(row, where))
    return [render(source.template, row) for row in islice(rows, ROWS)]


def inputs(cfg: DictConfig) -> Iterator[str]:
    """Which directories are finished, and which an earlier stage has to make."""
    for name, path in cfg.inputs.items() if "inputs" in cfg else ():
        if path and "://" not in path:
            known = (Path(path) / MANIFEST).exists() or (Path(path) / "config.json").exists()
            yield f"{name}: {path} is {'there' if known else 'not there yet: the stages before make it'}"


def batches(cfg: DictConfig, stage: str) -> Iterator[str]:
    """What each rank gets of a batch."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if "batch_size" in cfg[stage]:
        size = cfg[stage].batch_size
        if size < ranks:
            raise ValueError(f"{stage}.batch_size is {size}, less than one sample for each of {ranks} ranks")
        pieces = cfg.trainer.accumulate_grad_batches
        yield f"batches of {size} samples over {ranks} ranks, {pieces} to an optimizer step"
