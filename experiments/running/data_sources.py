"""Read the data to prepare: docstrings of installed packages, or local files and hub datasets."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from drafter.data.conversations import opening
from drafter.data.corpus import Doc, extract, is_heldout, pretraining_texts
from drafter.data.instructions import IN_DOMAIN, derive
from drafter.data.selection import Candidate, Tally
from drafter.data.sources import Source, conversations, entries, source_of
from experiments.running.inputs import plain
from experiments.running.progress import Progress

KINDS = ("docstrings", "files")
# The settings of a task that only evaluation reads.
DECODING = ("temperature", "top_p", "top_k", "max_new_tokens", "in_domain")


class Data(NamedTuple):
    """The texts by part with their tallies, the candidate instructions by source and the candidate prompts by task."""

    texts: dict[str, Iterator[str]]
    text_tallies: dict[str, Tally]
    instructions: dict[str, Iterator[Candidate]]
    weights: dict[str, float]
    tasks: dict[str, Iterator[Candidate]]


def has_docstrings(cfg: DictConfig) -> bool:
    """Return whether the data are docstrings of installed packages, rather than files and hub datasets.

    Raises:
        ValueError: data.kind is neither "docstrings" nor "files".
    """
    if cfg.data.kind not in KINDS:
        raise ValueError(f"data.kind is '{cfg.data.kind}', must be one of {', '.join(KINDS)}")
    return bool(cfg.data.kind == "docstrings")


def instruction_sources(cfg: DictConfig) -> dict[str, Source]:
    """Return the sources of instructions by name; the name is also the `kind` of each row.

    Raises:
        ValueError: there is no source, or a setting is wrong.
    """
    sources = {
        name: source_of({"template": "{prompt}", **settings}, f"data.instructions.{name}")
        for name, settings in plain(cfg.data.instructions).items()
    }
    if not sources:
        raise ValueError("data.instructions is empty: give it one source or more")
    return sources


def pretraining_source(cfg: DictConfig) -> Source:
    """Return the source of the pretraining text."""
    return source_of(plain(cfg.data.pretraining), "data.pretraining")


def task_sources(cfg: DictConfig) -> dict[str, Source]:
    """Return the sources of the tasks that have one. A task on docstrings has none; its path is null.

    Raises:
        ValueError: a task has no path although the data are not docstrings, or a setting is wrong.
    """
    found = {}
    for name, settings in plain(cfg.task).items():
        if "path" not in settings:
            raise ValueError(
                f"task.{name} has no path: give it as task.{name}.path=..., or null to ask about docstrings"
            )
        if settings["path"] is not None:
            fields = {key: value for key, value in settings.items() if key not in DECODING}
            found[name] = source_of(fields, f"task.{name}")
        elif not has_docstrings(cfg):
            raise ValueError(
                f"task.{name}.path is null, and data={cfg.data.name} has no docstrings to ask about: task=files"
            )
    return found


def identity(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings that determine the prepared data, and the fingerprints of local files by their purpose.

    How a task is decoded belongs to evaluation. The content of a local file counts, not its path.
    """
    tasks, sources = task_sources(cfg), {}
    settings: dict[str, Any] = {"prepare": plain(cfg.prepare), "seed": cfg.seed}
    settings["task"] = {name: tasks[name].identity(name) if name in tasks else {} for name in cfg.task}
    if has_docstrings(cfg):
        settings["data"] = plain(cfg.data)
    else:
        text, asked = pretraining_source(cfg), instruction_sources(cfg)
        settings["data"] = {
            "kind": cfg.data.kind,
            "name": cfg.data.name,
            "heldout_percent": cfg.data.heldout_percent,
            "pretraining": text.identity("pretraining"),
            "instructions": [source.identity(name) for name, source in asked.items()],
        }
        sources = {"pretraining": text} | {f"instructions {name}": source for name, source in asked.items()}
    sources |= {f"task {name}": source for name, source in tasks.items()}
    return settings, {name: source.fingerprint() for name, source in sources.items() if source.is_local}


def gather(cfg: DictConfig, encodes: Callable[[str], bool]) -> Data:
    """Return the data that the config names, without the texts that `encodes` refuses."""
    data = docstrings(cfg, encodes) if has_docstrings(cfg) else datasets(cfg, encodes)
    return data._replace(
        tasks={**data.tasks, **{name: task_candidates(one, name) for name, one in task_sources(cfg).items()}}
    )


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


def datasets(cfg: DictConfig, encodes: Callable[[str], bool]) -> Data:
    """Return text and instructions from sources. A hash of its text decides the split of a row."""
    percent, source, asked = cfg.data.heldout_percent, pretraining_source(cfg), instruction_sources(cfg)
    tallies = {"train": Tally(), "heldout": Tally()}

    def text(part: str) -> Iterator[str]:
        for entry in entries(source, speakers=None):
            tallies[part].absent.update(entry.absent)
            other = not entry.left_out and is_heldout(entry.text, percent) != (part == "heldout")
            left_out = entry.left_out or ("of the other part" if other else None)
            yield from count_texts([entry.text], part, tallies[part], encodes, left_out)

    def of_source(name: str) -> Iterator[Candidate]:
        if asked[name].kind == "conversations":
            yield from conversation_candidates(asked[name], name, percent)
            return
        for entry in entries(asked[name]):
            split = "validation" if is_heldout(entry.text, percent) else "train"
            row = {"id": f"{name}:{entry.number}", "kind": name, "prompt": entry.text, "reference": entry.reference}
            yield Candidate(row, split, entry.left_out, tuple(entry.absent))

    streams = {name: of_source(name) for name in asked}
    weights = {name: one.weight for name, one in asked.items()}
    return Data({part: text(part) for part in tallies}, tallies, streams, weights, {})


def conversation_candidates(source: Source, name: str, percent: float, split: str | None = None) -> Iterator[Candidate]:
    """Yield the candidates of a source of conversations.

    Args:
        source: the source.
        name: its name, which is the kind of its rows.
        percent: the share of conversations for validation, by a hash of the user's first message.
        split: the split of all rows, in the place of the one by the hash.
    """
    for number, found in conversations(source):
        row: dict[str, Any] = {"id": f"{name}:{number}", "kind": name}
        if isinstance(found, str):
            yield Candidate(row, split or "train", found)
            continue
        row |= {"messages": found.messages} | ({"tools": found.tools} if found.tools else {})
        by_hash = "validation" if is_heldout(opening(row), percent) else "train"
        yield Candidate(row, split or by_hash)


def task_candidates(source: Source, name: str) -> Iterator[Candidate]:
    """Yield the candidate prompts of a task."""
    if source.kind == "conversations":
        yield from conversation_candidates(source, name, 0, name)
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
        reason = left_out or (None if encodes(text) else "with control tokens that cannot be encoded as text")
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
