"""Double precision is used where the device has it, and on the CPU otherwise; wrong sampling settings are refused."""

import ast
from pathlib import Path

import pytest
import torch

from drafter import warping
from drafter.warping import (
    BLOCK,
    LARGE,
    LARGE_VOCABULARY,
    LIKELIEST,
    Sampling,
    check_sampling,
    double,
    draw,
    in_nucleus,
    sample,
    warp,
)
from tests.decoding.chi_square import FALSE_ALARM, p_value

DRAFTER = Path(__file__).parent.parent / "drafter"
# What may name float64: `double`, `_uniform`, the types of stored weights and the check of a loss, both on the CPU.
ALLOWED = {("warping", "double"), ("warping", "_uniform"), ("loading", "NUMBERS"), ("objective", "check_chunks")}


@pytest.mark.parametrize("device_type", [None, "cpu", "cuda", "mps"])
def test_values_become_float64_on_a_device_that_has_it(device_type):
    values = torch.tensor([0.1, 0.2])
    assert torch.equal(double(values, device_type), values.to(torch.float64))


def test_values_on_apples_device_are_moved_to_the_cpu_first(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self) or self)
    double(torch.ones(2), "mps")
    assert len(moved) == 1
    double(torch.ones(2), "cuda")
    assert len(moved) == 1


def test_random_numbers_on_apples_device_are_drawn_in_float32_by_the_generator_that_is_given():
    device = torch.device("cpu")
    found = warping._uniform(5, device, torch.Generator().manual_seed(1), "mps")
    expected = torch.rand(5, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, expected.double())


def test_draws_equal_those_of_a_cumulative_sum_in_float64():
    weights = torch.rand(50, 300, generator=torch.Generator().manual_seed(2))
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    uniform = torch.rand(total.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.searchsorted(cumulative, uniform * total, right=True)[:, 0]
    assert torch.equal(draw(weights, torch.Generator().manual_seed(3)), expected)


@pytest.mark.parametrize("vocabulary", [LARGE_VOCABULARY, LARGE_VOCABULARY + 1], ids=["whole blocks", "a part"])
def test_draws_from_a_large_vocabulary_are_proportional_to_the_weights(vocabulary):
    weights_V = 3.0 / torch.arange(1.0, vocabulary + 1)
    weights_V[::2], weights_V[-1], weights_V[BLOCK : 3 * BLOCK] = 0.0, 0.5, 0.0
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(weights_V.expand(500, -1), generator) for _ in range(60)])
    counts = torch.bincount(drawn, minlength=vocabulary)
    assert p_value(counts.numpy(), (weights_V.double() / weights_V.double().sum()).numpy()) > FALSE_ALARM
    assert counts[weights_V == 0].sum() == 0
    assert counts[-1] > 100


def named(module):
    """Return (module, function or variable) of each use of float64, except in comparisons."""
    found = set()

    def visit(node, owner):
        if isinstance(node, ast.FunctionDef):
            owner = node.name
        elif isinstance(node, ast.Assign) and owner is None:
            owner = ast.unparse(node.targets[0])
        is_dtype = isinstance(node, ast.keyword) and node.arg == "dtype" and ast.unparse(node.value) == "float"
        if is_dtype or (isinstance(node, ast.Attribute) and node.attr in ("float64", "double")):
            found.add((module.stem, owner))
        for child in ast.iter_child_nodes(node) if not isinstance(node, ast.Compare) else []:
            visit(child, owner)

    visit(ast.parse(module.read_text(encoding="utf-8")), None)
    return found


def test_nothing_else_in_the_library_uses_float64():
    assert set().union(*map(named, DRAFTER.rglob("*.py"))) == ALLOWED


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-0.1), "temperature is -0.1, must be 0"),
        (Sampling(top_p=0.0), "top_p is 0.0, must be above 0"),
        (Sampling(top_p=1.1), "top_p is 1.1, must be above 0"),
        (Sampling(top_k=-1), "top_k is -1, must be a whole number"),
        (Sampling(top_k=2.5), "top_k is 2.5, must be a whole number"),
        (Sampling(top_k=True), "top_k is True, must be a whole number"),
        (Sampling(top_k="20"), "top_k is 20, must be a whole number"),
    ],
)
def test_wrong_sampling_settings_are_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(sampling)
    check_sampling(Sampling(0.6, 0.95, 20))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.9), (0.5, 0.6), (2.0, 0.05)])
def test_samples_have_the_distribution_of_warp_without_sorting(temperature, top_p):
    """The counts of 40,000 draws are within five standard deviations of what `warp` expects, and never outside."""
    torch.manual_seed(1)
    logits_V, count = torch.randn(12), 40_000
    drawn = sample(logits_V.expand(count, -1), torch.full((count,), temperature), top_p)
    expected_V = warp(logits_V, Sampling(temperature, top_p))
    found_V = torch.bincount(drawn, minlength=12)
    deviation_V = (count * expected_V * (1 - expected_V)).sqrt()
    assert ((found_V - count * expected_V).abs() <= 5 * deviation_V + 1e-3).all()


def test_a_nucleus_is_that_of_all_sorted_tokens_whether_the_likeliest_suffice_or_not(monkeypatch):
    logits_BV = torch.randn(6, LARGE, generator=torch.Generator().manual_seed(0))
    peaked, flat, mixed = 8 * logits_BV, 0.1 * logits_BV, torch.cat([8 * logits_BV[:3], 0.1 * logits_BV[3:]])
    equal = (8 * logits_BV).round()  # many tokens are equally likely
    given = [(logits, top_p) for logits in (peaked, flat, mixed, equal) for top_p in (0.3, 0.9)]
    found = [in_nucleus(logits.softmax(-1), top_p) for logits, top_p in given]
    monkeypatch.setattr("drafter.warping.LARGE", LARGE + 1)  # sort all of them
    for mask, (logits, top_p) in zip(found, given, strict=True):
        assert torch.equal(mask, in_nucleus(logits.softmax(-1), top_p))
    assert found[1].sum(-1).max() < LIKELIEST < found[3].sum(-1).min()
