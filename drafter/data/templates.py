r"""Fill templates such as "Summarise:\n\n{article}" from rows.

A field is written {name}, or {name[key][0]} for a value inside it. A literal brace is doubled: {{ and }}. A field that
is null or NaN is empty, and a text is empty if all its fields are. A value must be text, a number or a date; anything
else is refused, because its Python representation is not text that somebody wrote.
"""

import re
from collections.abc import Collection
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from string import Formatter
from typing import Any, NamedTuple

USERS = frozenset({"user", "human", "prompter"})
PATH = re.compile(r"([^\[\]{}\"'\s](?:[^\[\]{}\"']*[^\[\]{}\"'\s])?)((?:\[[^\[\]]+\])*)")


class Field(NamedTuple):
    """A field of a template: the text before it, its name as written, the keys and indices to it, and its format."""

    before: str
    name: str
    steps: tuple[str, ...]
    spec: str


class AbsentField(KeyError, ValueError):
    """A row lacks a field of its template."""

    def __str__(self) -> str:
        return str(self.args[0])


@lru_cache
def parse(template: str) -> tuple[tuple[Field, ...], str]:
    """Return the fields of a template, and the text after the last one.

    Raises:
        ValueError: braces do not enclose a field, or the template has no field.
    """
    remedy = "a field is written {name} or {name[key]}, and a literal brace is doubled: {{ and }}"
    fields, before = [], ""
    try:
        for literal, name, spec, conversion in Formatter().parse(template):
            before += literal
            if name is not None:
                found = PATH.fullmatch(name)
                if not found or conversion or "{" in (spec or ""):
                    raise ValueError(f"'{name}' is not a field")
                fields.append(Field(before, name, (found[1], *re.findall(r"\[(.+?)\]", found[2])), spec or ""))
                before = ""
    except ValueError as problem:
        raise ValueError(f"template {template!r}: {problem}; {remedy}") from None
    if not fields:
        raise ValueError(f"template {template!r} has no field and would make the same text of every row; {remedy}")
    return tuple(fields), before


def render(
    template: str, row: dict[str, Any], known: Collection[str] = (), speakers: Collection[str] | None = USERS
) -> str:
    """Fill a template from a row and strip the result. Return "" if all fields are empty.

    Args:
        template: the template.
        row: the values of the fields.
        known: fields that other rows have. If this row lacks one of them, the field is empty.
        speakers: the values of `role` or `from` that the turn of a conversation may have, or None for any.

    Raises:
        AbsentField: the row lacks a field of the template that is not in `known`.
        ValueError: a field is not text, or is a turn of another speaker.
    """
    fields, end = parse(template)
    text, is_empty = "", True
    for field in fields:
        try:
            value = _text(_value(row, field, speakers), field)
        except AbsentField as absent:
            if field.name not in known:
                raise AbsentField(
                    f"template {template!r} needs the field {absent}; the row has {sorted(row)}"
                ) from None
            value = ""
        text += field.before + value
        is_empty = is_empty and not value.strip()
    return "" if is_empty else (text + end).strip()


def absent(template: str, row: dict[str, Any]) -> list[str]:
    """Return the fields of a template that a row lacks."""
    lacking = []
    for field in parse(template)[0]:
        try:
            _value(row, field, None)
        except AbsentField:
            lacking.append(field.name)
        except ValueError:
            continue  # the field exists, and `render` will refuse its value
    return lacking


def matches(row: dict[str, Any], where: dict[str, Any]) -> bool:
    """Return whether every field of `where` has the given value in the row.

    Cells of a CSV file are text. Therefore null in `where` also matches an empty cell, and a number matches its digits.
    """
    return all(_equals(row.get(field), wanted) for field, wanted in where.items())


def _equals(value: Any, wanted: Any) -> bool:
    if isinstance(value, str) and not isinstance(wanted, str):
        return value == ("" if wanted is None else str(wanted))
    return bool(value == wanted)


def _value(row: dict[str, Any], field: Field, speakers: Collection[str] | None) -> Any:
    """Return the value of a field; None if there is a null on the way to it."""
    value: Any = row
    for number, step in enumerate(field.steps):
        if value is None:
            return None
        if isinstance(value, dict):
            if step not in value:
                raise AbsentField(repr(step))
            if number and number == len(field.steps) - 1:
                _check_speaker(value, field, speakers)
            value = value[step]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", step):
            if not -len(value) <= int(step) < len(value):
                raise ValueError(f"the field {{{field.name}}} needs item [{step}] of a list of {len(value)} items")
            value = value[int(step)]
        else:
            raise ValueError(f"the field {{{field.name}}} needs [{step}] of {_describe(value)}, which has none")
    return value


def _check_speaker(turn: dict[str, Any], field: Field, speakers: Collection[str] | None) -> None:
    for key in ("role", "from"):
        if speakers is not None and isinstance(turn.get(key), str) and turn[key] not in speakers:
            raise ValueError(
                f"the field {{{field.name}}} is a turn whose '{key}' is '{turn[key]}', not the user's "
                f"({', '.join(sorted(speakers))}): exclude the row by `where`, or name the user's turn"
            )


def _text(value: Any, field: Field) -> str:
    if value is None or value != value:  # pandas writes NaN for a null in a column of numbers
        return ""
    if not isinstance(value, (str, int, float, Decimal, date, time)):
        raise ValueError(
            f"the field {{{field.name}}} is {_describe(value)} where text is expected: name a field inside it"
        )
    text = format(value, field.spec) if field.spec else str(value)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(
            f"the field {{{field.name}}} has half of a surrogate pair, which is not a character: correct the row"
        )
    return text


def _describe(value: Any) -> str:
    return f"{'an' if isinstance(value, int) else 'a'} {type(value).__name__} ({str(value)[:60]})"
