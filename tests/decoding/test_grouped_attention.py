"""Calls with several tokens attend without copies of keys, and to the same result."""

import pytest
import torch
import torch.nn.functional as F

from drafter.decoding.capabilities import decoder_of
from tests.families import DECODE, family

TOKENS = [3, 7, 2, 9, 4, 11, 5, 8, 6, 10, 12, 1, 13, 15, 14, 16]


@torch.inference_mode()
@pytest.mark.parametrize("kind", [*DECODE, "qwen2", "olmo2", "gpt_neox", "granite"])
def test_logits_are_those_without_a_cache(kind):
    model = family(kind)
    before = model.config._attn_implementation
    decoder = decoder_of(model)
    decoder.forward([TOKENS[:8]], [0], 1)
    decoder.forward([[1, 1, 1, 1]], [8], 4)  # rejected
    found = torch.cat([decoder.forward([TOKENS[8:11]], [8], 3), decoder.forward([TOKENS[11:]], [11], 5)], 1)
    expected = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[:, 8:]
    assert torch.allclose(found, expected, atol=1e-5)
    assert model.config._attn_implementation == before


@torch.inference_mode()
def test_keys_are_not_copied_for_each_query_head(monkeypatch):
    model, shapes, plain = family("llama"), set(), F.scaled_dot_product_attention

    def record(query, key, value, **settings):
        shapes.add((tuple(query.shape[1:3]), tuple(key.shape[1:3])))
        return plain(query, key, value, **settings)

    decoder = decoder_of(model)
    decoder.forward([TOKENS[:8]], [0], 1)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    decoder.forward([TOKENS[8:11]], [8], 3)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads > groups
    assert shapes == {((groups, 3 * heads // groups), (groups, 11))}
