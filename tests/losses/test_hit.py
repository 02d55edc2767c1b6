"""`hit` against the acceptance probabilities of two engines, in extreme cases, and with some tokens alone."""

import math
from functools import partial

import pytest
import torch

from drafter.losses.divergences import hit
from drafter.losses.trimmed import Kept, Trimmed
from tests.losses.test_sampled_tokens import ALL, full_inputs
from tests.losses.test_trimmed import IDS, KEPT, N, inputs

FACTORS = [0.1, 0.3, 1.0]


def gradient(values, logits_p):
    return torch.autograd.grad(values.sum(), logits_p)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_with_a_small_factor_it_is_the_targets_probability_of_the_drafters_most_likely_token(temperature):
    logits_p, logits_q = full_inputs()
    drafted = logits_p.argmax(-1)
    assert 0 < (drafted == logits_q.argmax(-1)).sum() < N
    expected = -(logits_q / temperature).log_softmax(-1)[torch.arange(N), drafted]
    found = hit(logits_p, logits_q, temperature=temperature, draft_temperature_factor=1e-4)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_with_a_factor_of_one_it_is_the_probability_that_two_draws_are_the_same_token(temperature):
    logits_p, logits_q = full_inputs()
    p, q = ((logits / temperature).softmax(-1) for logits in (logits_p, logits_q))
    found = hit(logits_p, logits_q, temperature=temperature, draft_temperature_factor=1.0)
    torch.testing.assert_close(found, -(p * q).sum(-1).log())


@pytest.mark.parametrize("factor", FACTORS)
def test_the_gradient_is_that_of_finite_differences_and_a_shift_of_logits_changes_nothing(factor):
    logits_p, logits_q = (logits[:3, :8] for logits in full_inputs())
    loss = partial(hit, temperature=0.7, top_p=0.9, draft_temperature_factor=factor)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, logits_q), logits_p)
    torch.testing.assert_close(loss(logits_p + 3, logits_q - 2), loss(logits_p, logits_q))


@pytest.mark.parametrize("factor", FACTORS)
def test_descent_ends_at_the_targets_most_likely_token(factor):
    q = torch.tensor([[0.3, 0.1, 0.15, 0.4, 0.05]], dtype=torch.float64)
    logits_p = torch.tensor([[0.2, 0.1, 0.0, 0.0, -0.1]], dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([logits_p], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        value = hit(logits_p, q.log(), draft_temperature_factor=factor)
        assert value >= -math.log(0.4) - 1e-12
        value.sum().backward()
        optimizer.step()
    assert logits_p.argmax() == 3
    torch.testing.assert_close(value, -q[:, 3].log(), rtol=1e-2, atol=0)  # the drafter approaches certainty


@pytest.mark.parametrize("factor", FACTORS)
def test_it_has_a_gradient_where_the_probability_underflows(factor):
    p = torch.tensor([[0.0, 200.0, -50.0]], requires_grad=True)
    one_hot = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert (p / factor).softmax(-1)[0, 0] == 0
    values = hit(p, one_hot, draft_temperature_factor=factor)
    torch.testing.assert_close(values, torch.tensor([200 / factor]))
    torch.testing.assert_close(gradient(values, p), torch.tensor([[-1.0, 1.0, 0.0]]) / factor)


@pytest.mark.parametrize("factor", [0, -0.1, 1.5, math.nan])
def test_a_factor_out_of_range_is_named(factor):
    with pytest.raises(ValueError, match=f"loss.draft_temperature_factor is {factor}, must be above 0 and at most 1"):
        hit(torch.zeros(1, 2), torch.zeros(1, 2), draft_temperature_factor=factor)


@pytest.mark.parametrize(("temperature", "factor"), [(1.0, 0.3), (0.6, 1.0)])
def test_with_sampled_tokens_it_counts_drafts_of_kept_tokens_alone(temperature, factor):
    """Every other token is in the sample, so that the mass of the others has no error."""
    logits_p, logits_q = full_inputs()
    loss = partial(hit, temperature=temperature, draft_temperature_factor=factor)
    ours = loss(logits_p[:, ALL.rows], Trimmed.from_logits(logits_q, ALL))
    p, q = (logits_p / (temperature * factor)).softmax(-1), (logits_q / temperature).softmax(-1)
    expected = -(p * q)[:, IDS].sum(-1).log()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        gradient(ours, logits_p), torch.autograd.grad(expected.sum(), logits_p)[0], rtol=1e-8, atol=1e-10
    )
    assert (ours >= loss(logits_p, logits_q)).all()


@pytest.mark.parametrize("kept", [KEPT, ALL], ids=["kept", "sampled"])
def test_it_is_zero_where_no_kept_token_is_in_the_targets_nucleus(kept):
    logits_p = full_inputs()[0][:, kept.rows]
    logits_q = inputs()[1]
    logits_q[0, 3] = 30.0  # not kept
    values = hit(logits_p, Trimmed.from_logits(logits_q, kept), top_p=0.9)
    assert values.isfinite().all()
    assert values[0] == 0
    assert (values[1:] > 0).any()
    found = gradient(values, logits_p)
    assert found.isfinite().all()
    assert found[0].abs().max() == 0


def test_a_kept_token_that_the_target_finds_impossible_in_float32_still_has_a_gradient():
    logits_q = torch.tensor([[200.0, 0.0, -10.0]])
    logits_p = torch.zeros(1, 2, requires_grad=True)
    values = hit(logits_p, Trimmed.from_logits(logits_q, Kept.from_ids([1, 2], 3)), draft_temperature_factor=1.0)
    torch.testing.assert_close(values, torch.tensor([200 + math.log(2)]), rtol=1e-5, atol=1e-4)
    assert gradient(values, logits_p)[0, 0] == pytest.approx(-0.5, abs=1e-4)
