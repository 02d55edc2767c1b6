"""A saved pair of models for the tests of `experiments.measure`."""

import pytest

from tests.conftest import WORDS, save_pair, write_jsonl

PROMPTS = [f"who saw the {word} and then what did the {word} do ?" for word in WORDS[3:8]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Save a target, a drafter of another architecture with the same tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": text, "question": text.upper()} for text in PROMPTS])
    return folder
