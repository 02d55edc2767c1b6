"""Block efficiency by turn, role and position: cells are ratios of the counts; lines that say nothing are absent."""

from pathlib import Path

import pyarrow.parquet
import pytest

from drafter.artifacts.manifest import read_jsonl, write_jsonl
from experiments.reporting.breakdown import breakdown_tables
from experiments.reporting.counts import write_counts
from experiments.reporting.identity import DrafterIdentity
from experiments.reporting.results import Evaluation, counts_by_prompt, parts_of, read_evaluations, summarise
from experiments.tables import describe_prompts
from tests.experiments.test_tables import evaluation

FIELDS = {"accepted": 1, "tested": 2, "seconds": 1.0, "baseline_tokens": 9, "baseline_seconds": 1.0}


def row(task, prompt, turn, by_role, by_answer_position, gamma=3):
    tokens, calls = (sum(part) for part in zip(*by_role.values(), strict=True))
    parts = {"by_role": by_role, "by_answer_position": by_answer_position}
    counted = {"tokens": tokens, "target_calls": calls}
    return {"task": task, "gamma": gamma, "prompt": prompt, "turn": turn, **counted, **FIELDS, **parts}


def chats(better=0):
    """Four conversations of two turns, in the second of which the target thinks less."""
    for n in range(4):
        first = {"thinking": [20 + n, 10], "answer": [30 + better, 10]}
        yield row("chats", f"chats:{n}", 1, first, {"0-31": [30, 12], "32-127": [20 + n + better, 8]})
        second = {"answer": [40, 10]} if n else {"answer": [40, 10], "tool call": [8, 2]}
        yield row(
            "chats", f"chats:{n}#2", 2, second, {"0-31": [sum(part[0] for part in second.values()), 12 - 2 * (n > 0)]}
        )
        yield row("plain", f"plain:{n}", 1, {"answer": [5, 4]}, {"0-31": [5, 4]})
        yield row("plain", f"plain:{n}", 1, {"answer": [5, 4]}, {"0-31": [5, 4]}, gamma="adaptive")


def of_series(series, rows):
    parts = [part for one in rows for part in parts_of(one)]
    return Evaluation(DrafterIdentity(series), 0.1, ("chats",), {}, [], Path(series), parts)


@pytest.fixture
def tables():
    found = breakdown_tables([of_series("pretrained", chats()), of_series("kld", chats(better=10))])
    return {table.name: table for table in found}


def test_each_table_has_the_ratios_of_its_parts(tables):
    assert list(tables) == ["by_turn", "by_role", "by_position"]
    assert tables["by_turn"].columns == ["task", "drafter", "turn 1", "turn 2"]
    assert tables["by_turn"].title == "τ by turn, γ = 3"
    values = {name: [[cell.split(" [")[0] for cell in line] for line in table.rows] for name, table in tables.items()}
    assert values["by_turn"][0] == ["chats", "pretrained", f"{206 / 80:.2f}", f"{168 / 42:.2f}"]
    assert values["by_turn"][1] == ["chats", "kld", f"{246 / 80:.2f}", f"{168 / 42:.2f}"]
    assert tables["by_role"].columns[2:] == ["thinking", "answer", "tool call"]
    assert values["by_role"][0] == ["chats", "pretrained", f"{86 / 40:.2f}", f"{280 / 80:.2f}", "4.00"]
    assert tables["by_position"].columns[2:] == ["0–31", "32–127"]
    assert {line[0] for table in tables.values() for line in table.rows} == {"chats"}  # the other task has one part


def test_intervals_come_from_conversations(tables):
    line = tables["by_turn"].rows[0]
    low, high = (float(bound) for bound in line[2].split("[")[1].rstrip("]").split(", "))
    assert 50 / 20 <= low < 206 / 80 < high <= 53 / 20


def test_an_evaluation_of_an_earlier_version_has_no_such_tables(tmp_path):
    evaluation(tmp_path, "drafter", "pretrained", 0)
    found = read_evaluations(tmp_path / "evaluate")
    assert found[0].parts == []
    assert breakdown_tables(found) == []
    path = tmp_path / "evaluate" / "drafter" / "counts.jsonl"  # begun by an earlier version, and finished by this one
    first, *rest = read_jsonl(path)
    write_jsonl(path, [{**first, "turn": 1, "by_role": {"answer": [5, 4]}}, *rest])
    assert read_evaluations(tmp_path / "evaluate")[0].parts == []


def test_a_series_is_shown_only_if_all_of_its_seeds_have_parts():
    old, new = of_series("kld", []), of_series("kld", chats())
    found = breakdown_tables([of_series("pretrained", chats()), old, new])
    assert {line[1] for table in found for line in table.rows} == {"pretrained"}


def test_turns_count_as_one_prompt(tmp_path):
    evaluation(tmp_path, "drafter", "pretrained", 0, tasks={"chats": 4}, gammas=(3,))
    (one,) = read_evaluations(tmp_path / "evaluate")
    renamed = {
        (task, gamma, prompt.replace("chats:1", "chats:0#2")): c for (task, gamma, prompt), c in one.counts.items()
    }
    one = one._replace(counts=renamed)
    assert list(counts_by_prompt([one], "chats", 3)) == ["chats:0 chats:0#2", "chats:2", "chats:3"]
    assert summarise([one])[0].prompts == 3
    assert "3 prompts and conversations with 4 turns, resampled as wholes" in describe_prompts([one])
    write_counts(tmp_path / "counts.parquet", [one])
    found = pyarrow.parquet.read_table(tmp_path / "counts.parquet").select(["prompt", "conversation", "turn"])
    assert {"prompt": "chats:0#2", "conversation": "chats:0", "turn": 2} in found.to_pylist()
    assert {"prompt": "chats:2", "conversation": "chats:2", "turn": 1} in found.to_pylist()
