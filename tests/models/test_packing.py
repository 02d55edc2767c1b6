"""Packed weights give the same products, and are used for the numbers of rows that they are meant for alone."""

import pytest
import torch
from torch import nn

from drafter.models import packing
from drafter.models.packing import pack
from tests.conftest import small_model


@pytest.fixture
def calls(monkeypatch):
    """Return the numbers of rows of products with packed weights. Small models are packed too."""
    monkeypatch.setattr(packing, "SMALLEST", 0)
    found, linear = [], torch.ops.mkldnn._linear_pointwise

    def counted(values, *rest):
        found.append(values.numel() // values.shape[-1])
        return linear(values, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return found


def frozen(**settings):
    return small_model(**settings).eval().requires_grad_(False)


@torch.inference_mode()
def test_a_packed_model_has_the_same_logits(calls):
    plain, packed = frozen(seed=3), pack(frozen(seed=3), rows=range(2, 6))
    for shape in ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (1, 5), (1, 6), (3, 3)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape)
        assert torch.allclose(packed(ids).logits, plain(ids).logits, atol=1e-6)
    assert set(calls) - {4} == {2, 5}  # four rows may have the weights that MKL has packed


@torch.inference_mode()
@pytest.mark.parametrize("rows", [4, 5])
def test_a_bias_is_added(calls, rows):
    layer = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    values = torch.randn(rows, 6)
    expected = layer(values)
    assert torch.allclose(pack(layer)(values), expected, atol=1e-6)
    assert calls == ([] if rows == 4 and torch.backends.mkl.is_available() else [rows])


@torch.inference_mode()
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")
def test_four_rows_have_the_weights_that_mkl_has_packed_for_them(calls, monkeypatch):
    counts, linear = [], torch.ops.mkl._mkl_linear

    def counted(values, packed, weight, bias, rows):
        counts.append((values.numel() // values.shape[-1], rows))
        return linear(values, packed, weight, bias, rows)

    monkeypatch.setattr(torch.ops.mkl, "_mkl_linear", counted)
    layer = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    expected = {rows: layer(torch.ones(rows, 6)) for rows in (3, 4, 5)}
    pack(layer)
    for rows, values in expected.items():
        assert torch.allclose(layer(torch.ones(rows, 6)), values, atol=1e-6)
    assert (counts, calls) == ([(4, 4)], [5])


@pytest.mark.parametrize("kind", ["trainable", "bfloat16", "small"])
def test_other_models_stay_as_they_are(calls, monkeypatch, kind):
    model = frozen().requires_grad_(kind == "trainable")
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    if kind == "small":
        monkeypatch.setattr(packing, "SMALLEST", 10**9)
    with torch.no_grad():
        pack(model)(torch.tensor([[1, 2, 3, 4, 5]]))
    assert not calls
    assert all("forward" not in vars(layer) for layer in model.modules())


def test_no_gradient_flows_through_packed_weights(calls):
    layer = pack(nn.Sequential(nn.Linear(6, 4)).requires_grad_(False))
    values = torch.randn(5, 6, requires_grad=True)
    layer(values).sum().backward()
    assert values.grad is not None
    assert not calls


def test_a_packed_model_is_not_packed_again(calls, monkeypatch):
    model = pack(frozen())
    reorder = torch.ops.mkldnn._reorder_linear_weight
    packed = []
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *given: packed.append(1) or reorder(*given))
    assert pack(model) is model
    assert not packed
