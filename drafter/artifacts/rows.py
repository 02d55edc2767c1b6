"""Store rows on disk that can be read one by one in any order: responses, and the cached distributions of the target.

A shard is an Arrow stream with one record batch per row (`datasets.load_dataset("arrow", data_files=…)` reads it).
index.parquet has the position and the CRC-32 of each row. Reading a row therefore takes one range read, from a disk or
an object store, and detects a changed byte. A small JSON file beside each shard has the shard's part of the index. It
is written after the shard and marks it as complete.
"""

import io
import json
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drafter.artifacts.manifest import ArtifactError, read_manifest
from drafter.artifacts.storage import Folder

INDEX = "index.parquet"
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # the end of an Arrow stream
Row = dict[str, Any]
# The columns that the index of a shard is made from. A schema may have others, and in any order.
REQUIRED = [
    ("id", pa.string()),
    ("kind", pa.string()),
    ("split", pa.string()),
    ("prompt_ids", pa.list_(pa.int32())),
    ("response_ids", pa.list_(pa.int32())),
]


def write_shard(folder: Folder, number: int, rows: list[Row], schema: pa.Schema, notes: dict[str, Any]) -> None:
    """Write a shard, and then its part of the index.

    Args:
        folder: where the shard is written.
        number: the number of the shard.
        rows: the rows, whose values are Python objects or flat numpy arrays.
        schema: the columns of the rows.
        notes: JSON-like values that `finish` returns, such as the number of rows that failed.
    """
    head = schema.serialize().to_pybytes()
    parts = [_record(row, schema) for row in rows]
    ends = len(head) + np.cumsum([len(part) for part in parts], dtype=np.int64)
    data = b"".join([head, *parts, END])
    folder.write(_shard(number), data)
    index = [
        {
            "id": row["id"],
            "split": row["split"],
            "kind": row["kind"],
            "shard": number,
            "start": int(end) - len(part),
            "bytes": len(part),
            "crc32": zlib.crc32(part),
            "prompt_tokens": len(row["prompt_ids"]),
            "response_tokens": len(row["response_ids"]),
        }
        for row, part, end in zip(rows, parts, ends, strict=True)
    ]
    note = {"sha256": sha256(data).hexdigest(), "rows": index, "notes": notes}
    folder.write(_note(number), json.dumps(note).encode())


def missing_shards(folder: Folder, count: int) -> list[int]:
    """Return the numbers of the shards that are not complete yet."""
    names = folder.sizes()
    return [number for number in range(count) if _note(number) not in names or _shard(number) not in names]


def read_shard(folder: Folder, number: int) -> list[Row]:
    """Read all rows of a shard, whose stage need not be finished. A list column becomes a flat numpy array."""
    with pa.ipc.open_stream(folder.read(_shard(number))) as stream:
        return [_row(batch) for batch in stream]


def begun_schema(folder: Folder, count: int) -> pa.Schema | None:
    """Return the columns of the first of `count` shards that is complete; None if there is none."""
    complete = sorted(set(range(count)) - set(missing_shards(folder, count)))
    if not complete:
        return None
    first_row = json.loads(folder.read(_note(complete[0])))["rows"][0]
    return pa.ipc.read_schema(pa.py_buffer(folder.read(_shard(complete[0]))[: first_row["start"]]))


def finish(folder: Folder, count: int, schema: pa.Schema) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Write index.parquet. Return the checksum of each file, and the notes of each shard.

    Raises:
        ArtifactError: no shard has a row.
    """
    notes = [json.loads(folder.read(_note(number))) for number in range(count)]
    rows = [row for note in notes for row in note["rows"]]
    if not rows:
        raise ArtifactError(f"{folder} has no row: {[note['notes'] for note in notes]}")
    table = pa.Table.from_pylist(rows).replace_schema_metadata({b"rows": schema.serialize().to_pybytes()})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    folder.write(INDEX, sink.getvalue())
    files = {_shard(number): note["sha256"] for number, note in enumerate(notes)}
    return {**files, INDEX: sha256(sink.getvalue()).hexdigest()}, [note["notes"] for note in notes]


class Rows(Sequence[Row]):
    """Give random access to the rows of a finished stage ("respond" or "cache").

    Raises:
        ArtifactError: the stage did not finish, or a file is missing, cut short or damaged; names the file.
    """

    def __init__(self, url: str | Path, stage: str):
        self.folder, self.stage = Folder(url), stage
        manifest = read_manifest(url, stage)
        data = self.folder.read(INDEX) if self.folder.exists(INDEX) else b""
        if sha256(data).hexdigest() != manifest["files"][INDEX]:
            raise self._damaged(INDEX, "its checksum is not that of the manifest")
        table = pq.read_table(io.BytesIO(data))
        self.schema = pa.ipc.read_schema(pa.py_buffer(table.schema.metadata[b"rows"]))
        self._index = {name: table[name].to_numpy() for name in table.column_names}
        self._check_sizes()

    def __len__(self) -> int:
        return len(self._index["id"])

    def __getitem__(self, index: Any) -> Any:
        return self.read(list(range(len(self)))[index]) if isinstance(index, slice) else self.read([index])[0]

    @property
    def splits(self) -> np.ndarray:
        """Return the split of each row: "train" or "validation"."""
        return self._index["split"]

    @property
    def kinds(self) -> np.ndarray:
        """Return the kind of the instruction of each row."""
        return self._index["kind"]

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row: prompt and response."""
        return self._index["prompt_tokens"] + self._index["response_tokens"]

    @property
    def response_tokens(self) -> int:
        """Return the number of tokens of all responses."""
        return int(self.response_lengths.sum())

    @property
    def response_lengths(self) -> np.ndarray:
        """Return the number of tokens of each row's responses."""
        return self._index["response_tokens"]

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Read the rows at the given indices. A list column becomes a flat numpy array."""
        if len(indices) == 0:
            return []
        index = self._index
        ranges = [
            (_shard(index["shard"][i]), int(index["start"][i]), int(index["start"][i] + index["bytes"][i]))
            for i in indices
        ]
        rows = []
        for i, (name, start, end), data in zip(indices, ranges, self.folder.read_ranges(ranges), strict=True):
            where = f"row '{index['id'][i]}', bytes {start} to {end}"
            if isinstance(data, Exception):
                raise self._damaged(name, f"{where}, cannot be read ({data})") from data
            if len(data) != end - start or zlib.crc32(data) != index["crc32"][i]:
                raise self._damaged(name, f"{where}, has changed since it was written")
            rows.append(_row(pa.ipc.read_record_batch(pa.py_buffer(data), self.schema)))
        return rows

    def _check_sizes(self) -> None:
        sizes, shards = self.folder.sizes(), self._index["shard"]
        last = np.flatnonzero(np.append(shards[1:] != shards[:-1], True))
        for i in last:
            name = _shard(shards[i])
            expected = int(self._index["start"][i] + self._index["bytes"][i]) + len(END)
            if name not in sizes:
                raise self._damaged(name, "it is missing")
            if sizes[name] != expected:
                raise self._damaged(name, f"it has {sizes[name]} bytes, not {expected}")

    def _damaged(self, name: str, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self.folder}/{name} is damaged: {what}. Copy it again from its source. Or make it again: rename "
            f"{self.folder}/manifest.json to started.json, remove {name} and run `python -m experiments.{self.stage}`, "
            f"which keeps the other files"
        )


def _record(row: Row, schema: pa.Schema) -> bytes:
    columns = []
    for field in schema:
        value = row[field.name]
        if pa.types.is_list(field.type):
            values = pa.array(value, field.type.value_type)
            columns.append(pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values))
        else:
            columns.append(pa.array([value], field.type))
    return bytes(pa.record_batch(columns, schema=schema).serialize())


def _row(batch: pa.RecordBatch) -> Row:
    return {
        field.name: column.values.to_numpy() if pa.types.is_list(field.type) else column[0].as_py()
        for field, column in zip(batch.schema, batch.columns, strict=True)
    }


def _shard(number: int) -> str:
    return f"{number:05d}.arrow"


def _note(number: int) -> str:
    return f"{number:05d}.json"
