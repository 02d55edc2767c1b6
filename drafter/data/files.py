"""Read the rows of local data files one at a time, each with its location, so that errors can name it.

The formats are JSON objects (one per line, or one array), CSV, parquet, and plain text, whose lines are rows with the
single field `text`. All but parquet may be compressed (.gz, .zst), and are encoded in UTF-8, or in UTF-8, UTF-16 or
UTF-32 with a byte order mark. An unreadable row raises an error with its file and number, because skipping it silently
would hide what a broken export has lost.
"""

import csv
import glob
import gzip
import io
import json
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
COMPRESSIONS = (".gz", ".zst")
MARKS = {
    BOM_UTF8: "utf-8-sig",
    BOM_UTF32_LE: "utf-32",  # listed before UTF-16's mark, which is a prefix of it
    BOM_UTF32_BE: "utf-32",
    BOM_UTF16_LE: "utf-16",
    BOM_UTF16_BE: "utf-16",
}


class LocatedRow(NamedTuple):
    """The fields of a row and its location, such as "questions.jsonl, row 3"; rows count from 1, as lines do."""

    location: str
    fields: dict[str, Any]


def is_local(path: str) -> bool:
    """Return whether a path means local files rather than a hub dataset: by its name, or because it exists."""
    return bool(kind(path)) or any(mark in path for mark in "*?") or Path(path).expanduser().exists()


def kind(path: str | Path) -> str:
    """Return the suffix that decides how a file is read: ".jsonl" for text-00.jsonl.gz; "" for an unknown format."""
    name = Path(path)
    inner = Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix
    return inner if inner in KINDS and not (inner == ".parquet" and name.suffix in COMPRESSIONS) else ""


def find_files(path: str) -> list[Path]:
    """Return the files of a path, sorted by name. The path is a file, a folder, or a pattern with * or ?.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file has an unknown format, or a folder has files of several formats.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        files = sorted(one for one in given.rglob("*") if one.is_file() and kind(one) and not _is_hidden(one, given))
        if len(kinds := {kind(one) for one in files}) > 1:
            raise ValueError(f"'{path}' has files of several kinds ({', '.join(sorted(kinds))}): give '{path}/*.jsonl'")
    elif given.exists():
        files = [given]
    else:
        files = sorted(Path(one) for one in glob.glob(str(given), recursive=True) if Path(one).is_file())
    if not files:
        raise FileNotFoundError(f"no data file at '{path}'")
    for file in files:
        if not kind(file):
            raise ValueError(f"'{file}' is none of {', '.join(KINDS)} (all but .parquet also as .gz or .zst)")
    return files


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def read_file(file: Path) -> Iterator[LocatedRow]:
    """Yield the rows of one file.

    Raises:
        ValueError: a row cannot be read (names the file and the number), or the file is cut short or not UTF-8.
    """
    readers: dict[str, Callable[[Path], Iterator[LocatedRow]]] = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".parquet": _parquet,
        ".csv": _csv,
        ".txt": _text,
    }
    try:
        yield from readers[kind(file)](file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise ValueError(f"{file} is cut short or damaged ({problem}): make or download it again") from problem
    except OSError as problem:
        if problem.errno is not None:
            raise
        raise ValueError(f"{file} is cut short or damaged ({problem}): make or download it again") from problem


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(file))
    if file.suffix == ".zst":
        import pyarrow  # slow to import, and needed only here

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
    return file.open("rb")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of each line, from 1, and the line with its line break."""
    with _open(file) as stream:
        start = cast(io.BufferedReader, stream).peek(4)[:4]
        encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
        yield from (_wide_lines if encoding in ("utf-16", "utf-32") else _utf8_lines)(file, stream, encoding)


def _utf8_lines(file: Path, stream: BinaryIO, encoding: str) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, start=1):
        try:
            yield number, raw.decode(encoding if number == 1 else "utf-8")
        except UnicodeDecodeError as problem:
            raise ValueError(
                f"{file}, row {number}, byte {problem.start + 1} is 0x{raw[problem.start]:02x}, not UTF-8: "
                f"convert the file, e.g. `iconv -f latin1 -t utf-8`"
            ) from None


def _wide_lines(file: Path, stream: BinaryIO, encoding: str) -> Iterator[tuple[int, str]]:
    number = 0
    with io.TextIOWrapper(stream, encoding, newline="\n") as text:
        try:
            for number, line in enumerate(text, start=1):
                yield number, line
        except UnicodeError as problem:
            raise ValueError(f"{file}, after row {number}: not {encoding}, as its first bytes say") from problem


def _json_lines(file: Path) -> Iterator[LocatedRow]:
    for number, line in _lines(file):
        if line.strip():
            location = f"{file}, row {number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise ValueError(
                    f"{location} is not JSON ({problem}): correct or remove it. It begins: {line[:60]!r}"
                ) from None
            yield _locate(location, fields)


def _json(file: Path) -> Iterator[LocatedRow]:
    """Yield the objects of an array, or of a file with one object per line."""
    first = next((line.strip() for _, line in _lines(file) if line.strip()), "")
    if not first.startswith("[") and first != "{":
        yield from _json_lines(file)
        return
    try:
        rows = json.loads("".join(line for _, line in _lines(file)))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{file} is not JSON ({problem})") from None
    if not isinstance(rows, list):
        raise ValueError(
            f"{file} is one object, with {sorted(rows)}: expected an array of objects, or one object per line"
        )
    for number, fields in enumerate(rows, start=1):
        yield _locate(f"{file}, row {number}", fields)


def _csv(file: Path) -> Iterator[LocatedRow]:
    """Yield the rows of a CSV file, whose cells are text. The header is row 1."""
    csv.field_size_limit(2**31 - 1)  # in characters; articles are longer than the default limit
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    number, header = 0, None
    try:
        for number, cells in enumerate(reader, start=1):
            if header is None:
                header = cells
                if repeated := sorted({name for name in header if header.count(name) > 1}):
                    raise ValueError(f"{file}: the header has {repeated} more than once")
            elif len(cells) > len(header):
                raise ValueError(f"{file}, row {number} has {len(cells)} cells for the {len(header)} columns {header}")
            elif cells:
                yield LocatedRow(f"{file}, row {number}", dict(zip(header, cells, strict=False)))
    except csv.Error as problem:
        raise ValueError(f"{file}, row {number + 1} is not CSV ({problem}): correct or remove it") from None


def _text(file: Path) -> Iterator[LocatedRow]:
    for number, line in _lines(file):
        yield LocatedRow(f"{file}, row {number}", {"text": line.rstrip("\r\n")})


def _parquet(file: Path) -> Iterator[LocatedRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for fields in batch.to_pylist():
                    number += 1
                    yield LocatedRow(f"{file}, row {number}", fields)
    except pyarrow.ArrowException as problem:
        raise ValueError(f"{file}, after row {number}: not readable as parquet ({problem})") from problem


def _locate(location: str, fields: Any) -> LocatedRow:
    if not isinstance(fields, dict):
        raise ValueError(
            f"{location} is {type(fields).__name__} {str(fields)[:60]!r}: expected an object with named fields"
        )
    return LocatedRow(location, fields)
