"""The mask marks exactly the positions whose next token is to be predicted."""

import numpy as np
import torch

from drafter.data.batches import Sequence, States, by_budget, collate, cut
from tests.conftest import answered


def test_a_packed_sequence_of_l_tokens_has_l_minus_1_targets():
    batch = collate([Sequence(np.arange(10, 16), num_context=1, is_text=True)])
    assert batch.target_mask_BT.tolist() == [[True] * 5 + [False]]


def test_a_response_has_one_position_per_token_and_none_in_the_prompt():
    batch = collate([answered([1, 2, 3], [7, 8], 0.5), Sequence(np.arange(8), 1, True)])
    next_tokens = batch.input_ids_BT.roll(-1, 1)
    assert next_tokens[0][batch.target_mask_BT[0]].tolist() == [7, 8]
    assert batch.is_text_B.tolist() == [False, True]
    assert batch.temperature_B.tolist() == [500_000, -1]


def test_padding_is_on_the_right_and_outside_attention_and_loss():
    batch = collate([answered([1], [2, 3]), answered([1, 4, 5], [6, 7, 8])])
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch.input_ids_BT[0].tolist() == [1, 2, 3, 0, 0, 0]
    assert batch.target_mask_BT[0].tolist() == [True, True, False, False, False, False]


def test_cached_states_follow_the_positions_row_by_row():
    states = [States(torch.full((count, 4), float(number))) for number, count in enumerate((2, 1))]
    samples = [answered([1, 9], [2, 3])._replace(cached_N=states[0]), answered([1], [6])._replace(cached_N=states[1])]
    batch = collate([samples[0], Sequence(np.arange(5), 1, True), samples[1]])
    assert batch.cached_N.hidden_NH.shape == (3, 4)
    rows = (batch.target_mask_BT & ~batch.is_text_B[:, None]).nonzero()[:, 0]
    assert [(0, 2)[int(value)] for value in batch.cached_N.hidden_NH[:, 0]] == rows.tolist()


def test_log_z_and_the_most_likely_token_are_cut_and_joined_with_the_states():
    states = States(torch.zeros(2, 4), torch.tensor([0.5, 1.5]), torch.tensor([7, 8]))
    whole = answered([1, 9], [2, 3])._replace(cached_N=states)
    part = cut(whole, 3)
    joined = collate([whole, part]).cached_N
    assert joined.hidden_NH.shape == (3, 4)
    assert joined.log_z_N.tolist() == [0.5, 1.5, 0.5]
    assert joined.top_N.tolist() == [7, 8, 7]
    older = whole._replace(cached_N=States(states.hidden_NH))
    assert cut(older, 3).cached_N.log_z_N is None
    assert collate([whole, older]).cached_N[1:] == (None, None)


def test_a_budget_counts_padding_and_groups_similar_lengths():
    lengths = [5, 30, 4, 6, 5, 100]
    batches = by_budget(lengths, 20)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert [[lengths[index] for index in batch] for batch in batches] == [[4, 5, 5], [6], [30], [100]]
    assert by_budget([], 20) == []
