"""Read the data to prepare: docstrings of installed packages, or local files and hub datasets."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from drafter.data.control_tokens import ControlTokenError
from drafter.data.corpus import Doc, extract, is_heldout, pretraining_texts
from drafter.data.instructions import IN_DOMAIN, derive
from drafter.data.near_duplicates import SeenTexts
from drafter.data.selection import Candidate, Tally
from drafter.data.sources import Entry, Source, conversations, entries
from experiments.running.data_settings import (
    Docstrings,
    by_name,
    has_docstrings,
    instruction_sources,
    pretraining_sources,
    self_tasks,
    task_sources,
)
from experiments.running.progress import Progress
from experiments.running.recipes import INSTRUCTIONS, TEXT


class Data(NamedTuple):
    """The texts by part with their tallies, the candidate instructions by source and the candidate prompts by task.

    The name of a tally is the part, followed by the name of the source if there are several.
    """

    texts: dict[str, Iterator[str]]
    text_tallies: dict[str, Tally]
    instructions: dict[str, Iterator[Candidate]]
    weights: dict[str, float]
    tasks: dict[str, Iterator[Candidate]]


def gather(cfg: DictConfig, encodes: Callable[[str], bool], protected: SeenTexts) -> Data:
    """Return the data that the config names, all to be read when they are needed.

    Args:
        cfg: the config of the stage.
        encodes: texts that it refuses are left out.
        protected: prompts that text of the target must not begin with; filled before the text is read.
    """
    data = docstrings(cfg, encodes) if has_docstrings(cfg) else datasets(cfg, encodes, protected)
    own = {name: task_candidates(one, name) for name, one in task_sources(cfg).items()}
    heldout = {name: heldout_prompts(cfg, source, name) for name, source in self_tasks(cfg).items()}
    return data._replace(tasks={**data.tasks, **own, **heldout})


def docstrings(cfg: DictConfig, encodes: Callable[[str], bool]) -> Data:
    """Return text, instructions and prompts from the docstrings of installed packages.

    A second hash divides the held-out names: two thirds are for the tasks, one third is for validation.
    """
    with Progress("prepare docstrings", "file") as progress:
        docs = extract(list(cfg.data.packages), workers=2, report=progress)
    order = np.random.default_rng(cfg.seed).permutation(len(docs))
    parts: dict[str, list[Doc]] = {"train": [], "validation": [], "task": []}
    for index in order:
        name = docs[index].name
        heldout = "validation" if is_heldout("validation:" + name, 33) else "task"
        parts[heldout if is_heldout(name, cfg.data.heldout_percent) else "train"].append(docs[index])
    tallies = {"train": Tally(), "heldout": Tally()}
    texts = {
        part: count_texts(pretraining_texts(parts[split], cfg.data.code_share), part, tallies[part], encodes)
        for part, split in (("train", "train"), ("heldout", "validation"))
    }
    train, validation = (questions(parts[split], IN_DOMAIN, split) for split in ("train", "validation"))
    tasks = {task: questions(parts["task"], (task,), task) for task in cfg.task}
    return Data(texts, tallies, {"docstrings": interleave(train, validation)}, {"docstrings": 1.0}, tasks)


def questions(docs: list[Doc], kinds: tuple[str, ...], split: str) -> Iterator[Candidate]:
    """Yield one instruction per documented object, cycling through the kinds, so that no object is used twice."""
    used = set()
    for number, doc in enumerate(docs):
        found = {row.kind: row for row in derive(doc) if row.kind in kinds}
        if found:
            row = list(found.values())[number % len(found)]
            fields = {
                "id": f"{row.kind}:{row.name}",
                "kind": row.kind,
                "prompt": row.prompt,
                "reference": row.reference,
            }
            left_out = "about an object that has an instruction already" if fields["id"] in used else None
            yield Candidate(fields, split, left_out)
            used.add(fields["id"])


def interleave(train: Iterator[Candidate], validation: Iterator[Candidate]) -> Iterator[Candidate]:
    """Yield ten training candidates per validation candidate, so that neither stream is read further than needed."""
    while batch := [*islice(train, 10), *islice(validation, 1)]:
        yield from batch


def datasets(cfg: DictConfig, encodes: Callable[[str], bool], protected: SeenTexts) -> Data:
    """Return text and instructions from sources. A hash of its text decides the split of a row."""
    percent, sources, asked = cfg.data.heldout_percent, pretraining_sources(cfg), instruction_sources(cfg)
    written, written_text = by_name(cfg, INSTRUCTIONS), by_name(cfg, TEXT)
    parts = {part: {name: _tally(part, name) for name in sources} for part in ("train", "heldout")}
    tallies = {tally: Tally() for named in parts.values() for tally in named.values()}

    def text(name: str, part: str) -> Iterator[str]:
        tally = tallies[parts[part][name]]
        for entry in texts_of(sources[name], cfg.seed):
            tally.absent.update(entry.absent)
            other = not entry.left_out and is_heldout(entry.text, percent) != (part == "heldout")
            left_out = entry.left_out or ("of the other part" if other else None)
            if not left_out and name in written_text and protected.begins(entry.text):
                left_out = "with a held-out prompt, or a similar one"
            yield from count_texts([entry.text], part, tally, encodes, left_out)

    def of_source(name: str) -> Iterator[Candidate]:
        if asked[name].kind == "conversations":
            yield from conversation_candidates(asked[name], name, lambda text: ordinary_split(text, percent))
            return
        for entry in entries(asked[name]):
            split = self_split(entry.text, percent) if name in written else ordinary_split(entry.text, percent)
            row = {"id": f"{name}:{entry.number}", "kind": name, "prompt": entry.text, "reference": entry.reference}
            left_out = entry.left_out or ("held out for tasks" if split == "task" else None)
            yield Candidate(row, split, left_out, tuple(entry.absent))

    of_texts = {name: one.weight for name, one in sources.items()}
    texts = {part: mix({name: text(name, part) for name in sources}, of_texts) for part in parts}
    weights = {name: one.weight for name, one in asked.items()}
    return Data(texts, tallies, {name: of_source(name) for name in asked}, weights, {})


def _tally(part: str, name: str) -> str:
    return part if name == "pretraining" else f"{part} {name}"


def mix(streams: Mapping[str, Iterator[str]], weights: Mapping[str, float]) -> Iterator[str]:
    """Yield texts from several sources, next from the one with the fewest characters so far relative to its weight.

    The others go on when a source ends.

    >>> list(mix({"a": iter(["a"] * 3), "b": iter(["b"] * 9)}, {"a": 1.0, "b": 2.0}))
    ['a', 'b', 'b', 'a', 'b', 'b', 'a', 'b', 'b', 'b', 'b', 'b']
    """
    characters = dict.fromkeys(streams, 0)
    while characters:
        name = min(characters, key=lambda name: characters[name] / weights[name])
        text = next(streams[name], None)
        if text is None:
            del characters[name]
        else:
            characters[name] += len(text)
            yield text


def texts_of(source: Source | Docstrings, seed: int) -> Iterator[Entry]:
    """Yield the texts of a source of pretraining text."""
    if isinstance(source, Source):
        yield from entries(source, speakers=None)
        return
    docs = _docs_of_packages(source.packages)
    order = np.random.default_rng(seed).permutation(len(docs))
    for number, text in enumerate(pretraining_texts([docs[index] for index in order], source.code_share)):
        yield Entry(number, text, "", None, [])


@cache
def _docs_of_packages(packages: tuple[str, ...]) -> list[Doc]:
    with Progress("prepare docstrings", "file") as progress:
        return extract(list(packages), workers=2, report=progress)


def ordinary_split(text: str, percent: float) -> str:
    """Return the split of an instruction: "train" or "validation"."""
    return "validation" if is_heldout(text, percent) else "train"


def self_split(text: str, percent: float) -> str:
    """Return the split of an instruction that the target wrote; a half of the held-out ones is for tasks."""
    if not is_heldout(text, percent):
        return "train"
    return ordinary_split(f"validation:{text}", 50).replace("train", "task")


def heldout_prompts(cfg: DictConfig, source: str, task: str) -> Iterator[Candidate]:
    """Yield the instructions that the target wrote and that are in neither the training nor the validation split."""
    for entry in entries(instruction_sources(cfg)[source]):
        row = {"id": f"{task}:{entry.number}", "kind": task, "prompt": entry.text}
        is_for_tasks = self_split(entry.text, cfg.data.heldout_percent) == "task"
        yield Candidate(row, task, entry.left_out if is_for_tasks else "for training or validation")


def conversation_candidates(source: Source, name: str, split_of: Callable[[str], str]) -> Iterator[Candidate]:
    """Yield the candidates of a source of conversations. The user's first message decides the split."""
    for number, found in conversations(source):
        row: dict[str, Any] = {"id": f"{name}:{number}", "kind": name}
        if isinstance(found, str):
            yield Candidate(row, "", found)
            continue
        row |= {"messages": found.messages} | ({"tools": found.tools} if found.tools else {})
        yield Candidate(row, split_of(found.opening()))


def task_candidates(source: Source, name: str) -> Iterator[Candidate]:
    """Yield the candidate prompts or conversations of a task."""
    if source.kind == "conversations":
        yield from conversation_candidates(source, name, lambda text: name)
        return
    for entry in entries(source):
        row = {"id": f"{name}:{entry.number}", "kind": name, "prompt": entry.text}
        yield Candidate(row, name, entry.left_out, tuple(entry.absent))


def count_texts(
    texts: Iterator[str] | list[str],
    part: str,
    tally: Tally,
    encodes: Callable[[str], bool],
    left_out: str | None = None,
) -> Iterator[str]:
    """Yield the texts that are used, and count all texts in the tally."""
    for text in texts:
        tally.read += 1
        reason = left_out or (None if encodes(text) else ControlTokenError.reason)
        if reason:
            tally.left_out[reason] += 1
        else:
            tally.used[part] += 1
            yield text


def first_rows(stream: Iterator[Candidate], number: int) -> Iterator[Candidate]:
    """Yield candidates until `number` of them have passed the `where` filter of their source."""
    for candidate in stream:
        number -= candidate.left_out != "filtered by where"
        yield candidate
        if not number:
            return
