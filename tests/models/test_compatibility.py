"""The compatibility check of target and drafter, and padding to the target's embedding rows."""

import pytest
import torch
from transformers import AutoConfig

from drafter.models.compatibility import VocabularyError, check_pair, differences, load_drafter, resize_vocabulary
from drafter.models.initialization import build_drafter, special_ids
from drafter.models.inspection import num_parameters, vocabulary_rows
from drafter.models.loading import load_tokenizer
from experiments.tiny_target import train_tokenizer

SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save(folder, rows=300, extra=(), tied=True, **fields):
    """Save a model with a vocabulary of 280 tokens, plus `extra`, and attributes of its tokenizer."""
    tokenizer = train_tokenizer(["the area of a rectangle is width times height"] * 2, 280, 64)
    if extra:
        tokenizer.add_tokens(list(extra))
    for name, value in fields.items():
        setattr(tokenizer, name, value)
    torch.manual_seed(0)
    model = build_drafter(SMALL | {"tie_word_embeddings": tied}, rows, special_ids(tokenizer, rows))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_and_its_copy_differ_in_nothing(tmp_path):
    assert differences(save(tmp_path / "one"), save(tmp_path / "two")) == []


@pytest.mark.parametrize(
    ("target_extra", "drafter_extra", "message"),
    [
        (
            [],
            ["<|one|>", "<|two|>"],
            "the target has {n} tokens, no '<|one|>', the drafter {n2} tokens, '<|one|>' as id {n}",
        ),
        (
            ["<|one|>"],
            ["<|two|>"],
            "the target has {n1} tokens, '<|one|>' as id {n}, the drafter {n1} tokens, no '<|one|>'",
        ),
        (
            ["<|one|>", "<|two|>"],
            ["<|two|>", "<|one|>"],
            "the target has {n2} tokens, '<|one|>' as id {n}, the drafter {n2} tokens, '<|one|>' as id {n1}",
        ),
    ],
    ids=["more tokens", "another piece", "two ids exchanged"],
)
def test_another_vocabulary_is_refused_with_the_first_id_that_differs(tmp_path, target_extra, drafter_extra, message):
    target, drafter = save(tmp_path / "target", extra=target_extra), save(tmp_path / "drafter", extra=drafter_extra)
    size = len(load_tokenizer(save(tmp_path / "plain")))
    for pad in (False, True):  # padding does not help
        with pytest.raises(VocabularyError) as refusal:
            load_drafter(drafter, target, pad=pad)
        found = str(refusal.value)
        assert f"{drafter} is no drafter for {target}" in found
        assert message.format(n=size, n1=size + 1, n2=size + 2) in found
        assert "Train a drafter for this target" in found


def test_padding_that_differs_is_refused_with_the_remedy(tmp_path):
    target, drafter = save(tmp_path / "target", rows=304), save(tmp_path / "drafter", rows=300)
    with pytest.raises(
        VocabularyError, match=r"rows of the embedding: the target has 304, the drafter 300.*\n?.*pad_vocab"
    ):
        load_drafter(drafter, target)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [304, 296])
def test_a_padded_drafter_has_the_same_logits_and_never_chooses_padding(tmp_path, rows, tied):
    before = load_drafter(save(tmp_path / "drafter", rows=300, tied=tied), str(tmp_path / "drafter")).eval()
    target = save(tmp_path / "target", rows=rows)
    after = load_drafter(str(tmp_path / "drafter"), target, pad=True).eval()
    assert vocabulary_rows(after) == after.config.vocab_size == rows
    ids = torch.arange(280)[None, :60]
    ours, theirs = before(input_ids=ids).logits, after(input_ids=ids).logits
    kept = min(rows, 300)
    torch.testing.assert_close(theirs[..., :kept], ours[..., :kept], rtol=0, atol=1e-6)
    if rows > 300:
        padding = theirs[..., 300:]
        torch.testing.assert_close(padding, ours.mean(-1, keepdim=True).expand_as(padding), rtol=1e-4, atol=1e-5)
        assert (theirs.argmax(-1) < 300).all()


def test_the_existing_number_of_rows_changes_nothing():
    model = build_drafter(SMALL | {"tie_word_embeddings": False}, 300, {})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = resize_vocabulary(model, 300)
    assert num_parameters(after) == sum(value.numel() for value in before.values())
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())


def test_harmless_differences_are_returned(tmp_path):
    target = save(tmp_path / "target")
    drafter = save(tmp_path / "drafter", chat_template="{{ messages }}", pad_token="<|im_end|>")
    config = AutoConfig.from_pretrained(drafter)
    config.max_position_embeddings = 32
    config.save_pretrained(drafter)
    found = {one.what: one for one in check_pair(target, drafter)}
    assert set(found) == {"special tokens", "chat template", "context"}
    assert not any(one.fatal for one in found.values())
    assert "context: the target has 64 tokens, the drafter 32. Serve with a context of 32 tokens at most" in str(
        found["context"]
    )
    assert "pad 0" in found["special tokens"].target
    assert "pad 2" in found["special tokens"].drafter
    assert found["chat template"].drafter != found["chat template"].target


def test_a_longer_context_of_the_drafter_is_no_difference(tmp_path):
    drafter, target = save(tmp_path / "drafter"), save(tmp_path / "target")
    config = AutoConfig.from_pretrained(target)
    config.max_position_embeddings = 32
    config.save_pretrained(target)
    assert differences(target, drafter) == []
