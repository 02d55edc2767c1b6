"""Cached states give back the live target's logits."""

import pytest
import torch

from drafter.batches import collate, response_sequence
from drafter.logit_cache import StateReader, write_cache
from drafter.modules import target_logits
from tests.conftest import capped

ROWS = [
    {"prompt_ids": [1] * (1 + number % 3), "response_ids": list(range(2, 4 + number % 4)), "split": "train"}
    for number in range(7)
]
LENGTHS = [len(row["response_ids"]) for row in ROWS]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_cached_logits_are_the_live_ones(target, tmp_path, dtype, tolerance):
    write_cache(target, ROWS, tmp_path, dtype=dtype, batch_size=2, shard_size=3)
    states = StateReader(tmp_path, LENGTHS, 3)
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 5]):
        live = target_logits(target, collate([response_sequence(ROWS[i]) for i in order]))(slice(None))
        cached = target_logits(target, collate([response_sequence(ROWS[i], states[i]) for i in order]))(slice(None))
        # bfloat16 keeps 8 bits of a state, and a logit adds 32 of them up
        assert (cached - live).norm() <= tolerance * live.norm()
        assert cached.shape == (sum(LENGTHS[i] for i in order), live.shape[1])


def test_ranks_and_resumption_write_the_same_files(target, tmp_path):
    how = {"dtype": "bfloat16", "batch_size": 2, "shard_size": 3}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    write_cache(target, ROWS, tmp_path / "whole", **how)
    write_cache(target, ROWS, tmp_path / "parts", **how, rank=1, world_size=2)
    write_cache(target, ROWS, tmp_path / "parts", **how)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_target_that_changes_its_logits_after_the_head_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match="Capped changes its logits after the output embedding"):
        write_cache(capped(target), ROWS, tmp_path, dtype="float32", batch_size=2, shard_size=3)
    assert list(tmp_path.iterdir()) == []


def test_states_that_are_not_finite_are_refused_and_not_stored(target, tmp_path):
    broken = type(target)(target.config).eval()
    broken.load_state_dict(target.state_dict())
    with torch.no_grad():
        broken.model.norm.weight[0] = float("inf")
        broken.lm_head.weight.zero_()
    with pytest.raises(ValueError, match="not finite"):
        write_cache(broken, ROWS, tmp_path, dtype="float32", batch_size=2, shard_size=3)
    assert list(tmp_path.iterdir()) == []
