import json
import re

import pytest
from datasets.exceptions import DatasetNotFoundError

from drafter.data.sources import LOOKAHEAD, Source, entries, read_rows, source_of
from experiments.running.commands import is_refusal
from tests.conftest import write_jsonl


def source(tmp_path, rows, template="{text}", **how):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return Source(str(tmp_path / "rows.jsonl"), template, **how)


def test_a_local_file_is_read_completely_for_any_split(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\n")
    assert list(read_rows(str(path), split="validation")) == [{"text": "one"}, {"text": "two"}]


def test_the_error_names_a_missing_file(tmp_path):
    path = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no data file at .*nowhere\.jsonl"):
        read_rows(path)


@pytest.mark.parametrize("problem", [ConnectionError, DatasetNotFoundError, FileNotFoundError])
def test_a_name_that_is_neither_local_nor_on_the_hub_is_refused_in_one_sentence(monkeypatch, problem):
    def fails(*given, **how):
        raise problem("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", fails)
    sentence = "'missing_dir' is no file or folder here, and no dataset that the hub has (or the hub cannot be reached)"
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)) as refusal:
        list(read_rows("missing_dir"))
    assert "\n" not in str(refusal.value)
    assert is_refusal(refusal.value)


@pytest.mark.parametrize("name", ["table.xlsx", "README"])
def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"is none of \.jsonl, \.json, \.parquet, \.csv, \.txt"):
        read_rows(str(tmp_path / name))


def test_entries_have_the_number_of_their_row_and_the_reason_if_it_is_left_out(tmp_path):
    rows = [
        {"text": "a", "lang": "en"},
        {"text": None, "lang": "en"},
        {"text": "b", "lang": "de"},
        {"text": "c", "lang": "en"},
    ]
    found = list(entries(source(tmp_path, rows, where={"lang": "en"})))
    assert [(one.number, one.text, one.left_out) for one in found] == [
        (0, "a", None),
        (1, "", "empty"),
        (2, "", "filtered by where"),
        (3, "c", None),
    ]


def test_a_field_that_some_rows_lack_is_empty_there_and_counted(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "input": "c"}, {"input": "d"}]
    found = list(entries(source(tmp_path, rows, "{text} {input}", reference="{input}")))
    assert [(one.text, one.reference) for one in found] == [("a", ""), ("b c", "c"), ("d", "d")]
    assert [one.absent for one in found] == [["input", "input"], [], ["text"]]


def test_a_field_that_no_row_has_is_refused(tmp_path):
    rows = [{"text": str(number)} for number in range(LOOKAHEAD + 1)]
    message = r"row 1: template '{text} {body}' needs the field 'body'; the row has \['text'\], .* the first 1000 rows"
    with pytest.raises(KeyError, match=message):
        next(entries(source(tmp_path, rows, "{text} {body}")))
    with pytest.raises(KeyError, match="needs the field 'body'"):
        next(entries(source(tmp_path, rows, reference="{body}")))


def test_the_error_for_a_row_without_text_has_its_location(tmp_path):
    one = source(tmp_path, [{"text": "a"}, {"text": ["b"]}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: the field {text} is a list"):
        list(entries(one))


def test_no_rows_are_no_entries(tmp_path):
    assert list(entries(source(tmp_path, []))) == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"whre": {}}, r"data.x has \['whre'\]; a source has \['path', 'template'"),
        ({"weight": 0}, "data.x.weight is 0, must be above 0"),
        ({"template": "{"}, "a literal brace is doubled"),
        ({"reference": "yes"}, "has no field"),
    ],
)
def test_a_wrong_setting_of_a_source_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        source_of({"path": "x.jsonl", "template": "{text}", **how}, "data.x")


def test_a_local_file_is_identified_by_its_content_and_not_by_its_path(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    here, there = source(tmp_path / "a", [{"text": "x"}]), source(tmp_path / "b", [{"text": "x"}], split="test")
    assert here.fingerprint() == there.fingerprint()
    assert here.identity("rows") == there.identity("rows")
    assert str(tmp_path) not in json.dumps(here.identity("rows"))
    assert source(tmp_path / "b", [{"text": "y"}]).fingerprint() != here.fingerprint()
    assert Source("org/x", "{text}", revision="1").identity("x") != Source("org/x", "{text}").identity("x")
