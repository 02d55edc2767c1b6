"""A batch that is computed in parts has the hidden states and gradients of the complete batch."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from drafter.data.batches import Sequence, collate, response_mask
from drafter.data.forward import hidden_at
from drafter.losses.divergences import tvdpp
from drafter.training.modules import Distillation
from drafter.training.weighting import dpace, uniform
from tests.conftest import answered, small_model

LENGTHS = [30, 3, 12, 31, 5, 11]
BATCH = collate(
    [*(answered([1, 2, 3], [n % 60 for n in range(length)]) for length in LENGTHS), Sequence(np.arange(20), 1, True)]
)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # float32, summed in another order


def passes(model):
    """Return a list that receives the shape of the input of each forward pass."""
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("limit", [1, 40, 70, 10_000])
def test_the_states_do_not_depend_on_the_parts_and_no_part_exceeds_the_limit(drafter, limit):
    model = copy.deepcopy(drafter)
    expected, shapes = hidden_at(model, BATCH, BATCH.target_mask_BT), passes(model)
    torch.testing.assert_close(hidden_at(model, BATCH, BATCH.target_mask_BT, limit), expected, **TOLERANCE)
    assert all(rows * width <= limit or rows == 1 for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == len(LENGTHS) + 1


@pytest.mark.parametrize("weighting", [uniform, dpace])
def test_the_gradient_of_a_step_does_not_depend_on_the_parts(target, weighting):
    """The loss has means over the batch (TVD++'s, the weights'), so it is no sum over parts."""
    found = []
    for limit in (None, 40):
        options = {"weighting": weighting} if weighting else {}
        module = Distillation(
            target, small_model(2).requires_grad_().train(), tvdpp, 0.1, 1e-3, batch_tokens=limit, **options
        )
        module.log = lambda *_, **__: None
        module._per_weight = lambda weights: 1 / weights.sum()
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda value, reduce_op: value))
        loss = module.training_step(BATCH, 0)
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in module.drafter.parameters())])
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


def test_validation_and_a_live_target_keep_to_the_limit(target):
    target, drafter = copy.deepcopy(target), small_model(2)
    shapes = [passes(model) for model in (target, drafter)]
    module = Distillation(target, drafter, tvdpp, 0.1, 1e-3, batch_tokens=70)
    with torch.no_grad():
        module.validation_step(BATCH, 0)
    assert all(found and max(rows * width for rows, width in found) <= 70 for found in shapes)


def test_a_sequence_of_8192_tokens_is_the_same_alone_and_among_short_ones():
    model = small_model(2)
    long = answered([1, 2, 3], [(7 * n) % 60 for n in range(8189)])
    alone, among = collate([long]), collate([answered([1, 2], [3, 4, 5]), long])
    expected = hidden_at(model, alone, response_mask(alone))
    rows = response_mask(among).nonzero()[:, 0] == 1
    for limit in (None, 8192):
        found = hidden_at(model, among, response_mask(among), limit)[rows]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # other attention kernels with a mask
