"""Stage 0: text, instructions and evaluation prompts in the target's tokens. Config: conf/prepare.yaml."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from drafter.artifacts import write_jsonl
from drafter.corpus import Doc, extract, is_heldout, pack, pretraining_texts
from drafter.fingerprints import tokenizer_fingerprint
from drafter.instructions import IN_DOMAIN, derive
from drafter.loading import load_tokenizer
from drafter.prompts import encode_prompt
from drafter.sources import matches, read_rows, render
from experiments import dry_run
from experiments.commands import command
from experiments.inputs import claim, plain, target_source

log = logging.getLogger(__name__)
Row = dict[str, Any]


@command("prepare")
def main(cfg: DictConfig) -> None:
    """Write train.npy and heldout.npy, instructions.jsonl and tasks.jsonl."""
    if cfg.dry_run:
        return dry_run.show(cfg, "prepare")
    settings = {"prepare": plain(cfg.prepare), "data": plain(cfg.data), "task": plain(cfg.task), "seed": cfg.seed}
    inputs = {"tokenizer": tokenizer_fingerprint(target_source(cfg))}
    stage = claim(cfg, "prepare", settings, inputs)
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    tokenizer = load_tokenizer(target_source(cfg))
    texts, instructions, tasks = docstrings(cfg) if "packages" in cfg.data else datasets(cfg)

    def fits(row: Row) -> bool:
        return len(encode_prompt(tokenizer, row["prompt"])) <= cfg.prepare.max_prompt_tokens

    wanted = {
        "train": cfg.prepare.instructions,
        "validation": cfg.prepare.instructions and cfg.prepare.instructions // 10,
    }
    chosen = [
        {**row, "split": split}
        for split in ("train", "validation")
        for row in islice(filter(fits, instructions[split]), wanted[split])
    ]
    prompts = [
        {**row, "task": task}
        for task in tasks
        for row in islice(filter(fits, tasks[task]), cfg.prepare.prompts_per_task)
    ]
    if not chosen or not prompts:
        raise ValueError(f"data '{cfg.data.name}' gave {len(chosen)} instructions and {len(prompts)} task prompts")
    write_jsonl(stage.directory / "instructions.jsonl", chosen)
    write_jsonl(stage.directory / "tasks.jsonl", prompts)
    counts = {"instructions": len(chosen), "prompts": len(prompts)}
    for part, limit in (("train", cfg.prepare.pretraining_tokens), ("heldout", cfg.prepare.heldout_tokens)):
        written = pack(stage.directory / f"{part}.npy", texts[part], tokenizer, tokenizer.eos_token_id, limit)
        if written == 0:
            raise ValueError(f"the corpus is empty: data '{cfg.data.name}' gave no {part} text")
        counts[f"{part}_tokens"] = written
    stage.finish(counts=counts)
    log.info("%s: %s", cfg.out, counts)


def docstrings(cfg: DictConfig) -> tuple[dict[str, Iterator[str]], dict[str, Iterator[Row]], dict[str, Iterator[Row]]]:
    """Text by part, instructions by split and prompts by task, from the docstrings of installed packages.

    Held-out names are shared by a second hash: two thirds for the tasks, a third for validation.
    """
    docs = extract(list(cfg.data.packages), workers=2)
    order = np.random.default_rng(cfg.seed).permutation(len(docs))
    parts: dict[str, list[Doc]] = {"train": [], "validation": [], "task": []}
    for index in order:
        name = docs[index].name
        heldout = "validation" if is_heldout("validation:" + name, 33) else "task"
        parts[heldout if is_heldout(name, cfg.data.heldout_percent) else "train"].append(docs[index])
    texts = {
        "train": pretraining_texts(parts["train"], cfg.data.code_share),
        "heldout": pretraining_texts(parts["validation"], cfg.data.code_share),
    }
    instructions = {split: _rows(parts[split], IN_DOMAIN) for split in ("train", "validation")}
    tasks = {task: _rows(parts["task"], (task,)) for task in cfg.task}
    return texts, instructions, tasks


def _rows(docs: list[Doc], kinds: tuple[str, ...]) -> Iterator[Row]:
    """One instruction a documented object, its kinds in turn, so that no object is asked about twice."""
    for number, doc in enumerate(docs):
        found = {row.kind: row for row in derive(doc) if row.kind in kinds}
        if found:
            row = list(found.values())[number % len(found)]
            yield {"id": f"{row.kind}:{row.name}", "kind": row.kind, "prompt": row.prompt, "reference": row.reference}


def datasets(cfg: DictConfig) -> tuple[dict[str, Iterator[str]], dict[str, Iterator[Row]], dict[str, Iterator[Row]]]:
    """The same three from files or hub datasets; the split of a row is decided by a hash of its text."""

    def text(part: str) -> Iterator[str]:
        source = cfg.data.pretraining
        rows = (render(source.template, row) for row in _read(source))
        return (row for row in rows if is_heldout(row, cfg.data.heldout_percent) == (part == "heldout"))

    def instructions(split: str) -> Iterator[Row]:
        for source in cfg.data.instructions:
            for number, row in enumerate(_read(source)):
                prompt = render(source.template, row) if matches(row, source.where) else ""
                if prompt and is_heldout(prompt, cfg.data.heldout_percent) == (split == "validation"):
                    name = Path(source.path).stem
                    reference = render(source.reference, row) if source.get("reference") else ""
                    yield {"id": f"{name}:{number}", "kind": name, "prompt": prompt, "reference": reference}

    def task(name: str) -> Iterator[Row]:
        for number, row in enumerate(_read(cfg.task[name])):
            yield {"id": f"{name}:{number}", "kind": name, "prompt": render(cfg.task[name].template, row)}

    return (
        {part: text(part) for part in ("train", "heldout")},
        {split: instructions(split) for split in ("train", "validation")},
        {name: task(name) for name in cfg.task},
    )


def _read(source: DictConfig) -> Iterator[Row]:
    return read_rows(source.path, source.split, source.name, source.revision)


if __name__ == "__main__":
    main()
