"""Read and write the files of a directory on disk or in an object store (s3://, gs://, hf:// …), through fsspec.

Writes are atomic. On disk, a file is written under a temporary name, flushed to the device and renamed; the writes of
object stores are atomic by themselves. Ranges of several files are read at once.
"""

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem


def is_url(path: str | Path) -> bool:
    """Return whether a path begins with a scheme, as s3://bucket does. Other colons are characters of a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def local_directory(path: str | Path) -> Path | None:
    """Return the local directory of a model: the path itself, or a model beside this project's packages; or None."""
    local, beside = Path(path).expanduser(), Path(__file__).parents[2] / path
    if local.is_dir():
        return local
    return beside if (beside / "config.json").is_file() else None


class Folder:
    """Access the files of one directory by name.

    Raises:
        OSError: a file cannot be read or written.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/")
        self.is_local = not is_url(self.url)

    def __str__(self) -> str:
        return self.url

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        fs, path = self._open()
        return bool(fs.exists(f"{path}/{name}"))

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the files by name, without subdirectories; {} if there is no such directory."""
        fs, path = self._open()
        fs.invalidate_cache()  # another process may have changed the directory since fsspec listed it
        with contextlib.suppress(FileNotFoundError):
            found = fs.ls(path, detail=True)
            return {file["name"].rsplit("/", 1)[-1]: file["size"] for file in found if file["type"] == "file"}
        return {}

    def read(self, name: str) -> bytes:
        """Read a file."""
        fs, path = self._open()
        return bytes(fs.cat_file(f"{path}/{name}"))

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes | Exception]:
        """Return the bytes of each (name, start, end), or the exception with which reading the range failed."""
        fs, path = self._open()
        names, starts, ends = zip(*ranges, strict=True)
        return list(fs.cat_ranges([f"{path}/{name}" for name in names], list(starts), list(ends), on_error="return"))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically. If writing fails, an existing file of this name is kept."""
        fs, path = self._open()
        if self.is_local:
            write_file(Path(path) / name, data)
        else:
            fs.pipe_file(f"{path}/{name}", data)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        fs, path = self._open()
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{name}")

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the file system and the path in it.

        fsspec caches the file system per process, so each loader process has its own. A local path is made absolute, so
        that fsspec does not interpret any of its characters.
        """
        if self.is_local:
            return LocalFileSystem(), os.path.abspath(self.url)
        return fsspec.core.url_to_fs(self.url)


def write_file(path: Path, data: bytes) -> None:
    """Write a file on disk atomically; see `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when it is complete. A reader sees the old file or the new one.

    Raises:
        OSError: the file cannot be written; the old one is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _flush_directory(path.parent)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise OSError(
            problem.errno,
            f"cannot write {path} ({problem.strerror}). Files that were finished before are kept: "
            f"free some space or give another directory, and run the same command again",
        ) from problem


def temporary_path(path: Path) -> Path:
    """Return a name beside a path that no other process uses, on any machine that shares the file system."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{secrets.token_hex(4)}.tmp")


def _flush_directory(path: Path) -> None:
    """Flush a directory, so that a rename in it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
