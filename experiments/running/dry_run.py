"""Check a stage without its work: build both models without weights, read the first rows, look for the inputs.

Give `dry_run=true` or `--dry-run` to any stage or to the pipeline. Nothing is written. An error that would otherwise
appear after hours appears at once: a model or data set that cannot be reached, a template that does not fit its rows, a
prompt that is too long.
"""

import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter.artifacts.manifest import MANIFEST
from drafter.data.conversations import opening
from drafter.data.corpus import source_files
from drafter.data.files import find_files
from drafter.data.near_duplicates import SeenTexts
from drafter.data.prompts import check_embedding
from drafter.data.selection import Row, read_instructions
from drafter.data.sources import Source, entries
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.inspection import num_active_parameters, num_parameters
from drafter.models.loading import check_quantisation, context_limit, load_tokenizer, meta_model, vocabulary_width
from experiments.running.choosing import choose_instructions, choose_prompts, prompt_length
from experiments.running.data_settings import (
    Docstrings,
    has_docstrings,
    instruction_sources,
    pretraining_sources,
    self_tasks,
    task_sources,
)
from experiments.running.data_sources import datasets, first_rows, task_candidates
from experiments.running.inputs import target_source
from experiments.running.recipes import self_sources
from experiments.running.self_writing import describe as describe_sources
from experiments.running.starts import empty_drafter

ROWS = 2000  # the number of rows read from each source
SMALL = 10_000_000  # local files with fewer bytes are read completely
SHOWN = 3  # the number of rows of each source whose lengths are printed


def show(cfg: DictConfig, stage: str, check: Callable[[DictConfig], object] = lambda cfg: None) -> None:
    """Check the settings as the stage does, and print the models, data and inputs that it would use.

    Raises:
        OSError: a model or a data set cannot be reached.
        ValueError: models, data or settings do not fit together.
        KeyError: a template needs a field that its rows lack.
    """
    check(cfg)
    print(f"dry run of {stage} -> {cfg.out}")
    tokenizer = load_tokenizer(target_source(cfg))
    for line in (*models(cfg, tokenizer), *data(cfg, stage, tokenizer), *inputs(cfg), *batches(cfg, stage)):
        print(f"  {line}")


def models(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Describe the target and the drafter, built on the meta device, and the tokenizer."""
    path, source = cfg.target.path, target_source(cfg)
    check_quantisation(source)
    rows = vocabulary_width(source)
    check_embedding(tokenizer, rows, path)
    target = meta_model(source)
    drafter = empty_drafter(cfg, target)
    ratio = num_active_parameters(drafter) / num_active_parameters(target)
    context = context_limit(source)
    yield f"target {path}: {type(target).__name__}, {counted(target)}, context {context:,}"
    ends = end_of_turn_ids(source, tokenizer)
    template = "with a chat template" if tokenizer.chat_template else "without a chat template: prompts are used as is"
    yield f"tokenizer: {len(tokenizer):,} tokens, {rows:,} rows, ends at {ends}, {template}"
    yield f"drafter: {type(drafter).__name__}, {counted(drafter)}, c = {ratio:.2%}"


def counted(model: PreTrainedModel) -> str:
    """Return the number of parameters as text, and of a mixture of experts also that of the active ones."""
    number, active = num_parameters(model), num_active_parameters(model)
    return f"{number:,} parameters" + (f" ({active:,} active per token)" if active < number else "")


def data(cfg: DictConfig, stage: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Describe the first rows of the sources, or, for later stages, of the prepared data."""

    def describe(name: str, rows: list[Row] | list[str]) -> str:
        length = prompt_length(tokenizer)
        lengths = [len(tokenizer.tokenize(row)) if isinstance(row, str) else length(row) for row in rows[:SHOWN]]
        first = rows[0] if isinstance(rows[0], str) else opening(rows[0])
        return f"{name}: rows of {lengths} tokens; the first begins {first[:60]!r}"

    if stage == "prepare":
        if has_docstrings(cfg):
            yield f"data: {len(source_files(list(cfg.data.packages))):,} files of {len(cfg.data.packages)} packages"
        else:
            written = {(one.part, one.name) for one in self_sources(cfg)}
            for name, text in pretraining_sources(cfg).items():
                if isinstance(text, Docstrings):
                    yield f"text {name}: {len(source_files(list(text.packages))):,} files of {text.packages}"
                elif ("text", name) not in written:
                    yield describe(text.path, first_texts(text))
            yield from describe_sources(cfg, tokenizer)
            every = instruction_sources(cfg)
            sources = {name: one for name, one in every.items() if ("instructions", name) not in written}
            if sources:
                streams = datasets(cfg, lambda text: True, SeenTexts()).instructions
                weights = {name: one.weight for name, one in sources.items()}
                limited = {name: first_rows(streams[name], _rows(one)) for name, one in sources.items()}
                selection = choose_instructions(cfg, limited, weights, tokenizer)
            for name, one in sources.items():
                rows = [row for split in selection.rows.values() for row in split if row["kind"] == name]
                yield f"{describe(one.path, rows)} ({selection.tallies[name]})"
        for name, asked in self_tasks(cfg).items():
            yield f"task {name}: held-out instructions of {asked}"
        tasks = task_sources(cfg)
        prompts = {name: first_rows(task_candidates(one, name), _rows(one)) for name, one in tasks.items()}
        for name, chosen in (choose_prompts(cfg, prompts, tokenizer) if prompts else {}).items():
            yield f"{describe(f'task {name}, {tasks[name].path}', chosen.rows[name])} ({chosen.tallies[name]})"
    elif "data" in cfg.inputs and (prepared := Path(cfg.inputs.data) / "instructions.jsonl").exists():
        yield describe(str(prepared), read_instructions(prepared))


def _rows(source: Source) -> int:
    """Return how many rows of a source are read: all rows if it is small."""
    if source.is_local and sum(file.stat().st_size for file in find_files(source.path)) < SMALL:
        return sys.maxsize
    return ROWS


def first_texts(source: Source) -> list[str]:
    """Return the texts of the first rows of a source.

    Raises:
        ValueError: no row has a text.
    """
    limit = _rows(source)
    texts = [entry.text for entry in islice(entries(source, speakers=None), limit) if entry.text]
    if not texts:
        raise ValueError(f"the corpus is empty: {source.path} has no row that its settings choose")
    return texts


def inputs(cfg: DictConfig) -> Iterator[str]:
    """Say which input directories exist and which ones an earlier stage still has to make."""
    for name, path in cfg.inputs.items():
        if path and "://" not in path:
            exists = (Path(path) / MANIFEST).exists() or (Path(path) / "config.json").exists()
            yield f"{name}: {path} {'exists' if exists else 'does not exist yet: an earlier stage makes it'}"


def batches(cfg: DictConfig, stage: str) -> Iterator[str]:
    """Say how a batch of training is divided over the ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if stage in ("pretrain", "finetune"):
        size = cfg[stage].batch_size
        if size < ranks:
            raise ValueError(f"{stage}.batch_size is {size}, less than one sample for each of {ranks} ranks")
        pieces = cfg.trainer.accumulate_grad_batches
        yield f"batches of {size} samples over {ranks} ranks, {pieces} to an optimizer step"
