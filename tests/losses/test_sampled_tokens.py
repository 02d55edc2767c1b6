"""Losses with a sample of the tokens that are not kept, against the vocabulary with those tokens merged into one."""

import math
from functools import partial

import pytest
import torch

from drafter.losses.chunked import Head, Predicted
from drafter.losses.distributions import most_likely, pair
from drafter.losses.divergences import acceptance_rate, ce, kld, rkl, tvd
from drafter.losses.objective import objective_of
from drafter.losses.trimmed import Kept, SampledTokens, Trimmed
from tests.losses.test_trimmed import IDS, KEPT, OTHERS, WHERE, H, N, V, inputs
from tests.objectives import LOSSES

ALL = KEPT._replace(sampled_S=OTHERS.flip(0))  # every other token is drawn
FIVE = SampledTokens(KEPT, 5, seed=1).of_step(3)
SETTINGS = {"kld of a nucleus": ("kld", 0.6, 0.9), "nla at 0.3": ("nla", 0.3, 1.0)}  # others are (name, 1, 1)
# ce of merged outcomes has another argmax; hit counts none of the merged outcome; the mix has two settings
COMPARED = sorted(set(LOSSES) - {"ce", "hit", "hit of a match", "kld_nla"})


def full_inputs():
    random = torch.Generator().manual_seed(3)
    logits_p = 2 * torch.randn(N, V, generator=random, dtype=torch.float64)
    return logits_p.requires_grad_(), inputs()[1]


def merged(log_probs):
    return torch.cat([log_probs[:, IDS], log_probs[:, OTHERS].logsumexp(-1, keepdim=True)], -1)


@pytest.mark.parametrize("name", COMPARED)
def test_with_every_other_token_drawn_a_loss_is_that_of_the_merged_vocabulary(name):
    logits_p, logits_q = full_inputs()
    base, temperature, top_p = SETTINGS.get(name, (name, 1.0, 1.0))
    both = pair(logits_p, logits_q, temperature, top_p)
    loss, reference = objective_of(LOSSES[name]), objective_of(LOSSES[base])
    if base != name:
        reference = objective_of(partial(LOSSES[base], temperature=1.0, top_p=1.0))
    torch.manual_seed(0)
    ours = loss(logits_p[:, ALL.rows], Trimmed.from_logits(logits_q, ALL), WHERE)
    torch.manual_seed(0)
    where = WHERE._replace(tokens_N=KEPT.place_V[WHERE.tokens_N])
    theirs = reference(merged(both.log_p_NV), merged(both.log_q_NV), where)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad(values.sum(), logits_p, retain_graph=True)[0] for values in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    assert gradients[0][:, OTHERS].abs().max() > 0


def test_merging_outcomes_brings_two_distributions_closer():
    logits_p, logits_q = full_inputs()
    target = Trimmed.from_logits(logits_q, ALL)
    for loss in (kld, rkl, tvd):
        assert (loss(logits_p[:, ALL.rows], target) <= loss(logits_p, logits_q) + 1e-12).all()
    assert (acceptance_rate(logits_p[:, ALL.rows], target) < acceptance_rate(logits_p, logits_q)).sum() == 0


def test_cross_entropy_at_another_token_is_that_of_the_others_mass():
    logits_p, logits_q = full_inputs()
    other = ~KEPT.mask(most_likely(logits_q))
    assert 0 < other.sum() < N
    ours, log_p = ce(logits_p[:, ALL.rows], Trimmed.from_logits(logits_q, ALL)), logits_p.log_softmax(-1)
    torch.testing.assert_close(ours[other], -log_p[:, OTHERS].logsumexp(-1)[other])
    torch.testing.assert_close(ours[~other], ce(logits_p, logits_q)[~other])
    assert (ours <= ce(logits_p, logits_q) + 1e-12).all()


def test_the_estimate_of_the_others_mass_is_unbiased():
    logits_p = full_inputs()[0].detach()
    draws = [SampledTokens(KEPT, 5, seed=1).of_step(step) for step in range(4000)]
    masses = torch.stack([kept.outcomes(logits_p[:, kept.rows])[:, -1].exp() for kept in draws])
    exact = logits_p[:, OTHERS].exp().sum(-1)
    deviation = masses.std(0) / math.sqrt(len(draws))
    assert ((masses.mean(0) - exact).abs() < 4 * deviation).all()  # of 23 normal means, one in 700 runs goes beyond
    assert (deviation < 0.05 * exact).all()
    assert (masses.std(0) > 0.1 * exact).all()


def test_the_draws_depend_on_the_seed_and_the_step_alone():
    sampled = SampledTokens(KEPT, 5, seed=1)
    torch.manual_seed(5)
    first = sampled.of_step(3).sampled_S
    torch.manual_seed(6)
    assert sampled.of_step(3).sampled_S.tolist() == first.tolist() == FIVE.sampled_S.tolist()
    others = [sampled.of_step(4), sampled._replace(seed=2).of_step(3)]
    assert all(set(other.sampled_S.tolist()) != set(first.tolist()) for other in others)
    assert len(set(first.tolist())) == 5
    assert not set(first.tolist()) & set(IDS)
    counts = torch.bincount(torch.cat([sampled.of_step(step).sampled_S for step in range(600)]), minlength=V)
    assert counts[IDS].sum() == 0
    # Each of 30 tokens is drawn 100 times on average, with a standard deviation of 9.
    assert counts[OTHERS].min() > 60
    assert counts[OTHERS].max() < 140
    assert sorted(SampledTokens(KEPT, 30, seed=1).of_step(0).sampled_S.tolist()) == OTHERS.tolist()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_in_chunks_the_gradient_reaches_the_kept_and_the_drawn_rows_alone(name):
    random = torch.Generator().manual_seed(1)
    embedding = torch.nn.Linear(H, V).double()
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(V, H, generator=random))
    hidden = torch.randn(N, H, generator=random).double().requires_grad_()
    logits_q, leaves = inputs()[1], [embedding.weight, embedding.bias, hidden]
    head = Head.from_module(embedding, FIVE)
    seen = Predicted(hidden, head, lambda rows: Trimmed.from_logits(logits_q[rows], FIVE), WHERE, FIVE)
    objective, target = objective_of(LOSSES[name]), Trimmed.from_logits(logits_q, FIVE)
    if objective.batch_mean is not None:
        objective = objective.with_mean(seen.values(objective.batch_mean).mean())
    plain = objective(embedding(hidden)[:, FIVE.rows], target, WHERE).sum()
    assert plain.isfinite()
    ours = torch.autograd.grad(seen.sum(objective, rows=5), leaves, retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    unused = [token for token in range(V) if token not in FIVE.rows.tolist()]
    assert len(unused) == V - 15
    assert ours[0][unused].abs().max() == ours[1][unused].abs().max() == 0
    assert ours[0][FIVE.ids_K].abs().max() > 0
    assert ours[0][FIVE.sampled_S].abs().max() > 0


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_log_probabilities_of_the_kept_tokens_are_enough_at_temperature_1(name):
    logits_p, logits_q = full_inputs()
    log_q, top, found = logits_q.log_softmax(-1)[:, IDS], logits_q.argmax(-1), []
    for target in (
        Trimmed.from_logits(logits_q, FIVE),
        Trimmed(lambda: logits_q, FIVE, lambda: log_q, top),
    ):
        torch.manual_seed(0)
        found.append(objective_of(LOSSES[name])(logits_p[:, FIVE.rows], target, WHERE))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_a_mass_of_the_target_below_rounding_counts_as_rounding():
    """Otherwise it would be zero at one position and 6e-8 at the next, which reverse KL tells apart by 80 nats."""
    kept = Kept.from_ids([0, 1], 4)._replace(sampled_S=torch.tensor([3]))
    logits_q = torch.tensor([[30.0, 29.0, -5.0, -5.0], [10.0, 9.0, -5.0, -5.0]])
    found = rkl(torch.zeros(2, 3), Trimmed.from_logits(logits_q, kept))
    assert (found < 0.5 * 17 + 1).all()
    assert found[0] > found[1] - 2


def test_a_device_has_the_sample_too():
    moved = FIVE.to(torch.device("meta"))
    assert moved.rows.is_meta
    assert moved.rows.shape == (15,)
    assert KEPT.to(torch.device("cpu")).sampled_S is None
