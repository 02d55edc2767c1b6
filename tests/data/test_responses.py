"""Responses are planned, generated and written, and neither interruptions nor ranks change them."""

import pytest
import torch

from drafter.artifacts.rows import finish
from drafter.artifacts.storage import Folder
from drafter.data import dealing
from drafter.data.dialogues import Continuation
from drafter.data.engines import Limits, Request, transformers_engine
from drafter.data.responses import Instruction, plan, schema, shards, write_responses
from tests.conftest import VOCABULARY, finished_rows

PROMPTS = [[1, 2], [3, 4, 5], [6]]
INSTRUCTIONS = [
    Instruction({"id": str(i), "kind": "k", "split": "train"}, None, prompt) for i, prompt in enumerate(PROMPTS)
]
LIMITS = Limits(top_p=0.95, max_new_tokens=12, stop_ids=[7])
SCHEMA = schema(0.95)
HOW = {"following": Continuation(None, [7], 100), "known_ids": set(range(VOCABULARY)), "seed": 3}


def requests(count=7):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    prompts = [torch.randint(8, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [Request(str(i), "k", "train", (0.0, 0.7)[i % 2], prompt) for i, prompt in enumerate(prompts)]


def test_temperatures_cycle_and_the_next_round_gives_another_one():
    rows = plan(INSTRUCTIONS, [0.0, 0.5], 6)
    assert [row.id for row in rows] == ["0", "1", "2", "0", "1", "2"]
    assert [row.temperature for row in rows] == [0.0, 0.5, 0.0, 0.5, 0.0, 0.5]
    assert rows[4].prompt_ids == [3, 4, 5]
    assert [row.repetition for row in rows] == [0, 0, 0, 1, 1, 1]


def test_shards_hold_every_request_once_and_similar_ones_together():
    parts = shards(requests(), 3)
    assert [len(part) for part in parts] == [3, 3, 1]
    flat = [request for part in parts for request in part]
    assert sorted(flat) == sorted(requests())
    assert [len(row.prompt_ids) for row in flat] == sorted(len(row.prompt_ids) for row in flat)


def test_an_interrupted_run_and_any_number_of_ranks_write_the_same(target, tmp_path, monkeypatch):
    parts, engine = shards(requests(), 3), transformers_engine(target, LIMITS, batch_tokens=40)
    whole, resumed, ranks = (Folder(tmp_path / name) for name in ("whole", "resumed", "ranks"))
    write_responses(engine, parts, whole, SCHEMA, **HOW)
    write_responses(engine, parts[:2], resumed, SCHEMA, **HOW)
    resumed.write("00002.arrow", b"a shard whose index was not written")
    write_responses(engine, parts, resumed, SCHEMA, **HOW)
    for taken in ([1], [2], [0]):
        monkeypatch.setattr(dealing, "deal", lambda numbers, world_size, taken=taken: enumerate(taken))
        write_responses(engine, parts, ranks, SCHEMA, **HOW, world_size=3)
    files = [finish(folder, 3, SCHEMA)[0] for folder in (whole, resumed, ranks)]
    assert files[0] == files[1] == files[2]
    assert len(finished_rows(whole, files[0], "respond")) == 7


def test_a_row_has_the_request_and_the_response(target, tmp_path):
    folder = Folder(tmp_path)
    write_responses(transformers_engine(target, LIMITS, 100), [requests()], folder, SCHEMA, **HOW)
    files, notes = finish(folder, 1, SCHEMA)
    rows = finished_rows(folder, files, "respond")
    assert notes[0]["failed"] == {}
    for request, row in zip(requests(), rows, strict=True):
        assert {key: row[key] for key in ("id", "kind", "split")} == {"id": request.id, "kind": "k", "split": "train"}
        assert row["prompt_ids"].tolist() == request.prompt_ids
        assert row["truncated"] == (row["response_ids"][-1] != 7)
        assert 1 <= len(row["response_ids"]) <= 12
    assert notes[0]["truncated"] == sum(row["truncated"] for row in rows)


def test_empty_responses_and_unknown_ids_are_left_out_and_counted(tmp_path):
    answers = [[5, 7], [], [VOCABULARY, 7], [9], [3, VOCABULARY + 5], [7], [7]]
    write_responses(lambda part: answers, [requests()], Folder(tmp_path), SCHEMA, **HOW)
    files, notes = finish(Folder(tmp_path), 1, SCHEMA)
    assert notes[0]["failed"] == {"an empty response": 1, "an id that the tokenizer or the target does not have": 2}
    rows = finished_rows(Folder(tmp_path), files, "respond")
    assert [row["response_ids"].tolist() for row in rows] == [[5, 7], [9], [7], [7]]
    assert [row["truncated"] for row in rows] == [False, True, False, False]


def test_the_ids_of_a_tokenizer_may_have_gaps_and_exceed_their_number(tmp_path):
    known, answers = {5, 7, VOCABULARY + 5}, [[VOCABULARY + 5, 7], [6, 7], [5, 7]]
    write_responses(lambda part: answers, [requests(3)], Folder(tmp_path), SCHEMA, **{**HOW, "known_ids": known})
    files, notes = finish(Folder(tmp_path), 1, SCHEMA)
    assert notes[0]["failed"] == {"an id that the tokenizer or the target does not have": 1}
    rows = finished_rows(Folder(tmp_path), files, "respond")
    assert [row["response_ids"].tolist() for row in rows] == [[VOCABULARY + 5, 7], [5, 7]]


def test_another_seed_gives_other_samples(target, tmp_path):
    parts = shards([request for request in requests() if request.temperature > 0], 8)
    found = []
    for seed in (1, 2):
        folder = Folder(tmp_path / str(seed))
        write_responses(transformers_engine(target, LIMITS, 100), parts, folder, SCHEMA, **{**HOW, "seed": seed})
        found.append(finish(folder, 1, SCHEMA)[0])
    assert found[0] != found[1]


def test_a_set_without_rows_is_refused(tmp_path):
    write_responses(lambda part: [[]] * len(part), [requests()], Folder(tmp_path), SCHEMA, **HOW)
    with pytest.raises(ValueError, match=r"has no row.*'an empty response': 7"):
        finish(Folder(tmp_path), 1, SCHEMA)
