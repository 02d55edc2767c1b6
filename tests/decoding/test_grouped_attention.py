"""Calls with several tokens attend without copies of keys, compiled or not, and to the same result."""

import pytest
import torch
import torch.nn.functional as F

from drafter.decoding.capabilities import decoder_of
from drafter.decoding.decoders import Compiled
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from tests.conftest import small_model
from tests.families import DECODE, family

KINDS = [*DECODE, "qwen2", "olmo2", "gpt_neox", "granite"]
TOKENS = [3, 7, 2, 9, 4, 11, 5, 8, 6, 10, 12, 1, 13, 15, 14, 16]


@pytest.fixture(params=["plain", "compiled"])
def decoder(request, monkeypatch):
    """Return a function that gives a model its decoder; what is compiled in it is left as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    if request.param == "plain":
        return decoder_of
    return lambda model: Compiled(model, 100, longest=4).decoder()


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model_after_a_rejected_draft(decoder, kind):
    model = family(kind)
    before = model.config._attn_implementation
    cached = decoder(model)
    cached.forward([TOKENS[:8]], [0], 1)
    cached.forward([[1, 1, 1, 1]], [8], 4)  # rejected
    parts = (slice(8, 11), slice(11, 12), slice(12, 16))
    found = [cached.forward([TOKENS[part]], [part.start], part.stop - part.start) for part in parts]
    expected = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[:, 8:]
    assert torch.allclose(torch.cat(found, 1), expected, atol=1e-5)
    assert model.config._attn_implementation == before


@torch.inference_mode()
def test_keys_are_neither_copied_for_each_query_head_nor_read_beyond_those_in_use(decoder, monkeypatch):
    model, shapes, plain = family("llama"), set(), F.scaled_dot_product_attention

    def record(query, key, value, **settings):
        shapes.add((tuple(query.shape[1:3]), tuple(key.shape[1:3])))
        return plain(query, key, value, **settings)

    cached = decoder(model)
    cached.forward([TOKENS[:8]], [0], 1)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    cached.forward([TOKENS[8:11]], [8], 3)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads > groups
    assert shapes == {((groups, 3 * heads // groups), (groups, 11))}


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # within inductor
def test_one_compiled_call_serves_every_length():
    target, drafter = family("llama"), small_model(2)
    pair = [Compiled(model, 43, longest=4) for model in (target, drafter)]
    for model, counts in zip(pair, ([1, 4], [1, 2]), strict=True):
        model.compile(counts)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (1, 2, 5, 20, 36):
            prompt, options = (TOKENS * 3)[:length], DecodingOptions(40 - length)
            found = speculative_decode(*pair, prompt, 3, options)  # type: ignore[call-arg]
            assert found.tokens == autoregressive_decode(target, prompt, options).tokens
