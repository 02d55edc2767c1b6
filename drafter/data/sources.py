"""Sources of text and prompts, local files or datasets of the hub, and what their templates make of each row."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from drafter.artifacts.manifest import digest, sha256
from drafter.data.files import COMPRESSIONS, PlacedRow, find_files, is_local, kind, read_file
from drafter.data.templates import USERS, AbsentField, absent, matches, parse, render

LOOKAHEAD = 1000  # rows that are read to learn which fields there are


@dataclass(frozen=True)
class Source:
    """Where rows are, and what is made of them.

    Attributes:
        path: a local file, folder or pattern, or a dataset of the hub.
        split: of a hub dataset, as `name` (its config) and `revision` are; local files are read whole.
        template: the text or prompt that a row makes.
        where: field -> the value that a row must have to be used.
        reference: a template of the answer that the data have.
        label: what the source is called, in ids and as a kind; None: after its path.
        weight: how often it is drawn from, relative to the other sources.
    """

    path: str
    template: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    label: str | None = None
    weight: float = 1.0

    @property
    def is_local(self) -> bool:
        """Whether it means local files."""
        return is_local(self.path)

    def identity(self, label: str) -> dict[str, Any]:
        """What determines the rows, but for the content of local files, whose path may change."""
        hub = {} if self.is_local else {"path": self.path, "split": self.split, "name": self.name}
        hub |= {} if self.is_local else {"revision": self.revision}
        made = {
            "template": self.template,
            "where": self.where,
            "reference": self.reference,
            "weight": float(self.weight),
        }
        return {"label": label, **hub, **made}

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the content of the local files."""
        return digest([sha256(file) for file in find_files(self.path)])


class Entry(NamedTuple):
    """What a source's templates make of a row; `left_out` says why there is nothing."""

    number: int
    text: str
    reference: str
    left_out: str | None
    absent: list[str]


def source_of(settings: Mapping[str, Any], owner: str) -> Source:
    """A source from its settings; `owner` is what an error calls them.

    Raises:
        ValueError: an unknown setting, a value out of its range, or a template that is none.
    """
    known = [one.name for one in fields(Source)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{owner} has {unknown}; a source has {known}")
    source = Source(**settings)
    if source.weight <= 0:
        raise ValueError(f"{owner}.weight is {source.weight}, must be above 0")
    for template in filter(None, (source.template, source.reference)):
        parse(template)
    return source


def labels(sources: Sequence[Source]) -> list[str]:
    """What each source is called: its label, or its file's name with as many folders as tell it from the others.

    Raises:
        ValueError: two sources cannot be told apart.
    """
    depths = [1] * len(sources)
    while True:
        names = [
            source.label or "/".join(_parts(source.path)[-depth:])
            for source, depth in zip(sources, depths, strict=True)
        ]
        doubled = [number for number, name in enumerate(names) if names.count(name) > 1]
        if not doubled:
            return names
        longer = [
            number
            for number in doubled
            if not sources[number].label and depths[number] < len(_parts(sources[number].path))
        ]
        if not longer:
            paths = [sources[number].path for number in doubled]
            raise ValueError(f"the sources {paths} are both '{names[doubled[0]]}': give one of them another label")
        for number in longer:
            depths[number] += 1


def _parts(path: str) -> tuple[str, ...]:
    """The folders and the stem of a path, without those that a pattern leaves open."""
    *folders, last = Path(path).parts
    while kind(last) and Path(last).suffix in COMPRESSIONS:
        last = Path(last).stem
    parts = [*folders, Path(last).stem]
    if any(mark in path for mark in "*?"):
        parts = [re.sub(r"[*?]", "", part).strip("-_.") for part in parts]
    return tuple(part for part in parts if part and part not in ("/", "~", "..")) or (path,)


def read_rows(
    path: str, split: str = "train", name: str | None = None, revision: str | None = None
) -> Iterator[dict[str, Any]]:
    """Stream the rows of local files (see `find_files`), or of a split of a hub dataset.

    Raises:
        FileNotFoundError: a path that looks like files has none.
        ValueError: a file is of another kind; later, a row that cannot be read.
    """
    return (row.fields for row in placed_rows(path, split, name, revision))


def placed_rows(path: str, split: str, name: str | None, revision: str | None) -> Iterator[PlacedRow]:
    """`read_rows`, each with its place."""
    if is_local(path):
        return chain.from_iterable(map(read_file, find_files(path)))
    import datasets  # takes four seconds: paid only by those who read one

    rows = datasets.load_dataset(path, name, split=split, revision=revision, streaming=True)
    return (PlacedRow(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def entries(source: Source, speakers: Collection[str] | None = USERS) -> Iterator[Entry]:
    """What the templates make of each row, in order.

    A field that some rows lack is empty there. One that none of the first thousand rows has is taken for a mistake.

    Args:
        speakers: whose turn of a conversation a prompt may be.

    Raises:
        AbsentField: no row has a field of a template.
        ValueError: a row that cannot be read, or whose field is no text, by its place.
    """
    rows = placed_rows(source.path, source.split, source.name, source.revision)
    first = list(islice(rows, LOOKAHEAD))
    templates = [source.template, *filter(None, [source.reference])]
    known = {name for template in templates for name in _known(template, first)}
    for number, (place, row) in enumerate(chain(first, rows)):
        try:
            if not matches(row, source.where):
                yield Entry(number, "", "", "filtered by where", [])
                continue
            text = render(source.template, row, known, speakers)
            reference = render(source.reference, row, known, None) if source.reference and text else ""
            lacking = [name for template in templates for name in absent(template, row)]
        except ValueError as problem:
            raise type(problem)(f"{place}: {problem}") from None
        yield Entry(number, text, reference, None if text else "empty", lacking)


def _known(template: str, rows: list[PlacedRow]) -> set[str]:
    """The fields of a template, each of which some of these rows have.

    Raises:
        AbsentField: none of them has a field.
    """
    names = {one.name for one in parse(template)[0]}
    lacking = set(names)
    for row in rows:
        if not lacking:
            break
        lacking &= set(absent(template, row.fields))
    if lacking and rows:
        try:
            render(template, rows[0].fields, names - lacking, None)
        except AbsentField as problem:
            raise AbsentField(f"{rows[0].place}: {problem}, and so for all of the first {len(rows)} rows") from None
    return names
