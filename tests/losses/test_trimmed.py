"""Losses of a trimmed drafter against the plain computation over the full vocabulary, in float64."""

import math
from functools import partial

import pytest
import torch

from drafter.losses.chunked import Head, Predicted
from drafter.losses.distributions import most_likely
from drafter.losses.divergences import acceptance_rate, ce, kld, lk_hybrid, tvd, tvdpp
from drafter.losses.objective import Positions, objective_of
from drafter.losses.trimmed import Kept, Trimmed
from tests.objectives import LOSSES, positions

N, V, H = 23, 40, 6
IDS = [1, 2, 5, 8, 13, 21, 30, 31, 34, 39]
KEPT = Kept.from_ids(IDS, V)
INFINITE = {"kld", "kld of a nucleus", "kld_nla", "lk_hybrid", "ce"}  # over the full vocabulary
OTHER_TEMPERATURE = {"kld of a nucleus", "kld_nla", "nla at 0.3", "hit of a match"}  # or top_p
OTHER_SCALE = {"tvdpp", "tvdpp position"}  # its statistics are those of the K + 1 outcomes
TOKENS = torch.tensor([IDS[n % 10] if n % 7 else 3 for n in range(N)])  # the token 3 is not kept
WHERE = positions(N, V)._replace(tokens_N=TOKENS)
OTHERS = torch.tensor([token for token in range(V) if token not in IDS])


def inputs():
    random = torch.Generator().manual_seed(0)
    logits_p = 2 * torch.randn(N, len(IDS), generator=random, dtype=torch.float64)
    logits_q = 3 * torch.randn(N, V, generator=random, dtype=torch.float64)
    return logits_p.requires_grad_(), logits_q


def untrimmed(logits_p, others=-math.inf):
    return torch.full((len(logits_p), V), others, dtype=logits_p.dtype).index_copy(1, KEPT.ids_K, logits_p)


def value_and_gradient(values, logits_p, weights=None):
    (gradient,) = torch.autograd.grad((values * (1 if weights is None else weights)).sum(), logits_p)
    return values.detach(), gradient


@pytest.mark.parametrize("name", sorted(set(LOSSES) - INFINITE - OTHER_SCALE))
def test_a_loss_is_that_of_the_full_vocabulary_with_other_logits_of_minus_infinity(name):
    logits_p, logits_q = inputs()
    loss = objective_of(LOSSES[name])
    torch.manual_seed(0)
    ours = value_and_gradient(loss(logits_p, Trimmed.from_logits(logits_q, KEPT), WHERE), logits_p)
    torch.manual_seed(0)
    theirs = value_and_gradient(loss(untrimmed(logits_p), logits_q, WHERE), logits_p)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert ours[1].abs().max() > 0


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"kld_nla"}))
def test_a_loss_is_finite_where_no_kept_token_is_in_the_targets_nucleus(name):
    logits_p, logits_q = inputs()
    logits_q[0, OTHERS[0]] = 30.0
    loss = objective_of(partial(LOSSES[name], top_p=0.9))
    values, gradient = value_and_gradient(loss(logits_p, Trimmed.from_logits(logits_q, KEPT), WHERE), logits_p)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("spread", [0.3, 1e-3])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kld_has_the_gradient_of_a_drafter_that_spreads_some_mass_over_the_other_tokens(spread, temperature):
    logits_p, logits_q = inputs()
    ours = value_and_gradient(kld(logits_p, Trimmed.from_logits(logits_q, KEPT), temperature=temperature), logits_p)
    log_p = (logits_p / temperature).log_softmax(-1) + math.log(1 - spread)
    spreading = untrimmed(log_p, others=math.log(spread / len(OTHERS)))
    q = (logits_q / temperature).softmax(-1)
    theirs = value_and_gradient((q * (q.log() - spreading)).sum(-1), logits_p)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-9, atol=1e-12)
    # The constant by which the values differ.
    covered, rest = q[:, IDS].sum(-1), q[:, OTHERS]
    constant = covered * (covered.log() - math.log(1 - spread))
    constant = constant + (rest * (rest.log() - math.log(spread / len(OTHERS)))).sum(-1)
    torch.testing.assert_close(ours[0] + constant, theirs[0])
    assert (ours[0] >= 0).all()


def test_kld_is_zero_where_the_drafter_has_the_targets_distribution_over_the_kept_tokens():
    logits_q = inputs()[1]
    target = Trimmed.from_logits(logits_q, KEPT)
    torch.testing.assert_close(kld(logits_q[:, IDS] + 3, target), torch.zeros(N).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(acceptance_rate(logits_q[:, IDS], target), logits_q.softmax(-1)[:, IDS].sum(-1))


def test_the_hybrid_mixes_the_two_at_the_full_acceptance_rate():
    logits_p, logits_q = inputs()
    target = Trimmed.from_logits(logits_q, KEPT)
    share = (-3 * acceptance_rate(untrimmed(logits_p), logits_q)).exp()
    expected = share * kld(logits_p, target) + (1 - share) * tvd(untrimmed(logits_p), logits_q)
    torch.testing.assert_close(lk_hybrid(logits_p, target), expected)


def test_cross_entropy_leaves_out_positions_whose_most_likely_token_is_not_kept():
    logits_p, logits_q = inputs()
    kept = KEPT.mask(most_likely(logits_q))
    assert 0 < kept.sum() < N
    assert most_likely(Trimmed.from_logits(logits_q, KEPT)).tolist() == most_likely(logits_q).tolist()
    ours = value_and_gradient(ce(logits_p, Trimmed.from_logits(logits_q, KEPT)), logits_p)
    reference = value_and_gradient(ce(untrimmed(logits_p)[kept], logits_q[kept]), logits_p)
    torch.testing.assert_close(ours[0][kept], reference[0])
    torch.testing.assert_close(ours[1], reference[1])
    assert (ours[0][~kept] == 0).all()


@pytest.mark.parametrize("statistics", ["batch", "position"])
def test_tvdpp_is_that_of_the_outcomes_and_has_the_direction_of_tvd(statistics):
    logits_p, logits_q = inputs()
    loss, target = partial(tvdpp, statistics=statistics), Trimmed.from_logits(logits_q, KEPT)
    ours = value_and_gradient(loss(logits_p, target), logits_p)
    q = logits_q.softmax(-1)
    outcomes_q = torch.cat([q[:, IDS], q[:, OTHERS].sum(-1, keepdim=True)], -1).log()
    outcomes_p = torch.cat([logits_p, torch.full((N, 1), -math.inf).double()], -1)
    theirs = value_and_gradient(loss(outcomes_p, outcomes_q), logits_p)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    direction = value_and_gradient(tvd(logits_p, target), logits_p)[1]
    moves = direction.norm(dim=-1) > 1e-9  # elsewhere the drafter's mass is above the target's at every kept token
    scale = (ours[1].norm(dim=-1) / direction.norm(dim=-1))[moves]
    torch.testing.assert_close(ours[1][moves], direction[moves] * scale[:, None], rtol=1e-8, atol=1e-10)
    assert ours[1][~moves].abs().max() < 1e-9
    assert torch.allclose(scale, scale[0]) == (statistics == "batch")


def test_a_token_outside_the_nucleus_and_not_kept_is_not_accepted():
    logits_q = torch.tensor([[9.0, 0.0, 0.0]]).double()
    target = Trimmed.from_logits(logits_q, Kept.from_ids([0, 1], 3))
    where = Positions(torch.tensor([2]), torch.tensor([0]))
    loss = objective_of(partial(LOSSES["block"], top_p=0.9))
    assert loss(torch.zeros(1, 2).double(), target, where).tolist() == [0.0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_in_chunks_the_gradient_reaches_the_kept_rows_of_the_embedding_alone(name, tied):
    random = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(V, H, generator=random).double(), torch.randn(V, generator=random).double()
    weight.requires_grad_()
    bias.requires_grad_()
    tokens = torch.arange(N) % V
    hidden = weight[tokens] if tied else torch.randn(N, H, generator=random).double().requires_grad_()
    logits_q = inputs()[1]
    head = Head(weight.index_select(0, KEPT.ids_K), bias.index_select(0, KEPT.ids_K))
    seen = Predicted(hidden, head, lambda rows: Trimmed.from_logits(logits_q[rows], KEPT), WHERE, KEPT)
    objective = objective_of(LOSSES[name])
    target = Trimmed.from_logits(logits_q, KEPT)
    if objective.batch_mean is not None:
        objective = objective.with_mean(seen.values(objective.batch_mean).mean())
    plain = objective((hidden @ weight.T + bias)[:, IDS], target, WHERE).sum()
    leaves = [weight, bias] if tied else [weight, bias, hidden]
    ours = torch.autograd.grad(seen.sum(objective, rows=5), leaves, retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert ours[1][OTHERS].abs().max() == 0
    if not tied:
        assert ours[0][OTHERS].abs().max() == 0
    assert ours[0][KEPT.ids_K].abs().max() > 0


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_probabilities_of_the_kept_tokens_are_enough_at_temperature_1(name):
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(len(IDS), H, generator=random).double().requires_grad_()
    hidden, logits_q = torch.randn(N, H, generator=random).double().requires_grad_(), inputs()[1]
    log_q, top, computed = logits_q.log_softmax(-1)[:, KEPT.ids_K], logits_q.argmax(-1), []

    def known(rows):
        def full():
            computed.append(rows)
            return logits_q[rows]

        return Trimmed(full, KEPT, lambda: log_q[rows], top[rows])

    found = []
    for target in (lambda rows: Trimmed.from_logits(logits_q[rows], KEPT), known):
        seen, objective = Predicted(hidden, Head(weight), target, WHERE, KEPT), objective_of(LOSSES[name])
        torch.manual_seed(0)
        if objective.batch_mean is not None:
            objective = objective.with_mean(seen.values(objective.batch_mean).mean())
        total = seen.sum(objective, rows=5)
        found.append((total.detach(), *torch.autograd.grad(total, [weight, hidden])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert bool(computed) == (name in OTHER_TEMPERATURE)
