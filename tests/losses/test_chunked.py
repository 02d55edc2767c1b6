"""The chunked sum against autograd through logits of the whole batch, for every configured loss."""

import pytest
import torch

from drafter.losses.chunked import Head, Predicted, chunked_sum, chunked_values
from drafter.losses.divergences import kld, tvd
from drafter.losses.objective import objective_of
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


def whole(loss, hidden, head, logits_q, weights):
    """The reference: the plain function on all logits, and autograd."""
    total = (weights * at_positions(loss, len(hidden), V)(head(hidden), logits_q)).sum()
    return total, torch.autograd.grad(total, leaves(hidden, head))


def in_chunks(loss, hidden, head, logits_q, rows, weights=None):
    predicted = Predicted(hidden, head, lambda part: logits_q[part], positions(len(hidden), V))
    objective = objective_of(loss)
    if objective.batch_mean is not None:
        objective = objective.with_mean(predicted.values(objective.batch_mean, rows).mean())
    total = predicted.sum(objective, weights, rows)
    return total, torch.autograd.grad(total, leaves(hidden, head))


@pytest.mark.parametrize("rows", [1, 10, N, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_whole_batch(name, dtype, tolerance, rows):
    hidden, head, logits_q = inputs(dtype, bias=rows == 10)
    weights = torch.arange(N).to(dtype) % 4  # some positions are masked, a whole chunk of them where rows is 1
    total, grads = in_chunks(LOSSES[name], hidden, head, logits_q, rows, weights)
    reference, references = whole(LOSSES[name], hidden, head, logits_q, weights)
    # float32 sums of 37 x 50 terms in another order differ in the last of 7 digits.
    torch.testing.assert_close(total, reference, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(grads, references, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_where_drafter_and_target_agree_both_give_the_same_gradient(name):
    hidden, head, _ = inputs(torch.float64)
    # Whole numbers: their products are exact, so that the chunks' logits tie with the target's to the last bit.
    hidden, head = hidden.detach().round().requires_grad_(), Head(head.weight_VH.detach().round().requires_grad_())
    logits_q = head(hidden).detach()
    _, grads = in_chunks(LOSSES[name], hidden, head, logits_q, 10)
    _, references = whole(LOSSES[name], hidden, head, logits_q, 1.0)
    for ours, theirs in zip(grads, references, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_no_positions_give_a_sum_and_gradients_of_zero(name):
    hidden, head, logits_q = inputs(torch.float32, count=0)
    total, (grad_hidden, grad_weight) = in_chunks(LOSSES[name], hidden, head, logits_q, 10)
    assert total == 0
    assert grad_hidden.shape == (0, H)
    torch.testing.assert_close(grad_weight, torch.zeros(V, H))


def test_what_comes_after_the_sum_reaches_the_gradient_and_tied_weights_add_up():
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    tokens = torch.arange(N) % V
    logits_q = torch.randn(N, V, dtype=torch.float64)
    total = 0.25 * chunked_sum(lambda logits, part: tvd(logits, logits_q[part]), weight[tokens], Head(weight), rows=8)
    reference = 0.25 * tvd(weight[tokens] @ weight.T, logits_q).sum()
    ours, theirs = (torch.autograd.grad(3 * value**2, weight)[0] for value in (total, reference))
    torch.testing.assert_close(ours, theirs)


def test_values_come_in_order_and_without_gradient():
    hidden, head, logits_q = inputs(torch.float64)
    values = chunked_values(lambda logits, part: kld(logits, logits_q[part]), hidden, head, rows=10)
    torch.testing.assert_close(values, kld(head(hidden), logits_q).detach())
    assert not values.requires_grad
    with torch.no_grad():
        total = chunked_sum(lambda logits, part: kld(logits, logits_q[part]), hidden, head, rows=10)
    torch.testing.assert_close(total, values.sum())


def test_mixed_precision_multiplies_in_bfloat16_and_keeps_float32_gradients():
    hidden, head, logits_q = inputs(torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        total, grads = in_chunks(LOSSES["kld"], hidden, head, logits_q, 10)
    reference, references = whole(LOSSES["kld"], hidden, head, logits_q, 1.0)
    assert total.dtype == torch.float32
    # bfloat16 has 8 bits: products of 8 terms are good to about 1%.
    torch.testing.assert_close(total, reference, rtol=2e-2, atol=0)
    for ours, theirs in zip(grads, references, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))


def test_no_chunk_is_larger_than_asked():
    seen = []
    hidden, head, logits_q = inputs(torch.float32)

    def evaluate(logits, part):
        seen.append(len(logits))
        return kld(logits, logits_q[part])

    chunked_sum(evaluate, hidden, head, rows=10)
    assert seen == [10, 10, 10, 7]
