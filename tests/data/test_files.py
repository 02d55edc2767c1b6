import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drafter.data.files import find_files, kind, read_file

ROWS = [{"text": "first, with a comma", "number": 1}, {"text": 'second "quoted"', "number": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows_of(path):
    return [row.fields for file in find_files(str(path)) for row in read_file(file)]


def refusal(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (each test checks the message)
        rows_of(path)
    return str(caught.value)


def test_jsonl_rows_keep_nested_fields_and_blank_lines_are_skipped(tmp_path):
    rows = [{"translation": {"de": "Hallo", "en": "Hello"}, "id": i} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(tmp_path / "rows.jsonl") == rows
    assert [row.location for row in read_file(tmp_path / "rows.jsonl")][-1].endswith("rows.jsonl, row 5")


def test_fields_may_change_their_type_from_row_to_row(tmp_path):
    rows = [{"text": "a", "title": None}, {"text": "b", "title": "A title"}, {"text": "c", "title": 3, "new": [1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("text", [LINES, json.dumps(ROWS), json.dumps(ROWS, indent=1), "\n [" + json.dumps(ROWS)[1:]])
def test_json_is_an_array_or_an_object_on_each_line(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    assert rows_of(tmp_path / "rows.json") == ROWS


def test_every_cell_of_a_csv_is_text(tmp_path):
    text = 'text,number\n"first, with\na comma",1\nnull,NA\n\n007,\n"second ""quoted""",2024-01-05\n'
    (tmp_path / "rows.csv").write_text(text)
    assert [tuple(row.values()) for row in rows_of(tmp_path / "rows.csv")] == [
        ("first, with\na comma", "1"),
        ("null", "NA"),
        ("007", ""),
        ('second "quoted"', "2024-01-05"),
    ]


def test_a_cell_may_be_as_long_as_an_article(tmp_path):
    (tmp_path / "rows.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(rows_of(tmp_path / "rows.csv")[0]["text"]) == 200_000


def test_parquet_rows_are_read(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == ROWS


def test_each_line_of_a_text_file_is_a_row(tmp_path):
    (tmp_path / "lines.txt").write_bytes("one\r\ntwo\u2028still two\n\nfour".encode())
    assert [row["text"] for row in rows_of(tmp_path / "lines.txt")] == ["one", "two\u2028still two", "", "four"]


def compressed(path, data, parts=2):
    """The data in several members of one file, as parallel compressors write them."""
    size = len(data) // parts + 1
    for start in range(0, len(data), size):
        part = data[start : start + size]
        if path.suffix == ".gz":
            whole = gzip.compress(part)
        else:
            with pa.output_stream(sink := pa.BufferOutputStream(), compression="zstd") as stream:
                stream.write(part)
            whole = sink.getvalue().to_pybytes()
        with path.open("ab") as file:
            file.write(whole)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_shards_of_a_pattern_are_read_in_the_order_of_their_names(tmp_path, suffix):
    for number, row in enumerate(ROWS):
        compressed(tmp_path / f"text-{number}.jsonl{suffix}", (json.dumps(row) + "\n").encode())
    assert rows_of(tmp_path / f"text-*.jsonl{suffix}") == ROWS
    assert rows_of(tmp_path) == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_the_error_names_a_shard_that_is_cut_short(tmp_path, suffix):
    whole = tmp_path / f"whole.jsonl{suffix}"
    compressed(whole, LINES.encode() * 100, parts=1)
    assert "is cut short or damaged" in refusal(tmp_path / f"cut.jsonl{suffix}", whole.read_bytes()[:-4])
    assert f"cut.jsonl{suffix}" in refusal(tmp_path / f"cut.jsonl{suffix}", whole.read_bytes()[:-4])
    assert "is cut short or damaged" in refusal(tmp_path / f"cut.jsonl{suffix}", LINES * 10)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_byte_order_mark_selects_the_encoding(tmp_path, encoding, name):
    text = {"rows.csv": "text\nschön\nゞ\n", "rows.jsonl": '{"text": "schön"}\n{"text": "ゞ"}\n'}[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert rows_of(tmp_path / name) == [{"text": "schön"}, {"text": "ゞ"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"a": 1}\n{"a": \n', r"rows\.jsonl, row 2 is not JSON .*: correct or remove it"),
        ("rows.jsonl", '{"a": 1}\n["a"]\n', r"rows\.jsonl, row 2 is list \"\['a'\]\": expected an object"),
        ("rows.json", '{\n"data": [{"a": 1}]}', r"rows\.json is one object, with \['data'\]: expected an array"),
        ("rows.json", "[1]", r"row 1 is int '1': expected an object"),
        ("rows.csv", "a,b\n1,2\n1,2,3\n", r"rows\.csv, row 3 has 3 cells for the 2 columns \['a', 'b'\]"),
        ("rows.csv", 'a,b\n1,2\n"1,2\n', r"rows\.csv, row 3 is not CSV"),
        ("rows.csv", "a,a\n1,2\n", r"the header has \['a'\] more than once"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', r"row 2, byte 11 is 0xe9, not UTF-8: convert .*iconv"),
        ("rows.txt", "ab".encode("utf-16")[:-1], r"not utf-16, as its first bytes say"),
        ("rows.parquet", "PAR1 nothing", r"rows\.parquet, after row 0: not readable as parquet"),
    ],
)
def test_the_error_for_an_unreadable_row_has_its_file_and_number(tmp_path, name, content, message):
    assert re.search(message, refusal(tmp_path / name, content), re.DOTALL)


def test_a_cell_that_is_missing_at_the_end_of_a_row_is_a_missing_field(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1\n")
    assert rows_of(tmp_path / "rows.csv") == [{"a": "1"}]


def test_a_folder_has_the_files_of_one_kind_and_nothing_hidden(tmp_path):
    (tmp_path / "b [1]").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("a.jsonl", "b [1]/c.jsonl.gz", ".cache/d.jsonl", "README.md"):
        (tmp_path / name).write_text("")
    assert [file.name for file in find_files(str(tmp_path))] == ["a.jsonl", "c.jsonl.gz"]
    assert [file.name for file in find_files(f"{tmp_path}/b [1]")] == ["c.jsonl.gz"]
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(ValueError, match=r"several kinds \(\.csv, \.jsonl\)"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("pattern", ["nowhere.jsonl", "*.parquet"])
def test_the_error_names_a_path_without_files(tmp_path, pattern):
    with pytest.raises(FileNotFoundError, match=r"no data file at '.*" + re.escape(pattern)):
        find_files(f"{tmp_path}/{pattern}")


def test_the_kind_of_a_compressed_file_is_its_inner_suffix():
    names = ("a.jsonl", "a.jsonl.gz", "a.csv.zst", "a.parquet.gz", "a.gz", "org/v1.5")
    assert [kind(name) for name in names] == [".jsonl", ".jsonl", ".csv", "", "", ""]
