"""Rows are read one by one in any order, from a disk or an object store, and damage is detected."""

import datasets
import numpy as np
import pyarrow as pa
import pytest

from drafter.artifacts import rows
from drafter.artifacts.manifest import ArtifactError
from drafter.artifacts.storage import Folder
from tests.conftest import finished_rows

SCHEMA = pa.schema([*rows.REQUIRED, ("hidden", pa.list_(pa.float32()))])


def row(number):
    return {
        "id": str(number),
        "kind": "even" if number % 2 == 0 else "odd",
        "split": "validation" if number % 5 == 0 else "train",
        "prompt_ids": [number] * (number % 3 + 1),
        "response_ids": list(range(number % 4)),
        "hidden": np.arange(number, dtype=np.float32),
    }


def written(path, count=11, size=4):
    folder = Folder(path)
    for number, start in enumerate(range(0, count, size)):
        part = [row(i) for i in range(start, min(start + size, count))]
        rows.write_shard(folder, number, part, SCHEMA, {"failed": number})
    files, notes = rows.finish(folder, -(-count // size), SCHEMA)
    assert [note["failed"] for note in notes] == list(range(len(notes)))
    return finished_rows(folder, files, "cache")


def same(found, number):
    wanted = row(number)
    return (found["id"], found["split"]) == (wanted["id"], wanted["split"]) and all(
        found[name].tolist() == list(wanted[name]) for name in ("prompt_ids", "response_ids", "hidden")
    )


@pytest.mark.parametrize("where", ["{tmp_path}/rows", "memory://{tmp_path}"])
def test_rows_are_read_in_any_order_from_disk_and_store(tmp_path, where):
    found = written(where.format(tmp_path=tmp_path))
    assert len(found) == 11
    assert all(same(found[i], i) for i in range(11))
    assert [same(one, i) for one, i in zip(found.read([7, 0, 7, 10]), [7, 0, 7, 10], strict=True)] == [True] * 4
    assert [one["id"] for one in found[3:6]] == ["3", "4", "5"]
    assert found.lengths.tolist() == [i % 3 + 1 + i % 4 for i in range(11)]
    assert (found.splits == "validation").nonzero()[0].tolist() == [0, 5, 10]
    assert found.response_tokens == sum(i % 4 for i in range(11))


def test_datasets_reads_a_shard(tmp_path):
    written(tmp_path)
    files = sorted(str(path) for path in tmp_path.glob("*.arrow"))
    table = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["id"][:] == [str(i) for i in range(11)]
    assert table[10]["hidden"] == list(range(10))


def test_the_same_rows_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        written(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_shard_is_missing_until_its_index_is_written(tmp_path):
    written(tmp_path)
    folder = Folder(tmp_path)
    assert rows.missing_shards(folder, 5) == [3, 4]
    folder.remove("00000.json")
    folder.remove("00001.arrow")
    assert rows.missing_shards(folder, 3) == [0, 1]


def test_a_flipped_bit_is_detected_in_its_row_alone(tmp_path):
    found = written(tmp_path)
    path = tmp_path / "00001.arrow"
    data, index = path.read_bytes(), found._index
    (five,) = (index["id"] == "5").nonzero()[0]
    start, size = int(index["start"][five]), int(index["bytes"][five])
    for position in range(start, start + size, 37):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError, match=rf"00001.arrow is damaged: row '5', bytes {start} to {start + size}"):
            found[5]
        assert same(found[6], 6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "00001.arrow").unlink(), r"00001\.arrow is damaged: it is missing"),
        (
            lambda path: (path / "00002.arrow").write_bytes((path / "00002.arrow").read_bytes()[:-50]),
            r"00002\.arrow is damaged: it has \d+ bytes, not \d+",
        ),
        (
            lambda path: (path / "index.parquet").write_bytes(b"x" + (path / "index.parquet").read_bytes()[1:]),
            r"index\.parquet is damaged: its checksum is not that of the manifest",
        ),
        (lambda path: (path / "index.parquet").unlink(), r"index\.parquet is damaged"),
        (lambda path: (path / "manifest.json").unlink(), r"holds no finished 'cache'"),
    ],
)
def test_missing_and_cut_files_are_detected_before_a_row_is_read(tmp_path, damage, message):
    written(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        rows.Rows(tmp_path, "cache")


def test_the_error_names_a_shard_that_disappears_during_reading(tmp_path):
    found = written(tmp_path)
    (tmp_path / "00001.arrow").unlink()
    assert same(found[0], 0)
    with pytest.raises(ArtifactError, match=r"00001\.arrow is damaged: row '4', .* cannot be read"):
        found[4]
