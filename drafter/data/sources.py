"""Read sources of text and prompts, local files or hub datasets, and fill their templates from each row."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from typing import Any, NamedTuple

from drafter.artifacts.manifest import digest, sha256
from drafter.data.conversations import Conversation, UnusableConversation, read_conversation
from drafter.data.files import LocatedRow, find_files, is_local, read_file
from drafter.data.templates import USERS, AbsentField, absent, matches, parse, render

LOOKAHEAD = 1000  # the number of rows read to learn which fields there are


@dataclass(frozen=True)
class Source:
    """Where rows are, and the templates that turn a row into text.

    Attributes:
        path: a local file, folder or pattern, or the name of a hub dataset.
        template: makes the text or the prompt of a row.
        split: the split of a hub dataset. Local files are read completely.
        name: the config of a hub dataset.
        revision: the revision of a hub dataset.
        where: field -> the value that a row must have to be used.
        reference: a template that makes the reference answer of a row.
        weight: how often the source is drawn from, relative to the other sources.
        kind: "files" if templates make the text of a row; "conversations" if a row has messages, which are instructions
            as they are (see conversations.read_conversation).
    """

    path: str
    template: str = ""
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    weight: float = 1.0
    kind: str = "files"

    @property
    def is_local(self) -> bool:
        """Return whether the source consists of local files."""
        return is_local(self.path)

    def identity(self, name: str) -> dict[str, Any]:
        """Return what determines the rows of the source of this name, except the content and path of local files."""
        hub = {} if self.is_local else {"path": self.path, "split": self.split, "name": self.name}
        hub |= {} if self.is_local else {"revision": self.revision}
        templates = {
            "template": self.template,
            "where": self.where,
            "reference": self.reference,
            "weight": float(self.weight),
        }
        kind = {} if self.kind == "files" else {"kind": self.kind}
        return {"label": name, **hub, **templates, **kind}

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with the content of the local files."""
        return digest([sha256(file) for file in find_files(self.path)])


class Entry(NamedTuple):
    """The text and the reference answer of a row, or the reason why the row is left out."""

    number: int
    text: str
    reference: str
    left_out: str | None
    absent: list[str]


def source_of(settings: Mapping[str, Any], owner: str) -> Source:
    """Return a source with these settings.

    Args:
        settings: the fields of a `Source`.
        owner: the config key of the settings, for errors.

    Raises:
        ValueError: a setting is unknown, missing or out of range, or a template cannot be parsed.
    """
    known = [one.name for one in fields(Source)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{owner} has {unknown}; a source has {known}")
    needed = ("path",) if settings.get("kind") == "conversations" else ("path", "template")
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(f"{owner} has no {missing[0]}: give it as {owner}.{missing[0]}=...")
    source = Source(**settings)
    if source.kind not in ("files", "conversations"):
        raise ValueError(f"{owner}.kind is '{source.kind}', must be files or conversations")
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
        FileNotFoundError: the path looks like local files, and there is none; or it is the name of a dataset that the
            hub does not have, or the hub cannot be reached.
        ValueError: a file has an unknown format or, during iteration, a row cannot be read.
    """
    return (row.fields for row in located_rows(path, split, name, revision))


def located_rows(path: str, split: str, name: str | None, revision: str | None) -> Iterator[LocatedRow]:
    """Stream rows like `read_rows`, each with its location."""
    if is_local(path):
        return chain.from_iterable(map(read_file, find_files(path)))
    import datasets  # takes four seconds to import, and is needed only here

    try:
        rows = datasets.load_dataset(path, name, split=split, revision=revision, streaming=True)
    except OSError as problem:
        raise FileNotFoundError(
            f"'{path}' is no file or folder here, and no dataset that the hub has (or the hub cannot be reached): give "
            f"a file such as prompts.jsonl, a folder, or the name of a dataset"
        ) from problem
    return (LocatedRow(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def entries(source: Source, speakers: Collection[str] | None = USERS) -> Iterator[Entry]:
    """Yield the text and the reference answer of each row, in order.

    A field that only some rows lack is empty in those rows. A field that none of the first thousand rows has is taken
    for a mistake.

    Args:
        source: where the rows are, and their templates.
        speakers: the speakers whose turns may be used as prompts, or None for any; see `templates.render`.

    Raises:
        AbsentField: none of the first rows has a field of a template.
        ValueError: a row cannot be read, or its field is not text; names its location.
    """
    rows = located_rows(source.path, source.split, source.name, source.revision)
    first = list(islice(rows, LOOKAHEAD))
    templates = [source.template, *filter(None, [source.reference])]
    known = {name for template in templates for name in _require_fields(template, first)}
    for number, (location, row) in enumerate(chain(first, rows)):
        try:
            if not matches(row, source.where):
                yield Entry(number, "", "", "filtered by where", [])
                continue
            text = render(source.template, row, known, speakers)
            reference = render(source.reference, row, known, None) if source.reference and text else ""
            lacking = [name for template in templates for name in absent(template, row)]
        except ValueError as problem:
            raise type(problem)(f"{location}: {problem}") from None
        yield Entry(number, text, reference, None if text else "empty", lacking)


def conversations(source: Source) -> Iterator[tuple[int, Conversation | str]]:
    """Yield the number of each row with its conversation, or with the reason why it is left out, in order.

    Raises:
        ValueError: a row cannot be read; the error names its location.
    """
    for number, (_, row) in enumerate(located_rows(source.path, source.split, source.name, source.revision)):
        try:
            yield number, read_conversation(row) if matches(row, source.where) else "filtered by where"
        except UnusableConversation as problem:
            yield number, problem.reason


def _require_fields(template: str, rows: list[LocatedRow]) -> set[str]:
    """Return the fields of a template, after checking that each of them occurs in some row.

    Raises:
        AbsentField: no row has one of the fields.
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
            raise AbsentField(
                f"{rows[0].location}: {problem}, and neither do the others of the first {len(rows)} rows"
            ) from None
    return names
