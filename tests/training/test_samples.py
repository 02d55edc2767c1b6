"""Sequences of up to 8,192 tokens, and those that are longer than a drafter's context."""

import numpy as np
import pytest
import torch

from drafter.artifacts import rows
from drafter.artifacts.storage import Folder
from drafter.data.batches import collate, cut, response_sequence
from drafter.data.responses import schema
from drafter.data.target_cache import ExactFormat, SparseFormat, target_at, write_cache
from drafter.losses.distributions import Sparse
from drafter.training.samples import PackedText, Responses
from tests.conftest import answered, finished_rows, small_model

# Tokens of the prompt, the response, a later prompt and its response.
TURNS = {"short": (3, 5), "long": (10, 8182), "late": (4, 6, 20, 30), "full": (50, 4)}


def write_rows(folder, turns_by_id):
    made = []
    for number, (name, turns) in enumerate(turns_by_id.items()):
        given, generated = sum(turns[0::2]), sum(turns[1::2])
        ids = [(7 * i + number) % 60 for i in range(given + generated)]
        fields = {"id": name, "kind": "k", "split": "train", "temperature": 1.0, "truncated": False}
        made.append({**fields, "prompt_ids": ids[:given], "response_ids": ids[given:], "turns": list(turns)})
    folder = Folder(folder)
    rows.write_shard(folder, 0, made, schema(0.95), {})
    return finished_rows(folder, rows.finish(folder, 1, schema(0.95))[0], "respond")


@pytest.mark.parametrize("format", [ExactFormat("float32"), SparseFormat(8, 8, "float32")])
def test_a_cache_returns_what_was_stored_for_8192_tokens_and_for_a_cut_sequence(tmp_path, format):
    model = small_model(1, sharpness=60.0)
    found = write_rows(tmp_path / "responses", {name: TURNS[name] for name in ("short", "long")})
    folder = Folder(tmp_path / "cache")
    count, columns = write_cache(model, found, folder, format, batch_tokens=8192, shard_size=2, seed=0)
    cached = finished_rows(folder, rows.finish(folder, count, columns)[0], "cache")
    assert cached.lengths.tolist() == [8, 8192]
    whole, part = (Responses(cached, "train", context=context).__getitems__([0, 1]) for context in (None, 100))
    live_NV = torch.cat(
        [target_at(model, collate([one._replace(cached_N=None)]))(slice(None)).clone() for one in whole]
    )
    for samples, count in ((whole, 8187), (part, 95)):
        stored = target_at(model, collate(samples))(slice(None))
        found, expected_NV = stored, live_NV[:count]
        if isinstance(stored, Sparse):
            found, expected_NV = stored.log_q_NK, expected_NV.log_softmax(-1).gather(-1, stored.ids_NK)
        torch.testing.assert_close(found, expected_NV, rtol=1e-3, atol=1e-2)


def test_a_sequence_beyond_the_context_is_cut_and_counted(tmp_path):
    found = Responses(write_rows(tmp_path, TURNS), "train", context=40)
    assert found.lengths.tolist() == [8, 40, 40]
    assert found.beyond[:3] == (2, 1, 4)
    assert found.beyond.share == (8182 - 30 + 20 + 4) / (5 + 8182 + 36 + 4)
    long, late = found.__getitems__([1, 2])
    assert collate([long]).target_mask_BT.sum() == 30
    assert late.turns == [4, 6, 20, 10]
    assert collate([late]).target_mask_BT[0].nonzero()[:, 0].tolist() == [*range(3, 9), *range(29, 39)]
    said = "2 of 4 responses are cut there, 1 are left out because their prompts fill it, and up to 99.4%"
    assert said in str(found.beyond)


def test_nothing_is_cut_within_the_context(tmp_path):
    found = Responses(write_rows(tmp_path, TURNS), "train", context=8192)
    assert found.beyond == (0, 0, 4, 0.0)
    assert found.lengths.tolist() == [sum(turns) for turns in TURNS.values()]


def test_prompts_that_all_fill_the_context_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the prompts of all 4 responses fill the context of 3 tokens"):
        Responses(write_rows(tmp_path, TURNS), "train", context=3)


@pytest.mark.parametrize("length", [1, 3, 4, 9, 10, 11])
def test_a_cut_sample_predicts_the_first_of_its_positions(length):
    row = {"prompt_ids": [1, 2, 3, 6], "response_ids": [4, 5, 7, 8, 9, 10], "temperature": 1.0, "turns": [3, 2, 1, 4]}
    for sample in (response_sequence(row), answered([1, 2, 3], [4, 5, 6, 7, 8, 9, 10])):
        whole, found = collate([sample]), collate([cut(sample, length)])
        assert found.input_ids_BT.tolist() == whole.input_ids_BT[:, :length].tolist()
        kept = found.input_ids_BT.shape[1] - 1  # the last token of a sequence predicts nothing
        assert found.target_mask_BT[0, :kept].tolist() == whole.target_mask_BT[0, :kept].tolist()
        assert not found.target_mask_BT[0, kept]


def test_text_is_packed_into_sequences_of_8192_tokens(tmp_path):
    tokens = np.arange(3 * 8192 + 5) % 60
    np.save(tmp_path / "text.npy", tokens.astype(np.uint16))
    text = PackedText(tmp_path / "text.npy", 8192, 60)
    assert text.lengths.tolist() == [8192] * 3
    assert (np.concatenate([one.ids_T for one in text.__getitems__([0, 1, 2])]) == tokens[:-5]).all()
    assert collate(text.__getitems__([2])).target_mask_BT.sum() == 8191
