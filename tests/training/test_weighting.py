"""Position weightings: D-PACE against a loop over blocks, AdaSPEC against a sort, and their use in the loss."""

import copy
from functools import partial

import lightning
import pytest
import torch

from drafter.data.batches import collate
from drafter.losses.divergences import kld
from drafter.training.modules import Distillation
from drafter.training.weighting import adaspec, dpace, uniform
from tests.conftest import answered, small_model

ROWS = [[5 + row + n for n in range(1 + 2 * row)] for row in range(4)]


@pytest.fixture
def seen(target, drafter):
    """Return the predicted positions of a batch of responses of 1, 3, 5 and 7 tokens, and the batch."""
    batch = collate([answered([1, 2], row) for row in ROWS])
    module = Distillation(target, drafter, kld, 0.0, 1e-3)
    with torch.no_grad():
        hidden = drafter.base_model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
    return module._predicted(batch, hidden.last_hidden_state[batch.target_mask_BT], None), batch


def logits_of(model, batch):
    logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    return logits[batch.target_mask_BT]


def test_positions_have_the_responses_tokens_and_the_number_that_follow(seen):
    predicted, _ = seen
    assert predicted.positions.tokens_N.tolist() == [token for row in ROWS for token in row]
    assert predicted.positions.following_N.tolist() == [0, 2, 1, 0, 4, 3, 2, 1, 0, 6, 5, 4, 3, 2, 1, 0]


def test_uniform_weights_are_one(seen):
    assert uniform(*seen).tolist() == [1.0] * 16


@pytest.mark.parametrize("gamma", [1, 3, 20])
def test_dpace_is_the_sum_of_a_positions_weights_in_all_blocks_that_contain_it(seen, drafter, gamma):
    predicted, batch = seen
    probs = logits_of(drafter, batch).softmax(-1)
    confidence = 0.7 * probs.gather(-1, predicted.positions.tokens_N[:, None])[:, 0] + 0.3
    expected, first = [], 0
    for row in ROWS:
        c = confidence[first : first + len(row)].tolist()
        first += len(c)
        for k in range(len(c)):
            weight = 0.0
            for start in range(max(0, k - gamma + 1), k + 1):
                for end in range(k, min(start + gamma, len(c))):
                    product = 1.0
                    for i in range(start, end + 1):
                        product *= c[i]
                    weight += product
            expected.append(weight)
    ours = dpace(*seen, num_speculative_tokens=gamma, smoothing=0.3)
    torch.testing.assert_close(ours, torch.tensor(expected))


def test_adaspec_selects_the_positions_that_lag_most_behind_the_reference(seen, target, drafter):
    _, batch = seen
    reference = small_model(seed=5, hidden=16, sharpness=60.0)
    q = logits_of(target, batch)
    behind = kld(logits_of(drafter, batch), q) - kld(logits_of(reference, batch), q)
    selected = set(behind.argsort(descending=True)[:4].tolist())
    weights = adaspec(*seen, reference=reference, share=0.25)
    assert {i for i, weight in enumerate(weights.tolist()) if weight == 1} == selected
    assert weights.sum() == 4


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (partial(dpace, smoothing=0.0), "weighting.smoothing is 0.0"),
        (partial(dpace, num_speculative_tokens=0), "num_speculative_tokens is 0"),
        (partial(adaspec, reference=None, share=1.5), "weighting.share is 1.5"),
    ],
)
def test_an_invalid_setting_is_named(seen, weighting, message):
    with pytest.raises(ValueError, match=message):
        weighting(*seen)


def test_the_loss_is_the_weighted_mean(seen, target, drafter):
    _, batch = seen
    weights = torch.arange(16.0)
    module = Distillation(target, copy.deepcopy(drafter).requires_grad_(), kld, 0.0, 1e-3, weighting=lambda *_: weights)
    module.trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.log = lambda *_, **__: None
    expected = (weights * kld(logits_of(drafter, batch), logits_of(target, batch))).sum() / weights.sum()
    torch.testing.assert_close(module.training_step(batch, 0), expected)
