"""Rows of local data files, one at a time and each with its place, so that an error can say where it is.

JSON objects (a line each, or one array), CSV, parquet, and plain text, whose lines are rows of one field, `text`. All
but parquet may be compressed (.gz, .zst), and are UTF-8, or UTF-8 or UTF-16 with a byte order mark. A row that cannot
be read is refused by its file and number: to skip it silently would leave out whatever a broken export has lost.
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
    BOM_UTF32_LE: "utf-32",  # before UTF-16's, which it begins with
    BOM_UTF32_BE: "utf-32",
    BOM_UTF16_LE: "utf-16",
    BOM_UTF16_BE: "utf-16",
}


class PlacedRow(NamedTuple):
    """The fields of a row, and where it stands: "questions.jsonl, row 3", counted from 1, as lines are."""

    place: str
    fields: dict[str, Any]


def is_local(path: str) -> bool:
    """Whether a path means local files rather than a dataset of the hub: by its name, or because it is there."""
    return bool(kind(path)) or any(mark in path for mark in "*?") or Path(path).expanduser().exists()


def kind(path: str | Path) -> str:
    """The suffix that says how a file is read, e.g. ".jsonl" for text-00.jsonl.gz; "" for a file that is not read."""
    name = Path(path)
    inner = Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix
    return inner if inner in KINDS and not (inner == ".parquet" and name.suffix in COMPRESSIONS) else ""


def find_files(path: str) -> list[Path]:
    """The files, in the order of their names, that a path means: of itself, a folder, or a pattern with * or ?.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file of another kind, or a folder with files of several kinds.
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


def read_file(file: Path) -> Iterator[PlacedRow]:
    """The rows of one file.

    Raises:
        ValueError: a row that cannot be read, by its file and number; a file that is cut short or not UTF-8.
    """
    readers: dict[str, Callable[[Path], Iterator[PlacedRow]]] = {
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
        import pyarrow  # loading it takes long: only those who read one pay

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
    return file.open("rb")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Each line with its end, and its number from 1."""
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


def _json_lines(file: Path) -> Iterator[PlacedRow]:
    for number, line in _lines(file):
        if line.strip():
            place = f"{file}, row {number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise ValueError(
                    f"{place} is not JSON ({problem}): mend or remove it. It begins: {line[:60]!r}"
                ) from None
            yield _placed(place, fields)


def _json(file: Path) -> Iterator[PlacedRow]:
    """The objects of an array, or of a line each."""
    first = next((line.strip() for _, line in _lines(file) if line.strip()), "")
    if not first.startswith("[") and first != "{":
        yield from _json_lines(file)
        return
    try:
        rows = json.loads("".join(line for _, line in _lines(file)))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{file} is not JSON ({problem})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file} is one object, with {sorted(rows)}: wanted an array of objects, or one on each line")
    for number, fields in enumerate(rows, start=1):
        yield _placed(f"{file}, row {number}", fields)


def _csv(file: Path) -> Iterator[PlacedRow]:
    """Every cell is text, as it stands in the file. The header is row 1."""
    csv.field_size_limit(2**31 - 1)  # of characters: an article is longer than the default allows
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    number, header = 0, None
    try:
        for number, cells in enumerate(reader, start=1):
            if header is None:
                header = cells
                if doubled := sorted({name for name in header if header.count(name) > 1}):
                    raise ValueError(f"{file}: the header has {doubled} more than once")
            elif len(cells) > len(header):
                raise ValueError(f"{file}, row {number} has {len(cells)} cells for the {len(header)} columns {header}")
            elif cells:
                yield PlacedRow(f"{file}, row {number}", dict(zip(header, cells, strict=False)))
    except csv.Error as problem:
        raise ValueError(f"{file}, row {number + 1} is not CSV ({problem}): mend or remove it") from None


def _text(file: Path) -> Iterator[PlacedRow]:
    for number, line in _lines(file):
        yield PlacedRow(f"{file}, row {number}", {"text": line.rstrip("\r\n")})


def _parquet(file: Path) -> Iterator[PlacedRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for fields in batch.to_pylist():
                    number += 1
                    yield PlacedRow(f"{file}, row {number}", fields)
    except pyarrow.ArrowException as problem:
        raise ValueError(f"{file}, after row {number}: not readable as parquet ({problem})") from problem


def _placed(place: str, fields: Any) -> PlacedRow:
    if not isinstance(fields, dict):
        raise ValueError(f"{place} is {type(fields).__name__} {str(fields)[:60]!r}: wanted an object with named fields")
    return PlacedRow(place, fields)
