"""The chunked sum against autograd through the logits of the full batch, for every configured loss."""

from functools import partial

import pytest
import torch

from drafter.losses.block_losses import block, e2e_tvd
from drafter.losses.chunked import Head, Predicted, chunked_sum, chunked_values
from drafter.losses.divergences import kld, tvd, tvdpp
from drafter.losses.mixing import mix
from drafter.losses.objective import Objective, objective_of
from tests.objectives import LOSSES, at_positions, positions

N, H, V = 37, 8, 50


def inputs(dtype, bias=False, count=N):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, row = (
        (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for shape, scale in (((count, H), 1), ((V, H), 1), ((V,), 1))
    )
    logits_q = (2 * torch.randn(count, V, generator=generator, dtype=torch.float64)).to(dtype)
    return hidden, Head(weight, row if bias else None), logits_q


def leaves(hidden, head):
    return [hidden, head.weight_VH] + ([head.bias_V] if head.bias_V is not None else [])


def unchunked(loss, hidden, head, logits_q, weights):
    """Return the reference: the plain function of all logits, and its gradients by autograd."""
    total = (weights * at_positions(loss, len(hidden), V)(head(hidden), logits_q)).sum()
    return total, torch.autograd.grad(total, leaves(hidden, head))


def chunked(loss, hidden, head, logits_q, rows, weights=None):
    predicted = Predicted(hidden, head, lambda rows_n: logits_q[rows_n], positions(len(hidden), V))
    objective = objective_of(loss)
    if objective.batch_mean is not None:
        objective = objective.with_mean(predicted.values(objective.batch_mean, rows).mean())
    total = predicted.sum(objective, weights, rows)
    return total, torch.autograd.grad(total, leaves(hidden, head))


@pytest.mark.parametrize("rows", [1, 10, N, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_unchunked_loss(name, dtype, tolerance, rows):
    hidden, head, logits_q = inputs(dtype, bias=rows == 10)
    weights = torch.arange(N).to(dtype) % 4  # some weights are 0: for rows == 1, all of a chunk
    total, grads = chunked(LOSSES[name], hidden, head, logits_q, rows, weights)
    reference, references = unchunked(LOSSES[name], hidden, head, logits_q, weights)
    # float32 sums of 37 x 50 terms in another order differ in the last of 7 digits.
    torch.testing.assert_close(total, reference, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(grads, references, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_ties_of_drafter_and_target_give_the_same_gradient_in_chunks(name):
    hidden, head, _ = inputs(torch.float64)
    # Products of integers are exact, so the chunks' logits are equal to the target's to the last bit.
    hidden, head = hidden.detach().round().requires_grad_(), Head(head.weight_VH.detach().round().requires_grad_())
    logits_q = head(hidden).detach()
    _, grads = chunked(LOSSES[name], hidden, head, logits_q, 10)
    _, references = unchunked(LOSSES[name], hidden, head, logits_q, 1.0)
    for ours, theirs in zip(grads, references, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_no_positions_give_a_sum_and_gradients_of_zero(name):
    hidden, head, logits_q = inputs(torch.float32, count=0)
    total, (grad_hidden, grad_weight) = chunked(LOSSES[name], hidden, head, logits_q, 10)
    assert total == 0
    assert grad_hidden.shape == (0, H)
    torch.testing.assert_close(grad_weight, torch.zeros(V, H))


def test_the_upstream_gradient_scales_the_gradient_and_tied_weights_add_up():
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    tokens = torch.arange(N) % V
    logits_q = torch.randn(N, V, dtype=torch.float64)
    total = 0.25 * chunked_sum(
        lambda logits, rows_n: tvd(logits, logits_q[rows_n]), weight[tokens], Head(weight), rows=8
    )
    reference = 0.25 * tvd(weight[tokens] @ weight.T, logits_q).sum()
    ours, theirs = (torch.autograd.grad(3 * value**2, weight)[0] for value in (total, reference))
    torch.testing.assert_close(ours, theirs)


def test_values_come_in_order_and_without_gradient():
    hidden, head, logits_q = inputs(torch.float64)
    values = chunked_values(lambda logits, rows_n: kld(logits, logits_q[rows_n]), hidden, head, rows=10)
    torch.testing.assert_close(values, kld(head(hidden), logits_q).detach())
    assert not values.requires_grad
    with torch.no_grad():
        total = chunked_sum(lambda logits, rows_n: kld(logits, logits_q[rows_n]), hidden, head, rows=10)
    torch.testing.assert_close(total, values.sum())


def test_mixed_precision_multiplies_in_bfloat16_and_keeps_float32_gradients():
    hidden, head, logits_q = inputs(torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        total, grads = chunked(LOSSES["kld"], hidden, head, logits_q, 10)
    reference, references = unchunked(LOSSES["kld"], hidden, head, logits_q, 1.0)
    assert total.dtype == torch.float32
    # bfloat16 has 8 bits: products of 8 terms have a relative error of about 1%.
    torch.testing.assert_close(total, reference, rtol=2e-2, atol=0)
    for ours, theirs in zip(grads, references, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))


def test_no_chunk_has_more_than_the_given_number_of_rows():
    seen = []
    hidden, head, logits_q = inputs(torch.float32)

    def evaluate(logits, rows_n):
        seen.append(len(logits))
        return kld(logits, logits_q[rows_n])

    chunked_sum(evaluate, hidden, head, rows=10)
    assert seen == [10, 10, 10, 7]


def predicted_at(hidden, head, logits_q):
    return Predicted(hidden, head, lambda rows_n: logits_q[rows_n], positions(len(hidden), V))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("loss", [e2e_tvd, block])
def test_a_block_that_crosses_chunk_borders_has_the_value_and_gradient_of_the_unchunked_loss(loss, rows):
    loss = partial(loss, num_speculative_tokens=4)  # in responses of 5 tokens: all of these chunks end inside one
    hidden, head, logits_q = inputs(torch.float64)
    values = predicted_at(hidden, head, logits_q).values(loss, rows)
    torch.testing.assert_close(
        values, at_positions(loss, N, V)(head(hidden), logits_q).detach(), rtol=1e-10, atol=1e-10
    )
    total, grads = chunked(loss, hidden, head, logits_q, rows)
    reference, references = unchunked(loss, hidden, head, logits_q, 1.0)
    for ours, theirs in zip((total, *grads), (reference, *references), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    # Without the lookahead, a block would end with its chunk.
    short_sighted = Objective(loss, needs_positions=True, lookahead=0)
    assert not torch.allclose(predicted_at(hidden, head, logits_q).values(short_sighted, rows), values)


@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("loss", [tvdpp, partial(mix, weights=[0.5, 0.5], parts=[kld, tvdpp])])
def test_a_loss_whose_batch_mean_is_not_filled_in_is_refused(loss, rows):
    predicted = predicted_at(*inputs(torch.float64))
    for compute in (predicted.sum, predicted.values):
        with pytest.raises(ValueError, match=r"mean over the full batch.* pass objective\.with_mean\(mean\)"):
            compute(loss, rows=rows)
    objective = objective_of(loss)
    mean = predicted.values(objective.batch_mean, rows).mean()
    assert predicted.values(objective.with_mean(mean), rows).isfinite().all()
