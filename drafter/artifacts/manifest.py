"""Keep one directory per artifact, with a manifest.json that is written last: if it exists, the artifact is complete.

The identity of a stage is everything that determines its content: the stage's name, its settings, and the fingerprints
of the directories that it reads. `Stage` compares the requested identity with the one on disk. It skips a complete
directory, resumes an interrupted one, and refuses one with another identity, which it leaves untouched. One process
(the first rank) locks the directory on disk while it writes there; the lock ends with the process.
"""

import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import Timeout

from drafter.artifacts import provenance
from drafter.artifacts.locks import LOCK, owner, remove_locks, take_lock
from drafter.artifacts.storage import Folder, write_file

MANIFEST = "manifest.json"
STARTED = "started.json"
CHECKPOINTS = "checkpoints"  # the folder of an unfinished training, removed when it is complete


class ArtifactError(ValueError):
    """A directory is missing, unfinished, or made from other settings or inputs than the requested ones."""


class Stage:
    """Claim an output directory for one stage.

    The constructor checks the directory and records the identity in started.json. `complete` is true if there is
    nothing left to do. `finish` computes the checksums of the files and writes the manifest. Its `seconds` are those of
    all processes that worked here: of a process that was stopped, up to the last file that it wrote.

    Args:
        directory: where the stage writes: a path, or the URL of an object store.
        name: the stage's name, e.g. "respond".
        settings: JSON-like values that determine the content.
        inputs: name -> fingerprint of each upstream artifact (see `fingerprint`).
        made_by: further fields of the manifest, such as the command. They are not part of the identity.

    Raises:
        ArtifactError: the directory has another identity or files of unknown origin, or another process is writing
            there. Nothing in it is changed.
    """

    def __init__(
        self,
        directory: str | Path,
        name: str,
        settings: dict[str, Any],
        inputs: dict[str, str],
        made_by: dict[str, Any] | None = None,
    ):
        self.folder = Folder(directory)
        self.identity = json.loads(json.dumps({"stage": name, "settings": settings, "inputs": inputs}))
        self.made_by = made_by or {}
        self.began, self.earlier_seconds = time.time(), 0.0
        provenance.process()  # records the commit at the start, before the checkout changes during a long run
        self._release: Callable[[], Any] = lambda: None
        self._inspect()
        first = int(os.environ.get("RANK", 0)) == 0
        if not self.complete and self.folder.is_local:
            self.directory.mkdir(parents=True, exist_ok=True)
            if first:
                self._release = weakref.finalize(self, _lock(self.directory), force=True)
                self._inspect()  # another process may have written to the directory before the lock was taken
        if first and self.complete:
            self._remove_working_files()  # of a process that was killed right after it had finished
        elif first:
            if self.folder.is_local:
                self.earlier_seconds = _earlier_seconds(self.directory)
            command = {name: value for name, value in self.made_by.items() if name == "command"}
            times = {"began": self.began, "seconds": self.earlier_seconds}
            self.folder.write(STARTED, _json({**self.identity, **command, **times}))

    @property
    def directory(self) -> Path:
        """Return the output directory of a stage that can write only to a disk.

        Raises:
            ArtifactError: the directory is in an object store.
        """
        if not self.folder.is_local:
            raise ArtifactError(f"{self.folder} is not on a disk, and this stage writes only to a disk: give a path")
        return Path(self.folder.url)

    def finish(self, files: dict[str, str] | None = None, counts: dict[str, Any] | None = None) -> None:
        """Write the manifest, and release the directory.

        Args:
            files: name -> SHA-256 of each file; by default, of all content files.
            counts: numbers that describe the result.
        """
        if files is None:
            files = {name: sha256(self.directory / name) for name in sorted(_content_files(self.directory))}
        for name in self.folder.sizes():
            if name.endswith(".tmp"):  # left by a process that was killed
                self.folder.remove(name)
        record = {
            **self.identity,
            "files": files,
            "counts": counts or {},
            **self.made_by,
            "environment": provenance.environment(),
            "seconds": round(self.earlier_seconds + time.time() - self.began, 1),
        }
        self.folder.write(MANIFEST, _json(record))
        self._remove_working_files()
        self._release()
        self.complete = True

    def _remove_working_files(self) -> None:
        """Remove the files that only an unfinished stage needs, if there are any: the folder may be read-only."""
        if self.folder.exists(STARTED):
            self.folder.remove(STARTED)
        if self.folder.is_local:
            shutil.rmtree(self.directory / CHECKPOINTS, ignore_errors=True)
            remove_locks(self.directory)

    def _inspect(self) -> None:
        """Set `complete`. Refuse a directory with another identity or with files of unknown origin."""
        sizes = self.folder.sizes()
        self.complete = MANIFEST in sizes
        record = MANIFEST if self.complete else STARTED
        # A claim of another identity that has not written any content is replaced.
        if self.complete or (record in sizes and _has_content(self.folder, sizes)):
            _require_identity(self.folder, json.loads(self.folder.read(record)), self.identity)
        elif _has_content(self.folder, sizes):
            raise ArtifactError(
                f"{self.folder} has files but neither {MANIFEST} nor {STARTED}, so that their origin is unknown: "
                f"give another directory"
            )


def read_manifest(directory: str | Path, stage: str) -> dict[str, Any]:
    """Read the manifest of a complete artifact of a stage.

    Raises:
        ArtifactError: there is no manifest (the stage did not finish or the path is wrong), or it is of another stage.
    """
    folder = Folder(directory)
    if not folder.exists(MANIFEST):
        raise ArtifactError(
            f"{directory} holds no finished '{stage}' (no {MANIFEST}): run `python -m experiments.{stage}` first, "
            f"or correct the path"
        )
    manifest = dict(json.loads(folder.read(MANIFEST)))
    if manifest["stage"] != stage:
        raise ArtifactError(f"{directory} was written by the stage '{manifest['stage']}', expected '{stage}'")
    return manifest


def fingerprint(directory: str | Path, stage: str) -> str:
    """Return 16 hexadecimal digits that change with the identity or any file of a complete artifact."""
    manifest = read_manifest(directory, stage)
    return digest({key: manifest[key] for key in ("stage", "settings", "inputs", "files")})


def require(directory: str | Path, name: str, found: str | None, wanted: str) -> None:
    """Refuse an upstream artifact that was made from another input than this run uses.

    Args:
        directory: the upstream artifact.
        name: the name of the input, e.g. "target".
        found: the fingerprint of the input that the artifact was made from.
        wanted: the fingerprint of the input that this run uses.

    Raises:
        ArtifactError: the fingerprints differ; names both.
    """
    if found != wanted:
        raise ArtifactError(
            f"{directory} was made with the {name} {found}, but this run's {name} is {wanted}: "
            f"make it again with this {name} (in another root), or give the {name} it was made with"
        )


def earlier_version(directory: str | Path | Folder, sign: str) -> ArtifactError:
    """Return the error to raise for an artifact whose manifest has the form of an earlier version of this project.

    Args:
        directory: the artifact.
        sign: how the manifest shows that it is of an earlier version.
    """
    return ArtifactError(
        f"{directory} was made by an earlier version of this project ({sign}): "
        f"remove it to make it again, or give another root"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, never a part of it."""
    write_file(path, _json(value))


def write_text(path: Path, text: str) -> None:
    """Write text atomically, in UTF-8 whatever the locale."""
    write_file(path, text.encode())


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that change with any part of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def is_record(name: str) -> bool:
    """Return whether a file is a manifest, a started.json or a lock, and not content of the stage."""
    return name in (MANIFEST, STARTED) or name.startswith(LOCK)


def _content_files(directory: Path) -> list[str]:
    kept = (".json", ".jsonl", ".safetensors", ".npy", ".parquet", ".jinja")
    names = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.suffix in kept)
    return [name for name in names if not is_record(name) and not name.startswith(("logs/", f"{CHECKPOINTS}/"))]


def _earlier_seconds(directory: Path) -> float:
    """Return how long earlier processes worked on an unfinished artifact; 0 if there is none."""
    if not (directory / STARTED).exists():
        return 0.0
    record = json.loads((directory / STARTED).read_text(encoding="utf-8"))
    written = [path.stat().st_mtime for path in directory.rglob("*") if path.is_file() and not is_record(path.name)]
    began = record.get("began", float("inf"))  # an earlier version, which did not record it, may have begun it
    return float(record.get("seconds", 0.0)) + max(0.0, max(written, default=0.0) - began)


def _has_content(folder: Folder, names: Iterable[str]) -> bool:
    """Return whether a directory has subdirectories or files other than records, given the names of its files."""
    local = Path(folder.url) if folder.is_local else None
    has_folders = local is not None and local.is_dir() and any(path.is_dir() for path in local.iterdir())
    return has_folders or any(not is_record(name) and not name.endswith(".tmp") for name in names)


def _lock(directory: Path) -> Callable[..., Any]:
    """Take the directory's lock, and return the function that releases it.

    Raises:
        ArtifactError: another process holds it.
    """
    try:
        return take_lock(directory).release
    except Timeout:
        raise ArtifactError(
            f"{owner(directory)} is writing to {directory}. "
            f"Nothing was changed: wait for it, stop it, or give another directory"
        ) from None


def _require_identity(directory: Folder, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a directory whose recorded identity differs from the requested one, and name the differences."""
    if found["stage"] == wanted["stage"] and "_target_" in json.dumps(found["settings"]):
        raise earlier_version(directory, "its settings name Python paths")
    for part in ("stage", "settings", "inputs"):
        if found[part] == wanted[part]:
            continue
        if part == "stage":
            difference = f"stage: found '{found[part]}', requested '{wanted[part]}'"
        else:
            keys = [key for key in found[part] | wanted[part] if found[part].get(key) != wanted[part].get(key)]
            difference = "; ".join(
                f"{part}.{key}: found {found[part].get(key)!r}, requested {wanted[part].get(key)!r}" for key in keys
            )
        made = f", by `{found['command']}`" if "command" in found else ""
        raise ArtifactError(
            f"{directory} was made differently ({difference}){made}. Nothing was changed: "
            f"give another directory, or remove this one to make it again"
        )


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
