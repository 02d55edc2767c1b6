"""Conversations go through the stages: every row is used or counted, and the drafter trains on all answers."""

import json

import pytest

from drafter.artifacts.manifest import read_manifest
from drafter.artifacts.rows import Rows
from tests.conftest import write_jsonl
from tests.data.odd_conversations import ODD
from tests.experiments.test_pipeline import stage

SMALL = ["scale=smoke", "data=files", "task=files", "logger=csv", "scale.max_new_tokens=8", "data.heldout_percent=20"]
PREPARED = ["prepare.instructions=null", "prepare.max_prompt_tokens=200", "prepare.heldout_tokens=500"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Prepare data that consist of the fifty odd conversations. Return the overrides and the root."""
    folder = tmp_path_factory.mktemp("conversations")
    write_jsonl(folder / "text.jsonl", [{"text": f"Number {n} is a number of some kind."} for n in range(400)])
    write_jsonl(folder / "chats.jsonl", [row for row, _ in ODD])
    write_jsonl(folder / "task.jsonl", [{"prompt": "What does it do?"}])
    overrides = [*SMALL, f"data.pretraining.path={folder}/text.jsonl", f"task.prompts.path={folder}/task.jsonl"]
    chats = f"+data.instructions.chats={{kind: conversations, path: {folder}/chats.jsonl}}"
    overrides, root = [*overrides, chats, "~data.instructions.questions"], folder / "run"
    stage("prepare", [*overrides, *PREPARED, f"out={root}/data"])
    return overrides, root


def test_each_odd_conversation_is_used_or_left_out_for_its_reason(place):
    _, root = place
    tally = read_manifest(root / "data", "prepare")["counts"]["rows"]["instructions chats"]
    assert tally["read"] == len(ODD) == sum(tally["used"].values()) + sum(tally["left_out"].values())
    expected = [reason for _, reason in ODD if reason]
    assert sum(tally["left_out"].values()) == len(expected)
    for reason in set(expected):
        assert sum(count for found, count in tally["left_out"].items() if reason in found) == expected.count(reason)
    rows = [json.loads(line) for line in (root / "data" / "instructions.jsonl").read_text().splitlines()]
    used = [f"chats:{number}" for number, (_, reason) in enumerate(ODD) if reason is None]
    assert sorted(row["id"] for row in rows) == sorted(used)


@pytest.mark.end_to_end
@pytest.mark.parametrize("turns", ["all", "first", "last"])
def test_what_is_asked_is_written_skipped_or_failed(place, turns):
    overrides, root = place
    many = ["scale.num_responses=60", f"respond.turns={turns}", f"inputs.data={root}/data", f"out={root}/{turns}"]
    stage("respond", [*overrides, *many])
    counts = read_manifest(root / turns, "respond")["counts"]
    assert counts["asked"] == counts["written"] + sum(counts["skipped"].values()) + sum(counts["failed"].values())
    rows = Rows(root / turns, "respond")
    answers = sum(len(row["turns"]) // 2 for row in rows)
    assert answers == counts["answers"]
    if turns != "all":
        assert answers == counts["written"] == len(rows)
        assert not counts["turns_left_out"]
