"""The target's responses: what is asked, what comes back, and that interruptions and ranks change nothing."""

import pytest
import torch

from drafter.responses import Request, answer, plan, read_responses, shards, write_responses
from drafter.speculative import Sampling, autoregressive_decode
from tests.conftest import VOCABULARY

INSTRUCTIONS = [{"id": str(i), "kind": "k", "split": "train"} for i in range(3)]
PROMPTS = [[1, 2], [3, 4, 5], [6]]
HOW = {"top_p": 0.95, "max_new_tokens": 12, "stop_ids": [7], "batch_size": 2, "seed": 3}


def requests(count=7):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    prompts = [torch.randint(8, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [Request(str(i), "k", "train", (0.0, 0.7)[i % 2], prompt) for i, prompt in enumerate(prompts)]


def test_temperatures_cycle_and_the_next_round_gives_another_one():
    rows = plan(INSTRUCTIONS, PROMPTS, [0.0, 0.5], 6)
    assert [row.id for row in rows] == ["0", "1", "2", "0", "1", "2"]
    assert [row.temperature for row in rows] == [0.0, 0.5, 0.0, 0.5, 0.0, 0.5]
    assert rows[4].prompt_ids == [3, 4, 5]


def test_shards_hold_every_request_once_with_like_ones_side_by_side():
    parts = shards(requests(), 3)
    assert [len(part) for part in parts] == [3, 3, 1]
    flat = [request for part in parts for request in part]
    assert sorted(flat) == sorted(requests())
    assert [row.temperature for row in flat] == sorted(row.temperature for row in flat)


def test_greedy_answers_in_a_padded_batch_are_each_prompts_own(target):
    batch = [request for request in requests() if request.temperature == 0]
    rows = answer(target, batch, top_p=0.95, max_new_tokens=12, stop_ids=[7], batch_size=2, first_round=5)
    for request, row in zip(batch, rows, strict=True):
        alone = autoregressive_decode(target, request.prompt_ids, 12, Sampling(), [7]).tokens
        assert row["response_ids"] == alone
        assert row["truncated"] == (alone[-1] != 7)
        assert row["prompt_ids"] == request.prompt_ids


def test_sampled_answers_never_leave_the_top_p_set(target):
    batch = [request for request in requests() if request.temperature > 0]
    rows = answer(target, batch, top_p=1e-6, max_new_tokens=8, stop_ids=[7], batch_size=4)
    for request, row in zip(batch, rows, strict=True):
        assert row["response_ids"] == autoregressive_decode(target, request.prompt_ids, 8, Sampling(), [7]).tokens


def test_a_response_ends_with_its_first_stop_token(target):
    stops = list(range(0, VOCABULARY, 3))  # so many that most answers meet one
    rows = answer(target, requests()[:1], top_p=0.95, max_new_tokens=12, stop_ids=stops, batch_size=1)
    tokens = rows[0]["response_ids"]
    assert all(token not in stops for token in tokens[:-1])
    assert rows[0]["truncated"] == (tokens[-1] not in stops)


def test_an_interrupted_run_and_any_number_of_ranks_write_the_same(target, tmp_path):
    parts = shards(requests(), 3)
    folders = [tmp_path / name for name in ("whole", "resumed", "ranks")]
    for folder in folders:
        folder.mkdir()
    write_responses(target, parts, folders[0], **HOW)
    write_responses(target, parts[:2], folders[1], **HOW)
    (folders[1] / ".00002.parquet.99.tmp").write_text("half a shard")
    write_responses(target, parts, folders[1], **HOW)
    for rank in (1, 0):
        write_responses(target, parts, folders[2], **HOW, rank=rank, world_size=2)
    whole, resumed, ranks = (read_responses(folder) for folder in folders)
    assert len(whole) == 7
    assert whole == resumed == ranks


def test_another_seed_gives_other_samples(target, tmp_path):
    parts = shards([request for request in requests() if request.temperature > 0], 8)
    found = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_responses(target, parts, folder, **{**HOW, "seed": seed})
        found.append(read_responses(folder))
    assert found[0] != found[1]


@pytest.mark.parametrize("stops", [[], [7, 9]])
def test_any_number_of_stop_tokens_is_fine(target, stops):
    rows = answer(target, requests()[:2], top_p=1.0, max_new_tokens=5, stop_ids=stops, batch_size=2)
    assert all(1 <= len(row["response_ids"]) <= 5 for row in rows)
