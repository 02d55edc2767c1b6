import pytest

from drafter.data.selection import Candidate, Selection, check_ids, read_instructions
from tests.conftest import write_jsonl


def stream(name, number, split=lambda i: "train", left_out=lambda i: None, size=lambda i: 1):
    for i in range(number):
        yield Candidate({"id": f"{name}:{i}", "kind": name, "size": size(i)}, split(i), left_out(i))


def select(streams, limit=10, weights=None, **quotas):
    return Selection(streams, quotas, limit, lambda row: row["size"], weights)


def ids(selection, split="train"):
    return [row["id"] for row in selection.rows[split]]


def test_one_source_gives_its_first_rows_in_order():
    selection = select({"a": stream("a", 100)}, train=5)
    assert ids(selection) == [f"a:{i}" for i in range(5)]
    assert selection.tallies["a"].counts() == {"read": 5, "used": {"train": 5}, "left_out": {}}


def test_sources_take_turns_until_each_is_exhausted():
    selection = select({"a": stream("a", 2), "b": stream("b", 4), "c": stream("c", 9)}, train=10)
    assert ids(selection) == ["a:0", "b:0", "c:0", "a:1", "b:1", "c:1", "b:2", "c:2", "b:3", "c:3"]
    assert [tally.used["train"] for tally in selection.tallies.values()] == [2, 4, 4]


def test_without_a_quota_everything_is_used():
    assert len(ids(select({"a": stream("a", 7), "b": stream("b", 3)}, train=None))) == 10


@pytest.mark.parametrize("weights", [{"a": 3.0, "b": 1.0}, {"a": 1.5, "b": 0.5}])
def test_a_source_is_drawn_from_as_often_as_its_weight_says(weights):
    selection = select({"a": stream("a", 100), "b": stream("b", 100)}, weights=weights, train=8)
    assert [row["kind"] for row in selection.rows["train"]] == list("aaabaaab")


def test_a_row_that_is_left_out_does_not_cost_its_source_a_turn():
    odd = stream("a", 100, left_out=lambda i: "empty" if i % 2 == 0 else None)
    selection = select({"a": odd, "b": stream("b", 100)}, train=4)
    assert ids(selection) == ["a:1", "b:0", "a:3", "b:1"]


def test_both_splits_get_their_first_rows_in_one_pass():
    split = {True: "validation", False: "train"}
    selection = select({"a": stream("a", 1000, lambda i: split[i % 4 == 0])}, train=6, validation=3)
    assert ids(selection) == [f"a:{i}" for i in (1, 2, 3, 5, 6, 7)]
    assert ids(selection, "validation") == ["a:0", "a:4", "a:8"]
    selection = select({"a": stream("a", 1000, lambda i: split[i % 2 == 0])}, train=9, validation=2)
    assert ids(selection, "validation") == ["a:0", "a:2"]


def test_rows_that_are_left_out_are_counted_by_reason():
    reasons = {0: "empty", 3: "filtered by where"}
    one = stream(
        "a",
        30,
        split=lambda i: "validation" if i % 5 == 4 else "train",
        left_out=reasons.get,
        size=lambda i: {1: 50, 2: 20, 6: "a reason"}.get(i, 1),
    )
    selection = select({"a": one}, train=None, validation=2)
    tally = selection.tallies["a"]
    assert tally.counts() == {
        "read": 30,
        "used": {"train": 19, "validation": 2},
        "left_out": {
            "empty": 1,
            "too long": 2,
            "filtered by where": 1,
            "a reason": 1,
            "not needed": 4,
        },
    }
    assert tally.read == tally.used.total() + tally.left_out.total()
    assert tally.shortest == 20
    assert str(tally).startswith("30 rows read, 21 used (19 for train, 2 for validation), 1 empty, 2 too long")


def test_rows_that_lack_a_field_are_counted_separately():
    rows = iter([Candidate({"id": "a:0", "size": 1}, "train", None, ("input",))])
    tally = select({"a": rows}, train=1).tallies["a"]
    assert tally.counts()["rows_that_lack"] == {"input": 1}
    assert str(tally) == "1 rows read, 1 used; 1 lack the field input, which is empty"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a:0"}, {"id": "a:1"}, {"id": "a:0"}], "1 ids belong to more than one row, e.g. 'a:0'"),
        ([{"id": "a:0"}, {"prompt": "x"}, {"id": ""}, {"id": None}], "3 rows have no id"),
    ],
)
def test_missing_and_repeated_ids_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        check_ids(rows, "here")
    write_jsonl(tmp_path / "instructions.jsonl", rows)
    with pytest.raises(ValueError, match=rf"instructions\.jsonl: {message}"):
        read_instructions(tmp_path / "instructions.jsonl")
