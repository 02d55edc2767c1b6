"""Packed text, responses by split, and their mixture."""

import numpy as np
import pytest
import torch

from drafter.datamodules import PackedText, Responses, SequenceData, mixture

ROWS = [
    {"prompt_ids": [1, 2], "response_ids": [number + 3], "split": "validation" if number % 10 == 0 else "train"}
    for number in range(100)
]


@pytest.fixture
def text(tmp_path):
    np.save(tmp_path / "text.npy", np.arange(1005, dtype=np.uint16))
    return PackedText(tmp_path / "text.npy", 100)


def test_packed_text_is_cut_into_whole_sequences(text):
    assert len(text) == 10
    assert text[3].ids_T.tolist() == list(range(300, 400))


def test_too_little_text_is_refused(tmp_path):
    np.save(tmp_path / "text.npy", np.arange(5, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"has 5 tokens, less than one sequence of 100"):
        PackedText(tmp_path / "text.npy", 100)


def test_responses_are_split_and_keep_their_own_states():
    states = {index: torch.full((1, 2), float(index)) for index in range(100)}
    validation = Responses(ROWS, "validation", states)
    assert len(validation) == 10
    assert validation[3].hidden_NH[0, 0] == 30
    assert validation[3].ids_T.tolist() == [1, 2, 33]


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="no responses of the split 'test'"):
        Responses(ROWS, "test", None)


@pytest.mark.parametrize(("share", "texts"), [(0.1, 10), (0.5, 90), (0.0, 0)])
def test_the_mixture_has_the_asked_share_of_text(text, share, texts):
    mixed = mixture(Responses(ROWS, "train", None), text, share, seed=0)
    assert [sample.is_text for sample in mixed].count(True) == texts
    assert len(mixed) == 90 + texts


def test_a_share_outside_its_range_is_refused(text):
    with pytest.raises(ValueError, match=r"text_share is 1\.0"):
        mixture(Responses(ROWS, "train", None), text, 1.0, seed=0)


def test_training_order_is_fixed_by_the_seed_and_new_each_epoch(text):
    def orders(seed):
        loader = SequenceData(text, text, 2, seed).train_dataloader()
        return [[batch.input_ids_BT[:, 0].tolist() for batch in loader] for _ in range(2)]

    first, second = orders(1)
    assert first != second
    assert orders(1) == [first, second]
    assert orders(2) != [first, second]
    assert sorted(value for batch in first for value in batch) == list(range(0, 1000, 100))
