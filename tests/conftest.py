"""Small real objects that several tests use: a tokenizer, and pairs of models with random weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def small_model(seed=0, hidden=16, layers=1, vocab=VOCABULARY, sharpness=1.0):
    """A Llama with random weights; a higher sharpness makes its distributions less uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def target():
    """The larger model of a pair over 64 tokens."""
    return small_model(seed=1, hidden=32, layers=2, sharpness=60.0)


@pytest.fixture(scope="session")
def drafter():
    """The smaller model of the pair."""
    return small_model(seed=2, hidden=16, layers=1, sharpness=60.0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run side by side with other work; one thread makes their arithmetic and time steady."""
    torch.set_num_threads(1)
