"""Read from the config which data to prepare: the sources of text, instructions and tasks, and what identifies them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import MISSING, DictConfig

from drafter.artifacts.manifest import fingerprint
from drafter.data.dialogues import TURNS
from drafter.data.sources import Source, source_of
from experiments.running.inputs import plain
from experiments.running.recipes import INSTRUCTIONS, SelfSource, is_self, pretraining_settings, self_sources

KINDS = ("docstrings", "files")
SELF_WRITTEN = "self_written"  # the stage of the directories that the target writes
# The settings of a task that only evaluation reads.
DECODING = ("temperature", "top_p", "top_k", "max_new_tokens", "in_domain", "turns")


def has_docstrings(cfg: DictConfig) -> bool:
    """Return whether the data are docstrings of installed packages, rather than files and hub datasets.

    Raises:
        ValueError: data.kind is neither "docstrings" nor "files".
    """
    if cfg.data.kind not in KINDS:
        raise ValueError(f"data.kind is '{cfg.data.kind}', must be one of {', '.join(KINDS)}")
    return bool(cfg.data.kind == "docstrings")


class Docstrings(NamedTuple):
    """A source of pretraining text: docstrings and code of installed packages, as in data=docstrings."""

    packages: tuple[str, ...]
    code_share: float = 0.4
    weight: float = 1.0

    def identity(self, name: str) -> dict[str, Any]:
        """Return what determines the texts of the source of this name, except the versions of the packages."""
        return {"label": name, "kind": "docstrings", **self._asdict(), "packages": list(self.packages)}


def check_kinds(cfg: DictConfig) -> None:
    """Check the settings of all sources and tasks.

    Raises:
        ValueError: a kind or a setting is wrong.
    """
    if not has_docstrings(cfg):
        instruction_sources(cfg), pretraining_sources(cfg)
    task_sources(cfg)


def instruction_sources(cfg: DictConfig) -> dict[str, Source]:
    """Return the sources of instructions by name; the name is also the `kind` of each row.

    A source that the target writes is the file of what it has written.

    Raises:
        ValueError: there is no source, or a setting is wrong.
    """
    written, sources = by_name(cfg, INSTRUCTIONS), {}
    for name, settings in plain(cfg.data.instructions).items():
        owner = f"data.instructions.{name}"
        if name in written:
            sources[name] = written[name].rows
        else:
            sources[name] = source_of(
                {"template": "{prompt}", **_rows_settings(settings, owner, "conversations")}, owner
            )
    if not sources:
        raise ValueError("data.instructions is empty: give it one source or more")
    return sources


def by_name(cfg: DictConfig, part: str) -> dict[str, SelfSource]:
    """Return the sources that the target writes, of instructions or of text, by name."""
    return {source.name: source for source in self_sources(cfg) if source.part == part}


def pretraining_sources(cfg: DictConfig) -> dict[str, Source | Docstrings]:
    """Return the sources of the pretraining text by name; a single one is called "pretraining".

    Raises:
        ValueError: there is no source, or a setting is wrong.
    """
    settings_by_name = pretraining_settings(plain(cfg.data))
    written, sources = by_name(cfg, "text"), dict[str, Source | Docstrings]()
    for name, settings in settings_by_name.items():
        owner = "data.pretraining" if name == "pretraining" else f"data.pretraining.{name}"
        if name in written:
            sources[name] = written[name].rows
        elif settings.get("kind") == "docstrings":
            sources[name] = _docstrings_of({key: value for key, value in settings.items() if key != "kind"}, owner)
        else:
            sources[name] = source_of({"template": "{text}", **_rows_settings(settings, owner)}, owner)
    if not sources:
        raise ValueError("data.pretraining is empty: give it a path, a kind, or named sources")
    return sources


def _docstrings_of(settings: dict[str, Any], owner: str) -> Docstrings:
    if unknown := sorted(set(settings) - set(Docstrings._fields)):
        raise ValueError(f"{owner} has {unknown}; a source of kind docstrings has {list(Docstrings._fields)}")
    if not settings.get("packages") or not isinstance(settings["packages"], list):
        raise ValueError(f"{owner} has no packages: give it as {owner}.packages=[numpy, ...]")
    source = Docstrings(**{**settings, "packages": tuple(settings["packages"])})
    if source.weight <= 0:
        raise ValueError(f"{owner}.weight is {source.weight}, must be above 0")
    return source


def _rows_settings(settings: Mapping[str, Any], owner: str, *kinds: str) -> dict[str, Any]:
    """Return the settings of a source of rows that are given. Its kind is "files", or one of `kinds` if it is given.

    Raises:
        ValueError: the kind is unknown there.
    """
    if (kind := settings.get("kind", "files")) not in ("files", *kinds):
        others = ["docstrings"] if ".pre" in owner else kinds
        raise ValueError(f"{owner}.kind is '{kind}', must be {', '.join(['files', *others])} or self")
    return {"kind": "files"} | {name: value for name, value in settings.items() if value != MISSING}


def task_sources(cfg: DictConfig) -> dict[str, Source]:
    """Return the sources of the tasks that have one of their own.

    A task on docstrings has none; its path is null. Neither has a task of kind `self`; see `self_tasks`.

    Raises:
        ValueError: a task has no path although the data are not docstrings, or a setting is wrong.
    """
    found, written = {}, self_tasks(cfg)
    for name, settings in plain(cfg.task).items():
        turns_of(name, settings)
        if name in written:
            continue
        if "path" not in settings:
            raise ValueError(
                f"task.{name} has no path: give it as task.{name}.path=..., or null to ask about docstrings"
            )
        if settings["path"] is not None:
            fields = {key: value for key, value in settings.items() if key not in DECODING}
            found[name] = source_of(_rows_settings(fields, f"task.{name}", "conversations"), f"task.{name}")
        elif not has_docstrings(cfg):
            raise ValueError(
                f"task.{name}.path is null, and data={cfg.data.name} has no docstrings to ask about: "
                f"task={'self' if by_name(cfg, INSTRUCTIONS) else 'files'}"
            )
    return found


def turns_of(name: str, settings: Mapping[str, Any]) -> str | None:
    """Return which answers of each conversation a task evaluates; None if it has no conversations.

    Raises:
        ValueError: `turns` is none of TURNS, or the task has no conversations.
    """
    turns = settings.get("turns")
    if settings.get("kind") != "conversations":
        if turns is not None:
            raise ValueError(f"task.{name}.turns is {turns!r}, which needs task.{name}.kind=conversations")
        return None
    if (turns or "all") not in TURNS:
        raise ValueError(f"task.{name}.turns is {turns!r}, must be one of {', '.join(TURNS)}")
    return turns or "all"


def self_tasks(cfg: DictConfig) -> dict[str, str]:
    """Return the source of instructions of each task of kind `self`, whose prompts are held-out instructions.

    Raises:
        ValueError: the task names no source that the target writes.
    """
    found, written = {}, by_name(cfg, INSTRUCTIONS)
    for name, settings in plain(cfg.task).items():
        if is_self(settings):
            source = settings.get("source")
            if source not in written:
                raise ValueError(
                    f"task.{name}.source is {source!r}, must be a source of data.instructions of kind self: "
                    f"{', '.join(written) or 'there is none'}"
                )
            found[name] = source
    return found


def identity(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings that determine the prepared data, and the fingerprints of local files by their purpose.

    How a task is decoded belongs to evaluation. The content of a local file counts, not its path. Of a source that the
    target writes, the complete artifact counts.
    """
    tasks, of_self, sources = task_sources(cfg), self_tasks(cfg), dict[str, Any]()
    settings: dict[str, Any] = {"prepare": plain(cfg.prepare), "seed": cfg.seed}
    settings["task"] = {name: tasks[name].identity(name) if name in tasks else {} for name in cfg.task}
    settings["task"] |= {name: {"kind": "self", "source": source} for name, source in of_self.items()}
    written = {(source.part, source.name): source for source in self_sources(cfg)}
    if has_docstrings(cfg):
        settings["data"] = plain(cfg.data)
    else:
        texts, asked = pretraining_sources(cfg), instruction_sources(cfg)

        def described(part: str, name: str, source: Source | Docstrings) -> dict[str, Any]:
            return written[part, name].identity() if (part, name) in written else source.identity(name)

        of_text = {name: described("text", name, source) for name, source in texts.items()}
        settings["data"] = {
            "kind": cfg.data.kind,
            "name": cfg.data.name,
            "heldout_percent": cfg.data.heldout_percent,
            "pretraining": of_text.get("pretraining", of_text),
            "instructions": [described(INSTRUCTIONS, name, source) for name, source in asked.items()],
        }
        sources = {_purpose(name): source for name, source in texts.items() if ("text", name) not in written}
        sources |= {
            f"instructions {name}": source for name, source in asked.items() if (INSTRUCTIONS, name) not in written
        }
    sources |= {f"task {name}": source for name, source in tasks.items()}
    files = {
        name: source.fingerprint() for name, source in sources.items() if isinstance(source, Source) and source.is_local
    }
    for (part, name), source in written.items():
        files[f"instructions {name}" if part == INSTRUCTIONS else _purpose(name)] = fingerprint(
            source.directory, SELF_WRITTEN
        )
    return settings, files


def _purpose(name: str) -> str:
    return "pretraining" if name == "pretraining" else f"pretraining {name}"
