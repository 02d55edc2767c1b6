"""Read from the config which instructions and which text the target writes itself, and where they lie."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from drafter.artifacts.manifest import digest
from drafter.data.files import is_local
from drafter.data.sources import Source, entries
from drafter.data.templates import parse
from experiments.running.inputs import plain

INSTRUCTIONS, TEXT = "instructions", "text"


@dataclass(frozen=True)
class SelfSource:
    """A source of kind `self`: the target writes its rows.

    Attributes:
        owner: the config key, for errors.
        name: the name of the source.
        part: "instructions", or "text" for pretraining.
        directory: where the rows are written.
        settings: the settings of `Settings` with the given values.
    """

    owner: str
    name: str
    part: str
    directory: str
    settings: "Settings"

    @property
    def rows(self) -> Source:
        """Return the written rows as an ordinary source."""
        template = self.settings.template if self.part == INSTRUCTIONS else "{text}"
        return Source(f"{self.directory}/{self.part}.jsonl", template, weight=self.settings.weight)

    def identity(self) -> dict[str, Any]:
        """Return what the prepared data record about the source, beside its fingerprint."""
        return {"label": self.name, "kind": "self", **self.settings.identity(), "weight": float(self.settings.weight)}


@dataclass(frozen=True)
class Settings:
    """How many rows the target writes, and how.

    Attributes:
        number: of instructions; null: as many as the preparation needs.
        temperature: of sampling, above 0.
        top_p: of sampling.
        system: a system prompt, or several, which the messages take in turn.
        examples: messages of a user, or the path of a file of them, that steer the target.
        examples_shown: how many of them precede each message.
        example_template: makes the message of a row of the examples' file.
        requests: what the target is asked for, in turn: its answers are then the messages.
        template: makes the instruction of a message, which is its field `prompt`.
        max_new_tokens: of a message; null: prepare.max_prompt_tokens.
        max_answer_tokens: of an answer, in pretraining text.
        weight: how often the source is drawn from, relative to the others.
    """

    number: int | None = None
    temperature: float = 1.0
    top_p: float = 0.95
    system: Any = None
    examples: Any = None
    examples_shown: int = 3
    example_template: str = "{prompt}"
    requests: Any = None
    template: str = "{prompt}"
    max_new_tokens: int | None = None
    max_answer_tokens: int = 256
    weight: float = 1.0
    read_examples: tuple[str, ...] = field(default=(), repr=False)

    @property
    def systems(self) -> tuple[str | None, ...]:
        """Return the system prompts; (None,) if there is none."""
        given = [self.system] if self.system is None or isinstance(self.system, str) else self.system
        return tuple(given) or (None,)

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the rows. Of the examples, the texts count, not the path of their file."""
        names = ("number", "temperature", "top_p", "examples_shown", "max_new_tokens", "max_answer_tokens")
        found = {name: getattr(self, name) for name in names}
        found |= {"requests": digest(list(self.requests))} if self.requests else {}
        found |= {} if self.template == "{prompt}" else {"template": self.template}
        return {**found, "system": list(self.systems), "examples": digest(list(self.read_examples))}


def is_self(settings: Mapping[str, Any]) -> bool:
    """Return whether a source is written by the target."""
    return settings.get("kind") == "self"


def self_sources(cfg: DictConfig) -> list[SelfSource]:
    """Return the sources that the target writes.

    Raises:
        ValueError: a setting is unknown or out of its range.
        FileNotFoundError: there is no file of examples.
    """
    return list(_self_sources(plain(cfg.data), cfg.root))


def _self_sources(data: dict[str, Any], root: str) -> Iterator[SelfSource]:
    asked = data.get("instructions")
    for name, settings in (asked if isinstance(asked, dict) else {}).items():
        if is_self(settings):
            owner = f"data.instructions.{name}"
            yield SelfSource(owner, name, INSTRUCTIONS, f"{root}/instructions/{name}", settings_of(settings, owner))
    for name, settings in pretraining_settings(data).items():
        if is_self(settings):
            owner = "data.pretraining" + (f".{name}" if name != "pretraining" else "")
            yield SelfSource(owner, name, TEXT, f"{root}/text/{name}", settings_of(settings, owner))


def pretraining_settings(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of the sources of pretraining text by name. A single source is called "pretraining".

    A dictionary is a single source if it has a path or a kind; otherwise it has named sources.
    """
    given = data.get("pretraining")
    if not isinstance(given, dict):
        return {}
    is_one = any(isinstance(given.get(key), str) for key in ("path", "kind"))
    return {"pretraining": given} if is_one else given


def settings_of(given: Mapping[str, Any], owner: str) -> Settings:
    """Return the settings of a source of kind `self`, with its examples read.

    Raises:
        ValueError: a setting is unknown or out of its range.
        FileNotFoundError: there is no file of examples.
    """
    known = [one.name for one in fields(Settings) if one.name != "read_examples"]
    values = {name: value for name, value in given.items() if name != "kind"}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{owner} has {unknown}; a source of kind self has {known}")
    settings = Settings(**values)
    is_text = owner.startswith("data.pretraining")
    for name, allowed, wanted in (
        ("template", not is_text or settings.template == "{prompt}", "left out: the text is a message and its answer"),
        ("template", {one.name for one in parse(settings.template)[0]} == {"prompt"}, "a text with {prompt} in it"),
        ("requests", settings.requests is None or _are_texts(settings.requests), "a list of texts, or null"),
        ("requests", not (settings.requests and settings.examples), "null beside examples, which steer a user"),
        ("requests", not (settings.requests and is_text), "left out: the text is a message and its answer"),
        ("number", settings.number is None or settings.number >= 1, "at least 1, or null"),
        ("temperature", settings.temperature > 0, "above 0: greedy decoding would write the same message each time"),
        ("top_p", 0 < settings.top_p <= 1, "above 0, at most 1"),
        ("examples_shown", settings.examples_shown >= 1, "at least 1"),
        ("max_new_tokens", settings.max_new_tokens is None or settings.max_new_tokens >= 1, "at least 1, or null"),
        ("max_answer_tokens", settings.max_answer_tokens >= 1, "at least 1"),
        ("weight", settings.weight > 0, "above 0"),
        ("system", all(one is None or isinstance(one, str) for one in settings.systems), "a text or a list of texts"),
    ):
        if not allowed:
            raise ValueError(f"{owner}.{name} is {getattr(settings, name)!r}, must be {wanted}")
    return Settings(**values, read_examples=_read_examples(settings, owner))


def _read_examples(settings: Settings, owner: str) -> tuple[str, ...]:
    """Return the examples: a list of texts as it is, or the texts of the rows of a local file."""
    given = settings.examples
    if given is None:
        return ()
    if isinstance(given, str):
        if not is_local(given):
            raise FileNotFoundError(f"{owner}.examples is '{given}', which is neither a list of texts nor a local file")
        template = "{text}" if Path(given).suffix == ".txt" else settings.example_template
        return tuple(entry.text for entry in entries(Source(given, template)) if entry.text)
    if given and not _are_texts(given):
        raise ValueError(f"{owner}.examples is {given!r}, must be a list of texts or the path of a file")
    return tuple(given)


def _are_texts(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(one, str) and one.strip() for one in given)
