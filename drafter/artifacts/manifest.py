"""One directory per artifact, and a manifest.json that is written last: its presence means 'complete'.

A stage's identity is what determines its content: the stage's name, its settings, and the fingerprints of the
directories that it reads. `Stage` compares the identity asked for with the one on disk, so that a complete
directory is skipped, an interrupted one is resumed, and one made differently is refused and left untouched. One process
(of all ranks, the first) holds a lock on a directory on disk while it writes there; the lock ends with the process.
"""

import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import Timeout

from drafter.artifacts import provenance
from drafter.artifacts.locks import LOCK, owner, remove_locks, take_lock
from drafter.artifacts.storage import Folder, write_file

MANIFEST = "manifest.json"
STARTED = "started.json"


class ArtifactError(ValueError):
    """A directory that is missing, unfinished, or made from something else than what was asked for."""


class Stage:
    """The claim of one stage on its output directory.

    Constructing it checks the directory and records the identity in started.json; `complete` says that there is
    nothing left to do; `finish` checksums the files and writes the manifest.

    Args:
        directory: where the stage writes: a path, or a URL of an object store.
        name: the stage's name, e.g. "respond".
        settings: JSON-like values that determine the content.
        inputs: name -> fingerprint of each upstream artifact (see `fingerprint`).
        made_by: what else the manifest says of how it came about, e.g. the command; no part of the identity.

    Raises:
        ArtifactError: the directory holds another identity, or files of unknown origin, or another process is writing
            there; nothing in it is changed.
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
        self.began = time.time()
        provenance.process()  # as it is now, not as it is after days
        self._release: Callable[[], Any] = lambda: None
        self._look()
        first = int(os.environ.get("RANK", 0)) == 0
        if not self.complete and self.folder.is_local:
            self.directory.mkdir(parents=True, exist_ok=True)
            if first:
                self._release = weakref.finalize(self, _lock(self.directory), force=True)
                self._look()  # another process may have finished, or begun something else, before the lock was ours
        if not self.complete and first:
            command = {name: value for name, value in self.made_by.items() if name == "command"}
            self.folder.write(STARTED, _json({**self.identity, **command}))

    @property
    def directory(self) -> Path:
        """Where the stage writes, for those that write to a disk alone."""
        if not self.folder.is_local:
            raise ArtifactError(f"{self.folder} is not on a disk: this stage writes to one (give another directory)")
        return Path(self.folder.url)

    def finish(self, files: dict[str, str] | None = None, counts: dict[str, Any] | None = None) -> None:
        """Write the manifest: identity, SHA-256 of each file (default: of all but logs), counts, environment."""
        if files is None:
            files = {name: sha256(self.directory / name) for name in sorted(_content_files(self.directory))}
        for name in self.folder.sizes():
            if name.endswith(".tmp"):  # of a process that was killed
                self.folder.remove(name)
        record = {
            **self.identity,
            "files": files,
            "counts": counts or {},
            **self.made_by,
            "environment": provenance.environment(),
            "seconds": round(time.time() - self.began, 1),
        }
        self.folder.write(MANIFEST, _json(record))
        self.folder.remove(STARTED)
        if self.folder.is_local:
            remove_locks(self.directory)
        self._release()
        self.complete = True

    def _look(self) -> None:
        """See what the directory holds, and refuse it if that is something else."""
        there = self.folder.sizes()
        self.complete = MANIFEST in there
        record = MANIFEST if self.complete else STARTED
        # A claim that never got to write anything binds nobody.
        if self.complete or (record in there and _has_content(self.folder, there)):
            _refuse_other_identity(self.folder, json.loads(self.folder.read(record)), self.identity)
        elif _has_content(self.folder, there):
            raise ArtifactError(
                f"{self.folder} holds files, and nothing that says what they are: give another directory"
            )


def read_manifest(directory: str | Path, stage: str) -> dict[str, Any]:
    """The manifest of a complete artifact of that stage.

    Raises:
        ArtifactError: no manifest (the stage did not finish or the path is wrong), or one of another stage.
    """
    folder = Folder(directory)
    if not folder.exists(MANIFEST):
        raise ArtifactError(
            f"{directory} holds no finished '{stage}' (no {MANIFEST}): run `python -m experiments.{stage}` first, "
            f"or correct the path"
        )
    manifest = dict(json.loads(folder.read(MANIFEST)))
    if manifest["stage"] != stage:
        raise ArtifactError(f"{directory} was written by the stage '{manifest['stage']}', wanted '{stage}'")
    return manifest


def fingerprint(directory: str | Path, stage: str) -> str:
    """16 hexadecimal digits that change with the identity or any file of a complete artifact."""
    manifest = read_manifest(directory, stage)
    return digest({key: manifest[key] for key in ("stage", "settings", "inputs", "files")})


def require(directory: str | Path, name: str, found: str | None, wanted: str) -> None:
    """Refuse an upstream artifact that was made from another input than this run's.

    Raises:
        ArtifactError: names both sides.
    """
    if found != wanted:
        raise ArtifactError(
            f"{directory} was made with the {name} {found}, but this run's {name} is {wanted}: "
            f"make it again with this {name} (in another root), or give the {name} it was made with"
        )


def earlier_version(directory: str | Path | Folder, sign: str) -> ArtifactError:
    """Return the error to raise for an artifact whose manifest has the form of an earlier version of this project.

    Args:
        directory: where the artifact lies.
        sign: what shows that it is of an earlier version.
    """
    return ArtifactError(
        f"{directory} was made by an earlier version of this project ({sign}): "
        f"remove it to make it again, or give another root"
    )


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of one."""
    write_file(path, _json(value))


def write_text(path: Path, text: str) -> None:
    """Write atomically, in UTF-8 whatever the locale."""
    write_file(path, text.encode())


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read what `write_jsonl` wrote."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """16 hexadecimal digits that change with any part of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def is_record(name: str) -> bool:
    """Whether a file is what a stage writes of itself, and no part of its content."""
    return name in (MANIFEST, STARTED) or name.startswith(LOCK)


def _content_files(directory: Path) -> list[str]:
    kept = (".json", ".jsonl", ".safetensors", ".npy", ".parquet", ".jinja")
    names = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.suffix in kept)
    return [name for name in names if not is_record(name) and not name.startswith(("logs/", "checkpoints/"))]


def _has_content(folder: Folder, there: dict[str, int]) -> bool:
    """Whether a directory holds more than the records of a claim."""
    below = folder.is_local and Path(folder.url).is_dir() and any(path.is_dir() for path in Path(folder.url).iterdir())
    return below or any(not is_record(name) and not name.endswith(".tmp") for name in there)


def _lock(directory: Path) -> Callable[..., Any]:
    """Take the directory's lock. Returns what releases it.

    Raises:
        ArtifactError: another process has it.
    """
    try:
        return take_lock(directory).release
    except Timeout:
        raise ArtifactError(
            f"{owner(directory)} is writing to {directory}. "
            f"Nothing was changed: wait for it, stop it, or give another directory"
        ) from None


def _refuse_other_identity(directory: Folder, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found["stage"] == wanted["stage"] and "_target_" in json.dumps(found["settings"]):
        raise earlier_version(directory, "its settings name Python paths")
    for part in ("stage", "settings", "inputs"):
        if found[part] == wanted[part]:
            continue
        if part == "stage":
            difference = f"stage: there '{found[part]}', asked for '{wanted[part]}'"
        else:
            keys = [key for key in found[part] | wanted[part] if found[part].get(key) != wanted[part].get(key)]
            difference = "; ".join(
                f"{part}.{key}: there {found[part].get(key)!r}, asked for {wanted[part].get(key)!r}" for key in keys
            )
        made = f", by `{found['command']}`" if "command" in found else ""
        raise ArtifactError(
            f"{directory} was made differently ({difference}){made}. Nothing was changed: "
            f"give another directory, or remove this one to make it again"
        )


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
