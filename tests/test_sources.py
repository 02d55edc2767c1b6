import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drafter.sources import matches, read_rows, render

ROWS = [{"text": "first, with a comma", "number": 1}, {"text": 'second "quoted"', "number": 2}]


def test_jsonl_rows_are_read_in_order_with_their_nested_fields(tmp_path):
    rows = [{"translation": {"de": "Hallo", "en": "Hello"}, "id": i} for i in range(5)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_rows(str(path))) == rows


def test_csv_rows_are_read_with_their_header_as_fields(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,number\n"first, with a comma",1\n"second ""quoted""",2\n')
    assert list(read_rows(str(path))) == ROWS


def test_parquet_rows_are_read(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert list(read_rows(str(tmp_path / "rows.parquet"))) == ROWS


def test_each_line_of_a_text_file_is_a_row(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\n")
    assert list(read_rows(str(path))) == [{"text": "one"}, {"text": "two"}]


def test_a_local_file_is_read_whole_whatever_the_split_asked_for(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\n")
    assert len(list(read_rows(str(path), split="validation"))) == 2


def test_a_missing_file_is_named(tmp_path):
    path = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no data file at .*nowhere\.jsonl"):
        read_rows(path)


@pytest.mark.parametrize("name", ["table.xlsx", "README"])
def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"is none of \.jsonl, \.json, \.parquet, \.csv, \.txt"):
        read_rows(str(tmp_path / name))


def test_a_template_is_filled_from_the_row_and_stripped():
    assert render("Question: {q}\n\n{context}", {"q": "why?", "context": ""}) == "Question: why?"


def test_a_template_reaches_into_a_nested_field():
    row = {"translation": {"de": "Hallo", "en": "Hello"}}
    assert render("Translate:\n\n{translation[de]}", row) == "Translate:\n\nHallo"


def test_braces_in_a_value_are_left_alone():
    assert render("{text}", {"text": "a {dict} and {0}"}) == "a {dict} and {0}"


@pytest.mark.parametrize("template", ["{article}", "{translation[fr]}"])
def test_a_missing_field_is_named_with_the_template_and_what_the_row_has(template):
    with pytest.raises(KeyError) as refusal:
        render(template, {"text": "x", "translation": {"de": "Hallo"}})
    message = str(refusal.value)
    assert ("article" in message) or ("fr" in message)
    assert template in message
    assert "['text', 'translation']" in message


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, True),
        ({"role": "prompter"}, True),
        ({"role": "prompter", "parent_id": None}, True),
        ({"role": "assistant"}, False),
        ({"role": "prompter", "lang": "de"}, False),
        ({"absent": "x"}, False),
    ],
)
def test_a_row_matches_where_every_field_has_its_value(where, expected):
    assert matches({"role": "prompter", "parent_id": None, "lang": "en"}, where) is expected
