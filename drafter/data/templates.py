r"""The text that a template such as "Summarise:\n\n{article}" makes of a row.

A field is written {name}, or {name[key][0]} inside of another; a literal brace is doubled: {{ and }}. A null (or NaN)
field is empty, and a text all of whose fields are empty is empty itself. Anything but text, a number or a date where
text is expected is refused: its Python form is nothing that anybody wrote.
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
    """A field of a template: the text before it, its name as written, the steps to it, and how it is formatted."""

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
    """The fields of a template, and the text behind the last.

    Raises:
        ValueError: braces that are no field's; a template without any field.
    """
    remedy = "a field is written {name} or {name[key]}, and a literal brace is doubled: {{ and }}"
    fields, before = [], ""
    try:
        for literal, name, spec, conversion in Formatter().parse(template):
            before += literal
            if name is not None:
                found = PATH.fullmatch(name)
                if not found or conversion or "{" in (spec or ""):
                    raise ValueError(f"'{name}' is no field")
                fields.append(Field(before, name, (found[1], *re.findall(r"\[(.+?)\]", found[2])), spec or ""))
                before = ""
    except ValueError as problem:
        raise ValueError(f"template {template!r}: {problem}; {remedy}") from None
    if not fields:
        raise ValueError(f"template {template!r} has no field, so that it makes the same text of every row; {remedy}")
    return tuple(fields), before


def render(
    template: str, row: dict[str, Any], known: Collection[str] = (), speakers: Collection[str] | None = USERS
) -> str:
    """Fill a template from a row, and strip it; "" where all its fields are empty.

    Args:
        known: fields that other rows have: where this one lacks them, they are empty.
        speakers: whose turn a field inside of a conversation may be, by its `role` or `from`; None: anybody's.

    Raises:
        AbsentField: the row lacks a field of the template.
        ValueError: a field is no text, or somebody else's turn.
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
    """The fields of a template that a row lacks."""
    lacking = []
    for field in parse(template)[0]:
        try:
            _value(row, field, None)
        except AbsentField:
            lacking.append(field.name)
        except ValueError:
            continue  # it is there, and `render` refuses it
    return lacking


def matches(row: dict[str, Any], where: dict[str, Any]) -> bool:
    """Whether every field of `where` has the given value in the row.

    A null there stands for an empty cell too, and a number for its digits, since every cell of a CSV is text.
    """
    return all(_is(row.get(field), wanted) for field, wanted in where.items())


def _is(value: Any, wanted: Any) -> bool:
    if isinstance(value, str) and not isinstance(wanted, str):
        return value == ("" if wanted is None else str(wanted))
    return bool(value == wanted)


def _value(row: dict[str, Any], field: Field, speakers: Collection[str] | None) -> Any:
    """What lies at the end of a field's steps; None where there is a null on the way."""
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
            raise ValueError(f"the field {{{field.name}}} needs [{step}] of {_shown(value)}, which has none")
    return value


def _check_speaker(turn: dict[str, Any], field: Field, speakers: Collection[str] | None) -> None:
    for key in ("role", "from"):
        if speakers is not None and isinstance(turn.get(key), str) and turn[key] not in speakers:
            raise ValueError(
                f"the field {{{field.name}}} is a turn whose '{key}' is '{turn[key]}', not the user's "
                f"({', '.join(sorted(speakers))}): leave the row out, or name the user's turn"
            )


def _text(value: Any, field: Field) -> str:
    if value is None or value != value:  # NaN: how pandas writes a null into a column of numbers
        return ""
    if not isinstance(value, (str, int, float, Decimal, date, time)):
        raise ValueError(f"the field {{{field.name}}} is {_shown(value)} where text is expected: name what is in it")
    text = format(value, field.spec) if field.spec else str(value)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(
            f"the field {{{field.name}}} has half of a surrogate pair, which is no character: mend the row"
        )
    return text


def _shown(value: Any) -> str:
    return f"{'an' if isinstance(value, int) else 'a'} {type(value).__name__} ({str(value)[:60]})"
