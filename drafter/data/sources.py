"""Sources of text and prompts, local files or datasets of the hub, and what their templates make of each row."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from typing import Any, NamedTuple

from drafter.artifacts.manifest import digest, sha256
from drafter.data.files import PlacedRow, find_files, is_local, read_file
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
        weight: how often it is drawn from, relative to the other sources.
    """

    path: str
    template: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    weight: float = 1.0

    @property
    def is_local(self) -> bool:
        """Whether it means local files."""
        return is_local(self.path)

    def identity(self, name: str) -> dict[str, Any]:
        """Return what determines the rows of the source of this name, except the content and path of local files."""
        hub = {} if self.is_local else {"path": self.path, "split": self.split, "name": self.name}
        hub |= {} if self.is_local else {"revision": self.revision}
        made = {
            "template": self.template,
            "where": self.where,
            "reference": self.reference,
            "weight": float(self.weight),
        }
        return {"label": name, **hub, **made}

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
    """Return a source with these settings; `owner` is the config key that errors name.

    Raises:
        ValueError: a setting is unknown, missing or out of its range, or a template cannot be parsed.
    """
    known = [one.name for one in fields(Source)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{owner} has {unknown}; a source has {known}")
    if missing := [name for name in ("path", "template") if name not in settings]:
        raise ValueError(f"{owner} has no {missing[0]}: give it as {owner}.{missing[0]}=...")
    source = Source(**settings)
    if source.weight <= 0:
        raise ValueError(f"{owner}.weight is {source.weight}, must be above 0")
    for template in filter(None, (source.template, source.reference)):
        parse(template)
    return source


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
