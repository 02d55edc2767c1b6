"""Where a model is, and how it is loaded and its chat template rendered.

Every function that reads a model takes a `ModelSource`, or a path or hub name, which is a source with default settings.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from drafter.artifacts.storage import local_directory


class TemplateSettings(NamedTuple):
    """How the chat template of a model is rendered.

    Attributes:
        kwargs: JSON of the template's arguments, e.g. '{"enable_thinking": false}'. It is text so that it is hashable.
        date: the date that templates which print today's date print instead, so that prompts do not change by the day.
    """

    kwargs: str = "{}"
    date: str = "2024-07-26"

    def arguments(self) -> dict[str, Any]:
        """Return the template's arguments by name."""
        found: dict[str, Any] = json.loads(self.kwargs)
        return found

    def date_parts(self) -> dict[str, str]:
        """Return the text of each directive of `strftime` for the date, e.g. {"%Y": "2024", "%d": "26", ...}."""
        pinned = datetime.fromisoformat(self.date)
        return {f"%{letter}": pinned.strftime(f"%{letter}") for letter in "aAbBdHIjmMpSuUVwWxXyY"}


class ModelSource(NamedTuple):
    """The location of a model, and how it is loaded.

    Attributes:
        path: a local directory, or a name on the hub.
        revision: branch, tag or commit of a hub model. None means its main branch.
        dtype: the type of the loaded weights, e.g. "float32".
        trust_remote_code: whether code that comes with the model may be run.
        parallel: how the weights are split over ranks: "tensor", "fsdp" or None.
        template: how its chat template is rendered.
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    parallel: str | None = None
    template: TemplateSettings = TemplateSettings()

    @classmethod
    def from_model(cls, model: "str | Path | ModelSource") -> "ModelSource":
        """Return a source as it is, or a path as a source with default settings."""
        return model if isinstance(model, ModelSource) else cls(str(model))

    def where(self) -> dict[str, Any]:
        """Return the arguments that every `from_pretrained` of transformers takes.

        Raises:
            OSError: the path looks like a local one, and the directory does not exist.
        """
        return {
            "pretrained_model_name_or_path": existing(self.path),
            "revision": hub_commit(self),
            "trust_remote_code": self.trust_remote_code,
        }


Model = str | Path | ModelSource


@lru_cache
def hub_commit(source: ModelSource) -> str | None:
    """Return the commit of a hub model's revision, or None for a local model.

    The result is cached for the lifetime of the process, so that all files are read at the same commit.

    Raises:
        OSError: the hub cannot be reached, and the model is not in the local cache either.
    """
    if local_directory(source.path):
        return None
    if re.fullmatch("[0-9a-f]{40}", source.revision or ""):
        return source.revision
    with named(source.path):
        file = cached_file(existing(source.path), "config.json", revision=source.revision)
    commit: str | None = extract_commit_hash(file, None)
    return commit or source.revision


@contextmanager
def named(path: str) -> Iterator[None]:
    """Add the model's name to an OSError of transformers or of the hub's client."""
    try:
        yield
    except OSError as problem:
        raise OSError(f"cannot load '{path}', as a local directory or from the hub: {problem}") from problem


def existing(path: str) -> str:
    """Return a local directory or a hub name. Raise on a path that looks local but does not exist."""
    if local := local_directory(path):
        return str(local)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise OSError("the directory does not exist")
    return path
