"""A directory on disk or in an object store (s3://, gs://, hf:// …), through fsspec.

A file is written whole or not at all: on disk under a temporary name, flushed to the device and renamed; an object
store's own writes are like that. Reads are by range, many at once.
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
    """Whether it begins with a scheme, as s3://bucket does; any other colon is a letter of a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def local_directory(path: str | Path) -> Path | None:
    """The directory that a model's path names: as it stands, or a model beside this project's packages; else None."""
    local, beside = Path(path).expanduser(), Path(__file__).parents[2] / path
    if local.is_dir():
        return local
    return beside if (beside / "config.json").is_file() else None


class Folder:
    """Files of one directory, by name.

    Raises:
        OSError: what could not be read or written, with the remedy where there is one.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/")
        self.is_local = not is_url(self.url)

    def __str__(self) -> str:
        return self.url

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        fs, path = self._open()
        return bool(fs.exists(f"{path}/{name}"))

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file in it, not of those below; none where there is no such directory."""
        fs, path = self._open()
        fs.invalidate_cache()  # of listings that another process may have outdated
        with contextlib.suppress(FileNotFoundError):
            found = fs.ls(path, detail=True)
            return {file["name"].rsplit("/", 1)[-1]: file["size"] for file in found if file["type"] == "file"}
        return {}

    def read(self, name: str) -> bytes:
        """A whole file."""
        fs, path = self._open()
        return bytes(fs.cat_file(f"{path}/{name}"))

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes | Exception]:
        """The bytes of each (name, start, end), from an object store all at once; a failure takes its range's place."""
        fs, path = self._open()
        names, starts, ends = zip(*ranges, strict=True)
        return list(fs.cat_ranges([f"{path}/{name}" for name in names], list(starts), list(ends), on_error="return"))

    def write(self, name: str, data: bytes) -> None:
        """Write a file; what was there under this name is replaced, unless the writing fails."""
        fs, path = self._open()
        if self.is_local:
            write_file(Path(path) / name, data)
        else:
            fs.pipe_file(f"{path}/{name}", data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        fs, path = self._open()
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{name}")

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The filesystem, which fsspec keeps (one a process, so that loader processes have their own).

        A local path is given to it in full, so that no letter of it means anything to fsspec.
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
    """A file to write into, that takes its place once it is whole: a reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written; what was there stays.
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
            f"cannot write {path} ({problem.strerror}). What was finished before is kept: "
            f"make room, or give another directory, and run the same command again",
        ) from problem


def temporary_path(path: Path) -> Path:
    """A name beside a path that no other process takes, whichever machine writes to the same file system."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{secrets.token_hex(4)}.tmp")


def _flush_directory(path: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
