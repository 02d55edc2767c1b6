"""Derive chat instructions with human reference answers from docstrings, for the default setting.

There are four kinds, after the paper's evaluation (section 3): open-ended questions (like Dolly), summaries in one
sentence (like XSum), summaries of several points (like CNN/DailyMail), and continuations of Python code, on which the
drafter is never finetuned (in place of WMT18 De-En). The reference answer is taken from the docstring. The target of
the default setting is trained on it; the drafter never sees it.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from drafter.data.corpus import Doc

BODY_CHARACTERS = 700
ANSWER_CHARACTERS = 400
IN_DOMAIN = ("open_ended", "one_sentence", "summary")
OUT_OF_DOMAIN = "code"

_EXPLAIN = ("What does `{}` do?", "What is `{}` for?", "Explain `{}`.", "How would you describe `{}`?")
_PARAMETER = ("What is the parameter `{1}` of `{0}`?", "What should I pass as `{1}` to `{0}`?")
_GOOGLE = re.compile(r"^ {2,4}`?(\w+)`? ?(?:\([^\n]*\))?: +([^\n]+(?:\n {5,}\S[^\n]*)*)", re.MULTILINE)
_NUMPY = re.compile(r"^(\w+) : [^\n]+\n((?: {4}\S[^\n]*\n?)+)", re.MULTILINE)
_SPHINX = re.compile(r"^:param (?:\w+ )?(\w+): *([^\n]+(?:\n +\S[^\n]*)*)", re.MULTILINE)
_SECTION = re.compile(
    r"\n(?:(?:Args|Arguments|Returns?|Raises|Examples?|Note):|\w+\n[-=~]{4,}|>>> |:param |:return|```)"
)


class Instruction(NamedTuple):
    """A user's message, its kind and the human answer; `name` is the documented object that it is about."""

    name: str
    kind: str
    prompt: str
    reference: str


def derive(doc: Doc) -> Iterator[Instruction]:
    """Yield the instructions that can be made from a documented object; none if its docstring lacks the parts."""
    paragraphs = [" ".join(part.split()) for part in _SECTION.split(doc.text)[0].split("\n\n")]
    paragraphs = [part for part in paragraphs if len(part) > 20 and part[0].isalnum()]
    if not paragraphs or "." not in doc.name:
        return
    call = _shorten_name(doc.name) + doc.signature
    lead = _truncate(" ".join(paragraphs[:3]))
    yield Instruction(doc.name, "open_ended", _choose_form(_EXPLAIN, doc.name).format(call), lead)
    parameters = _parameters(doc.text)
    if parameters:
        parameter, meaning = parameters[_hash(doc.name) % len(parameters)]
        question = _choose_form(_PARAMETER, doc.name).format(_shorten_name(doc.name), parameter)
        yield Instruction(doc.name, "open_ended", question, _truncate(meaning))
    first, body = _sentences(paragraphs[0])[0], doc.text[:BODY_CHARACTERS]
    rest = body.split("\n\n", 1)[-1] if "\n\n" in body else ""
    if len(rest) > 100 and 25 < len(first) < 200:
        question = f"Summarise this documentation of `{call}` in one sentence.\n\n{rest.strip()}"
        yield Instruction(doc.name, "one_sentence", question, first)
    points = [_sentences(part)[0] for part in paragraphs[:3]]
    if parameters:
        points.append(f"It takes {', '.join(f'`{name}`' for name, _ in parameters[:6])}.")
    if len(points) > 1 and len(body) > 150:
        question = f"Summarise the main points of this documentation.\n\n`{call}`\n\n{body.strip()}"
        yield Instruction(doc.name, "summary", question, "\n".join(f"- {point}" for point in points))
    if doc.code:
        lines = doc.code.split("\n")
        half = max(2, len(lines) // 2)
        question = "Continue this Python code.\n\n" + "\n".join(lines[:half])
        yield Instruction(
            doc.name, OUT_OF_DOMAIN, question[:BODY_CHARACTERS], "\n".join(lines[half:])[:ANSWER_CHARACTERS]
        )


def _parameters(text: str) -> list[tuple[str, str]]:
    found = next((rows for rows in (pattern.findall(text) for pattern in (_GOOGLE, _NUMPY, _SPHINX)) if rows), [])
    cleaned = ((name, " ".join(meaning.split())) for name, meaning in found)
    return [(name, meaning) for name, meaning in cleaned if len(meaning) > 15]


def _shorten_name(name: str) -> str:
    """Return `pkg.Class.method` for `pkg.mod.sub.Class.method`, as people name things."""
    parts = name.split(".")
    return name if len(parts) <= 3 else ".".join([parts[0], *parts[-2:]])


def _sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?]) +(?=[A-Z`])", paragraph)


def _truncate(text: str) -> str:
    """Return the first sentences, up to ANSWER_CHARACTERS. The first one is kept even if it is up to twice as long."""
    kept = ""
    for sentence in _sentences(text):
        if kept and len(kept) + len(sentence) > ANSWER_CHARACTERS:
            break
        kept = f"{kept} {sentence}".strip()
    return kept[: 2 * ANSWER_CHARACTERS]


def _choose_form(forms: tuple[str, ...], name: str) -> str:
    return forms[_hash(name) // 7 % len(forms)]


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
