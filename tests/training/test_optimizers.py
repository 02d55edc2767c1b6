"""Optimizers train all parameters, each with its own rule; schedules have the shape that they say."""

import copy

import pytest
import torch

from drafter.training.optimizers import Optimization, adamw, cosine, muon, trapezoid
from tests.conftest import small_model

IDS = torch.arange(2, 34).view(2, 16)


def trained(model, build, steps=1, state=None):
    optimizer = build(model, 1e-2)
    if state:
        optimizer.load_state_dict(state)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return optimizer


def trainable():
    return small_model(seed=8, hidden=16, layers=2).requires_grad_(True)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    parts = Optimization().configure(trainable(), 1e-2, steps=100)
    optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(5e-3)
    assert max(rates) == rates[1] == pytest.approx(1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert optimizer.param_groups[1]["weight_decay"] == 0


def test_a_trapezoid_rises_stays_and_falls():
    factors = [trapezoid(step, 100, warmup=10, decay=0.2) for step in range(101)]
    assert factors[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert set(factors[10:81]) == {1.0}
    assert factors[80:] == pytest.approx([n / 20 for n in range(20, -1, -1)])
    assert {trapezoid(step, steps, warmup=2, decay=0) for step in range(2, 9) for steps in (10, 10**9)} == {1.0}


def test_a_cosine_ends_where_it_is_told():
    assert cosine(100, 100, end=0.3) == pytest.approx(0.3)
    assert cosine(51, 100, warmup=2, end=0.0) == pytest.approx(0.5)


def test_muon_makes_the_singular_values_of_an_update_equal_and_leaves_embeddings_to_adamw():
    ours, theirs = trainable(), trainable()
    before = copy.deepcopy(ours)
    trained(ours, lambda model, rate: muon(model, rate, weight_decay=0.0))
    trained(theirs, lambda model, rate: adamw(model, rate, weight_decay=0.0))
    for name, parameter in ours.named_parameters():
        update = parameter.detach() - before.get_parameter(name)
        assert update.abs().max() > 0
        if parameter.ndim < 2 or "embed" in name or "lm_head" in name:
            assert torch.equal(parameter, theirs.get_parameter(name))
        else:  # Newton-Schulz brings all but the smallest near 1, not to it; a gradient's fall off fast
            values = torch.linalg.svdvals(update)
            assert values.median() > 0.5 * values.max()
            # The root mean square of AdamW's updates is 0.2 to 0.4 of the learning rate.
            assert 0.1 * 1e-2 < update.square().mean().sqrt() < 0.5 * 1e-2


def test_muon_goes_on_from_its_saved_state():
    whole, first = trainable(), trainable()
    trained(whole, muon, steps=4)
    state = copy.deepcopy(trained(first, muon, steps=2).state_dict())
    trained(first, muon, steps=2, state=state)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name))


def test_a_schedule_changes_the_rate_of_both_optimizers_of_muon():
    parts = Optimization(muon, lambda step, steps: 0.25).configure(trainable(), 1e-2, steps=10)
    optimizers = parts["optimizer"].optimizers
    assert {group["lr"] for one in optimizers for group in one.param_groups} == {0.25e-2}
