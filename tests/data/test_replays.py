"""Drafting is replayed from rejections: where these lie, what is drafted there, and which rows are written."""

import numpy as np
import pytest
import torch

from drafter.artifacts import rows
from drafter.artifacts.storage import Folder
from drafter.data.batches import response_sequence
from drafter.data.replays import Pair, Replay, acceptance, plan_replays, rejected_positions, write_replays
from drafter.data.responses import schema
from drafter.decoding.expected_efficiency import expected_blocks
from drafter.warping import Sampling, warp
from tests.conftest import finished_rows

HOW = {"batch_tokens": 64, "shard_size": 3, "seed": 0}
REPLAY = Replay(per_response=1, num_speculative_tokens=3, top_p=0.9, stop_ids=[0])


def row(number, temperature, split="train"):
    generator = np.random.default_rng(number)
    turns = [2 + number % 3, 6, 3, 4] if number % 2 else [4, 9]
    given, generated = sum(turns[::2]), sum(turns[1::2])
    ids = generator.integers(1, 64, given + generated).tolist()
    return {
        "id": str(number),
        "kind": "k",
        "split": split,
        "temperature": temperature,
        "prompt_ids": ids[:given],
        "response_ids": ids[given:],
        "turns": turns,
        "truncated": False,
    }


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("responses"))
    found = [row(number, (0.0, 1.0)[number // 2 % 2]) for number in range(8)] + [row(8, 1.0, "validation")]
    rows.write_shard(folder, 0, found, schema(0.9), {})
    return finished_rows(folder, rows.finish(folder, 1, schema(0.9))[0], "respond")


def replayed(pair, responses, path, replay=REPLAY, **how):
    folder = Folder(path)
    count = write_replays(pair, responses, folder, replay, **{**HOW, **how})
    files, notes = rows.finish(folder, count, responses.schema)
    found = finished_rows(folder, files, "respond")[:]
    return [one for one in found if "@" not in one["id"]], [one for one in found if "@" in one["id"]], notes


def test_acceptance_is_that_of_each_sequence_read_alone(target, drafter, responses):
    samples = [response_sequence(one) for one in responses[:]]
    for sample, accept_L in zip(samples, acceptance(Pair(target, drafter), samples, 0.9, 40), strict=True):
        ids_T, expected = torch.tensor(sample.ids_T, dtype=torch.long), []
        logits_q_TV, logits_p_TV = (model(ids_T[None]).logits[0] for model in (target, drafter))
        for start, end in sample.predicted():
            for position in range(start, end):
                x, at = ids_T[position], slice(position - 1, position)
                p, q = (warp(one[at], Sampling(sample.temperature, 0.9))[0, x] for one in (logits_p_TV, logits_q_TV))
                expected.append(float(p if sample.temperature == 0 else torch.where(q > 0, p / q, p > 0).clamp(max=1)))
        # Padded batches and single sequences differ by rounding.
        torch.testing.assert_close(accept_L, torch.tensor(expected), atol=1e-4, rtol=0)


def test_the_blocks_of_the_walk_are_as_many_as_expected():
    """An independent figure: tokens = blocks + accepted drafts, and a rejection is a block that was cut short."""
    accept_L, gamma, tries = torch.tensor([0.9, 0.2, 0.5, 0.7, 0.4, 0.8, 0.6, 0.3]), 2, 4000
    generator, length = torch.Generator().manual_seed(0), 8
    accepted = torch.rand(tries, length, generator=generator) < accept_L
    blocks = 0
    for one in accepted.tolist():
        ends, start = {*rejected_positions(one, gamma)}, 0
        while start < length:
            cut_short = [position for position in range(start, min(start + gamma, length)) if position in ends]
            start = cut_short[0] + 1 if cut_short else start + gamma + 1
            blocks += 1
    expected = float(expected_blocks(accept_L[None], torch.tensor([length]), gamma)[0])
    assert blocks / tries == pytest.approx(expected, abs=0.05)  # four standard errors


def test_a_drafter_that_is_the_target_has_no_rejection_in_what_the_target_wrote(target, responses):
    likely = [one | {"temperature": 1.0} for one in responses[:]]
    replay = REPLAY._replace(top_p=1.0)  # the target may have written any token
    assert plan_replays(Pair(target, target), likely, replay, 64) == ([], [0] * 9)


def test_a_replay_is_what_the_drafter_drafts_after_the_text_before_a_rejection(target, drafter, responses, tmp_path):
    kept, replays, notes = replayed(Pair(target, drafter), responses, tmp_path)
    assert [one["id"] for one in kept] == [str(number) for number in range(8)]  # no validation response
    assert 0 < len(replays) <= 8
    texts = {one["id"]: response_sequence(one) for one in kept}
    for one in replays:
        name, _, position = one["id"].partition("@")
        text, position, draft = texts[name], int(position), one["response_ids"].tolist()
        assert any(start <= position < end for start, end in text.predicted())
        assert one["prompt_ids"].tolist() == text.ids_T[:position].tolist()
        assert one["turns"].tolist() == [position, len(draft)]
        assert one["temperature"] == text.temperature
        assert len(draft) == 3 or (len(draft) < 3 and draft[-1] == 0)
        if text.temperature == 0:
            ids_T = torch.tensor([*text.ids_T[:position], *draft])
            greedy = drafter(ids_T[None]).logits[0].argmax(-1)
            assert draft == greedy[position - 1 : -1].tolist()
            assert draft[0] != text.ids_T[position]  # the rejected draft
    assert sum(note["replays"] for note in notes) == len(replays)
    assert sum(note["rejections"] for note in notes) >= len(replays)


def test_a_response_has_several_replays_from_different_rejections(target, drafter, responses, tmp_path):
    _, replays, notes = replayed(Pair(target, drafter), responses, tmp_path, REPLAY._replace(per_response=50))
    names = [one["id"] for one in replays]
    assert len(names) == len(set(names)) == sum(note["rejections"] for note in notes)


def test_shards_do_not_depend_on_ranks_or_interruptions(target, drafter, responses, tmp_path):
    pair = Pair(target, drafter)
    _, complete, _ = replayed(pair, responses, tmp_path / "once")
    replayed(pair, responses, tmp_path / "again")
    for name in ("00001.arrow", "00001.json"):
        (tmp_path / "again" / name).unlink()
    (tmp_path / "again" / "manifest.json").unlink()
    _, again, _ = replayed(pair, responses, tmp_path / "again")
    assert [one["response_ids"].tolist() for one in again] == [one["response_ids"].tolist() for one in complete]


def test_replays_fit_into_the_shorter_context(target, drafter, responses):
    limit = drafter.config.max_position_embeddings
    long = [one | {"prompt_ids": np.resize(one["prompt_ids"], limit), "turns": [limit, 9]} for one in responses[:1]]
    assert plan_replays(Pair(target, drafter), long, REPLAY, 1000) == ([], [0])  # the prompt alone fills it
    room = limit - 9
    near = [one | {"prompt_ids": np.resize(one["prompt_ids"], room), "turns": [room, 9]} for one in responses[:1]]
    requests, _ = plan_replays(Pair(target, drafter), near, REPLAY._replace(per_response=50), 1000)
    assert requests
    assert max(len(one.prompt_ids) for one in requests) + 3 <= limit
