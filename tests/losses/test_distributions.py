"""Losses that accept a sparse target have unbiased values and gradients; the others refuse it."""

from functools import partial

import pytest
import torch

from drafter.losses.block_losses import block, e2e_tvd
from drafter.losses.chunked import Head, Predicted
from drafter.losses.distributions import Drawn, pair
from drafter.losses.divergences import acceptance_rate, ce, jsd, kld, rkl, tvd, tvdpp
from drafter.losses.objective import Positions
from tests.objectives import LOSSES, at_positions

V, DRAWS = 40, 40_000


@pytest.fixture
def one():
    """Return the logits of drafter and target at one position. The target is flat: its top-k has little of the mass."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(1, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return p.requires_grad_(), q


def draw_sparse(q, top_k=4, num_samples=3):
    torch.manual_seed(0)
    tokens = torch.full((DRAWS,), 7)
    return Drawn.from_logits(q.expand(DRAWS, V), tokens, top_k, num_samples).weighted()


@pytest.mark.parametrize(
    "loss", [kld, rkl, jsd, ce, tvd, partial(tvdpp, mean_reward=torch.tensor(0.4)), acceptance_rate]
)
def test_a_sparse_target_gives_an_unbiased_value_and_gradient(loss, one):
    p, q = one
    values = loss(p.expand(DRAWS, V), draw_sparse(q))
    reference = loss(p, q)
    error = values.detach().std() / DRAWS**0.5
    # Five standard errors fail by chance once in two million; 1e-9 is rounding, where nothing is random.
    assert abs((values.mean() - reference).item()) < 5 * error.item() + 1e-9
    ours, theirs = (torch.autograd.grad(value.mean(), p)[0] for value in (values, reference))
    # An entry's standard error is at most that of a weight of 10 in 40,000 draws, 0.01 of the gradient's scale.
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_products_along_a_block_are_unbiased(one):
    p, q = one
    length = 3
    positions = Positions(torch.full((DRAWS,), 7), (length - 1 - torch.arange(DRAWS) % length))
    values = e2e_tvd(p.expand(DRAWS, V), draw_sparse(q), positions=positions)[::length][:-1]
    first = Positions(*(field[:length] for field in positions))
    exact = e2e_tvd(p.expand(length, V), q.expand(length, V), positions=first)[0]
    error = values.std() / len(values) ** 0.5
    assert abs((values.mean() - exact).item()) < 5 * error.item()


def test_the_block_loss_needs_the_responses_token_alone(one):
    p, q = one
    positions = Positions(torch.tensor([7]), torch.tensor([0]))
    sparse = Drawn.from_logits(q, torch.tensor([7]), top_k=1, num_samples=1).weighted()
    torch.testing.assert_close(block(p, sparse, positions=positions), block(p, q, positions=positions))


def test_top_k_weights_are_one_and_the_response_tokens_weight_is_zero(one):
    _, q = one
    sparse = draw_sparse(q)
    assert sparse.ids_NK.shape == (DRAWS, 4 + 3 + 1)
    assert (sparse.weight_NK[:, :4] == 1).all()
    assert (sparse.weight_NK[:, -1] == 0).all()
    assert (sparse.ids_NK[:, 0] == q.argmax()).all()
    # The weighted probabilities add up to one.
    torch.testing.assert_close(
        (sparse.weight_NK * sparse.log_q_NK.exp()).sum(-1), torch.ones(DRAWS, dtype=torch.float64)
    )


def test_a_target_with_nothing_outside_its_top_k_is_exact(one):
    p, _ = one
    q = torch.full((1, V), -torch.inf, dtype=torch.float64)
    q[0, :3] = torch.tensor([1.0, 0.5, 0.0])
    sparse = Drawn.from_logits(q, torch.tensor([1]), top_k=4, num_samples=2).weighted()
    torch.testing.assert_close(kld(p, sparse), kld(p, q))


BIASED = ["hit", "hit of a match", "nla", "lk_hybrid", "tvdpp position", "nla at 0.3", "kld of a nucleus", "kld_nla"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_a_sparse_target_or_refuses_it(name, one):
    p, q = one
    sparse = Drawn.from_logits(q, torch.tensor([3]), top_k=4, num_samples=2).weighted()
    loss = at_positions(LOSSES[name], 1, V)
    if name in BIASED:
        with pytest.raises(ValueError, match=r"sparse target .*exact cache"):
            loss(p, sparse)
    else:
        assert loss(p, sparse).isfinite().all()


def test_sampled_rewards_of_a_sparse_target_are_refused(one):
    p, q = one
    with pytest.raises(ValueError, match="estimator=sampled"):
        tvdpp(p, Drawn.from_logits(q, torch.tensor([3]), 4, 2).weighted(), estimator="sampled")


def test_a_sparse_target_can_be_computed_in_chunks():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (20, V))
    q = torch.randn(20, V, generator=generator, dtype=torch.float64)
    sparse = Drawn.from_logits(q, torch.arange(20), 4, 2).weighted()
    predicted = Predicted(hidden, Head(weight), lambda rows: sparse[rows], Positions(torch.arange(20), torch.zeros(20)))
    ours = torch.autograd.grad(predicted.sum(tvd, rows=6), (hidden, weight))
    theirs = torch.autograd.grad(tvd(hidden @ weight.T, sparse).sum(), (hidden, weight))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)


def test_both_sides_are_divided_by_the_temperature(one):
    p, q = one
    both = pair(p, q, 0.5, 1.0)
    torch.testing.assert_close(both.log_p_NV, (2 * p).log_softmax(-1))
    torch.testing.assert_close(both.log_q_NV, (2 * q).log_softmax(-1))
