"""The text that is shown while an answer is generated is exactly what its tokens are decoded to."""

import json
import random

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from drafter.data.text_stream import Piece, TextStream, decode_answer
from tests.tokenizer_kinds import BYTES, KINDS, tokenizer_of_kind

PARTS = ["a", "the", "é", "漢字", "🙂", "👩‍👩‍👧", "  x", "\n", "\n\n", " ", "\ufffd", "<think>", "</s>"]


def of_kind(kind):
    """Return a tokenizer whose tokens of the byte fallback are ordinary ones, as in published models."""
    tokenizer = tokenizer_of_kind(kind, None, "<s>", "</s>", control=["<|im|>"], ordinary=["<think>"])
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in BYTES]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), additional_special_tokens=["<|im|>"], eos_token="</s>"
    )


def streamed(tokenizer, tokens, drafted=None):
    """Return the pieces after each token, and after the end."""
    stream = TextStream(tokenizer)
    fed = [stream.feed(token, bool(drafted and drafted[i])) for i, token in enumerate(tokens)]
    return [*fed, stream.finish()]


def answer(tokenizer, seed):
    """Return random tokens, or the tokens of a random text, with a few random tokens in it for every other seed."""
    generator = random.Random(seed)
    if seed % 3 == 0:
        return [generator.randrange(len(tokenizer)) for _ in range(30)]
    text = " ".join(generator.choice(PARTS) for _ in range(12))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][generator.randrange(4) :]
    for _ in range(3 * (seed % 2)):
        tokens.insert(generator.randrange(len(tokens) + 1), generator.randrange(len(tokenizer)))
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_are_the_decoded_answer_for_every_kind_of_tokenizer(kind):
    tokenizer = of_kind(kind)
    for seed in range(60):
        tokens = answer(tokenizer, seed)
        pieces = [piece for found in streamed(tokenizer, tokens) for piece in found]
        assert "".join(piece.text for piece in pieces) == decode_answer(tokenizer, tokens), seed
        assert all(piece.text for piece in pieces)


@pytest.mark.parametrize("kind", ["byte-level", "prepend"])
def test_a_character_of_several_tokens_appears_with_its_last_one(kind):
    tokenizer = of_kind(kind)
    tokens = tokenizer("a🙂 the", add_special_tokens=False)["input_ids"]
    emoji = next(i for i in range(len(tokens)) if "🙂" in decode_answer(tokenizer, tokens[: i + 1]))
    drafted = [i != emoji for i in range(len(tokens))]
    found = streamed(tokenizer, tokens, drafted)
    shown = [piece for pieces in found for piece in pieces]
    assert Piece("🙂", drafted=False) in shown
    assert "".join(piece.text for piece in shown if piece.drafted) == "a the"
    assert "\ufffd" not in "".join(piece.text for piece in shown)
    assert len(found[emoji - 1]) == 0  # nothing is shown for its earlier tokens
    if kind == "byte-level":
        assert found[emoji] == [Piece("🙂", drafted=False)]


def test_bytes_that_later_ones_make_invalid_are_not_shown_before_these():
    tokenizer = of_kind("prepend")
    tokens = tokenizer.convert_tokens_to_ids(["▁a", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "▁the"])
    found = streamed(tokenizer, tokens)
    assert decode_answer(tokenizer, tokens) == "a���� the"  # and not a€� the
    assert "".join(piece.text for pieces in found for piece in pieces) == "a���� the"


def test_an_incomplete_character_at_the_end_is_shown_at_the_end():
    tokenizer = of_kind("byte-level")
    tokens = tokenizer("a漢", add_special_tokens=False)["input_ids"][:-1]
    *fed, last = streamed(tokenizer, tokens)
    assert "".join(piece.text for pieces in fed for piece in pieces) == "a"
    assert "".join(piece.text for piece in last) == "�"
    stream = TextStream(tokenizer)
    assert stream.finish() == []


def test_control_tokens_are_not_shown():
    tokenizer = of_kind("byte-level")
    tokens = tokenizer("a<|im|> the</s>", add_special_tokens=False)["input_ids"]
    assert decode_answer(tokenizer, tokens) == "a the"


def test_a_token_is_decoded_with_few_others_however_long_the_answer():
    tokenizer = of_kind("first")
    lengths = []
    stream = TextStream(tokenizer)
    decode = tokenizer.decode
    tokenizer.decode = lambda tokens, **options: lengths.append(len(tokens)) or decode(tokens, **options)
    for token in tokenizer("the text of a file " * 50, add_special_tokens=False)["input_ids"]:
        stream.feed(token, drafted=False)
    assert max(lengths) <= 4
