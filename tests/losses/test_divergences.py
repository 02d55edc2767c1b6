"""The losses against independent formulas, the paper's Lemma, and the identity of TVD++ with TVD / sigma."""

from functools import partial

import pytest
import torch

from drafter.losses.block_losses import e2e_tvd
from drafter.losses.divergences import acceptance_rate, nla, tvd, tvdpp
from drafter.losses.mixing import mix
from drafter.losses.objective import check_chunks, objective_of
from tests.objectives import LOSSES, at_positions, positions

N, V = 12, 30


@pytest.fixture
def logits():
    """Return drafter and target logits in float64, where rounding cannot hide a wrong term."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(N, V, dtype=torch.float64, generator=generator) * scale for scale in (1.0, 2.0))
    return p.requires_grad_(), q


def gradient(values, logits_p):
    return torch.autograd.grad(values.mean(), logits_p)[0]


def reward(p, q):
    return (q.softmax(-1) > p.softmax(-1)).double()


def policy_gradient(p, advantage):
    """Return E_{x~p}[grad log p(x) * -advantage(x)] by autograd of log p, averaged over positions."""
    log_p = p.log_softmax(-1)
    return gradient((log_p.detach().exp() * log_p * -advantage).sum(-1), p)


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


def overlap(p, q):
    return torch.minimum(p, q).sum(-1)


def nucleus(q, top_p):
    """Compute the nucleus by a loop: take the most likely tokens until their mass reaches top_p."""
    result = torch.zeros_like(q)
    for row, kept in zip(q, result, strict=True):
        mass = 0.0
        for token in row.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            kept[token] = row[token]
            mass += float(row[token])
    return result / result.sum(-1, keepdim=True)


def sharpen(p, power):
    return p**power / (p**power).sum(-1, keepdim=True)


def hybrid(p, q):
    share = (-3 * overlap(p, q)).exp().detach()
    return share * kl(q, p) + (1 - share) * 0.5 * (p - q).abs().sum(-1)


def tvdpp_formula(p, q, over):
    r = (q > p).double().detach()
    dim = None if over == "batch" else -1
    mean, sigma = r.mean(dim, keepdim=True), r.std(dim, correction=0, keepdim=True)
    return (p * -((r - mean) / sigma)).sum(-1)


def blocks(values, normalise):
    """Return for each position the sum of the products of the first one, two and three values of its block."""
    following = positions(N, V).following_N.tolist()
    result = []
    for start in range(N):
        count, product, total = min(3, following[start] + 1), 1.0, 0.0
        for position in range(start, start + count):
            product = product * values[position]
            total = total + product
        result.append(total / count if normalise else total)
    return torch.stack(result)


def response_tokens(probs):
    return probs.gather(-1, positions(N, V).tokens_N[:, None])[:, 0]


def kl_of_nucleus(p, q):
    q = nucleus(q, 0.9)
    return torch.where(q > 0, q * (q.clamp_min(1e-300) / p).log(), 0.0).sum(-1)


FORMULAS = {
    "kld": (1.0, lambda p, q: kl(q, p)),
    "rkl": (1.0, lambda p, q: kl(p, q)),
    "jsd": (1.0, lambda p, q: (kl(q, (p + q) / 2) + kl(p, (p + q) / 2)) / 2),
    "ce": (1.0, lambda p, q: -p[torch.arange(N), q.argmax(-1)].log()),
    "tvd": (1.0, lambda p, q: 0.5 * (p - q).abs().sum(-1)),
    "nla": (1.0, lambda p, q: -overlap(p, q).log()),
    "nla at 0.3": (0.3, lambda p, q: -overlap(p, q).log()),
    "hit": (1.0, lambda p, q: -(sharpen(p, 1 / 0.3) * q).sum(-1).log()),
    "hit of a match": (0.6, lambda p, q: -(p * nucleus(q, 0.9)).sum(-1).log()),
    "lk_hybrid": (1.0, hybrid),
    "tvdpp": (1.0, lambda p, q: tvdpp_formula(p, q, "batch")),
    "tvdpp position": (1.0, lambda p, q: tvdpp_formula(p, q, "position")),
    "e2e_tvd": (1.0, lambda p, q: 1 - blocks(overlap(p, q), normalise=True)),
    "block": (1.0, lambda p, q: -blocks((response_tokens(p) / response_tokens(q)).clamp_max(1), normalise=False)),
    "kld of a nucleus": (0.6, kl_of_nucleus),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_are_those_of_the_formula(name, dtype, tolerance, logits):
    p, q = logits
    temperature, formula = FORMULAS[name]
    reference = formula((p / temperature).softmax(-1), (q / temperature).softmax(-1))
    expected = gradient(reference, p)
    narrow = p.detach().to(dtype).requires_grad_()
    values = at_positions(LOSSES[name], N, V)(narrow, q.to(dtype))
    assert values.dtype == dtype
    torch.testing.assert_close(values.double(), reference, rtol=tolerance, atol=tolerance)
    assert (gradient(values, narrow) - expected).norm() <= tolerance * expected.norm()


def test_every_loss_but_mixes_has_a_formula():
    assert {name for name, loss in LOSSES.items() if loss.func is not mix} == set(FORMULAS)


def test_a_loss_that_depends_on_its_batch_without_declaring_it_is_refused():
    def undeclared(logits_p, logits_q):
        return tvdpp(logits_p, logits_q)

    with pytest.raises(ValueError, match="declare what it needs"):
        check_chunks(undeclared)
    for name, loss in LOSSES.items():
        check_chunks(loss)
        assert objective_of(loss).lookahead == (2 if name in ("e2e_tvd", "block") else 0)


def test_tvd_is_one_minus_the_overlap_and_half_the_l1_distance(logits):
    p, q = logits
    torch.testing.assert_close(tvd(p, q), 1 - torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1))
    torch.testing.assert_close(tvd(p, q), 0.5 * (p.softmax(-1) - q.softmax(-1)).abs().sum(-1))
    torch.testing.assert_close(tvd(p, q), 1 - acceptance_rate(p, q))


def test_lemma_the_gradient_of_tvd_is_a_policy_gradient_with_the_reward(logits):
    p, q = logits
    torch.testing.assert_close(gradient(tvd(p, q), p), policy_gradient(p, reward(p, q)), rtol=1e-9, atol=1e-12)


def test_exact_tvdpp_with_batch_statistics_is_tvd_over_sigma(logits):
    p, q = logits
    sigma = reward(p, q).std(correction=0)
    torch.testing.assert_close(gradient(tvdpp(p, q), p), gradient(tvd(p, q), p) / sigma, rtol=1e-9, atol=1e-12)


def test_exact_tvdpp_with_position_statistics_divides_each_position_by_its_sigma(logits):
    p, q = logits
    sigma = reward(p, q).std(-1, correction=0, keepdim=True)
    ours = gradient(tvdpp(p, q, statistics="position"), p)
    torch.testing.assert_close(ours, gradient(tvd(p, q), p) / sigma, rtol=1e-9, atol=1e-12)
    unscaled = gradient(tvd(p, q), p)
    assert torch.cosine_similarity(ours.flatten(), unscaled.flatten(), dim=0) < 0.9999


def test_sampled_tvdpp_has_the_exact_gradient_in_expectation(logits):
    p, q = logits
    torch.manual_seed(0)
    count = 60_000
    sampled = gradient(tvdpp(p, q, estimator="sampled", num_samples=count), p)
    # The expectation is the policy gradient with mu and sigma under p, over all positions.
    weights = p.softmax(-1).detach() / N
    mean = (weights * reward(p, q)).sum()
    sigma = ((weights * reward(p, q).square()).sum() - mean**2).sqrt()
    exact = policy_gradient(p, (reward(p, q) - mean) / sigma)
    # The standard error of an entry is about sqrt(0.25 / count) / N = 2e-4; 5 of them fail by chance once in 5,000.
    torch.testing.assert_close(sampled, exact, rtol=0, atol=1e-3)


def test_normalising_the_reward_lowers_the_variance_of_the_sampled_gradient(logits):
    p, q = logits
    torch.manual_seed(0)
    with_baseline, without = [], []
    for _ in range(200):
        with_baseline.append(gradient(tvdpp(p, q, estimator="sampled", num_samples=4), p))
        tokens = torch.multinomial(p.softmax(-1).detach(), 4, replacement=True)
        plain = -(p.log_softmax(-1).gather(-1, tokens) * reward(p, q).gather(-1, tokens)).mean(-1)
        without.append(gradient(plain, p))
    relative = [
        torch.stack(rows).var(0).sum() / torch.stack(rows).mean(0).square().sum() for rows in (with_baseline, without)
    ]
    assert relative[0] < relative[1]


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.func is not mix])
def test_temperature_divides_both_models_logits(name, logits):
    p, q = logits
    scaled = partial(LOSSES[name], temperature=1.0), partial(LOSSES[name], temperature=0.5)
    at_one, at_half = (at_positions(loss, N, V) for loss in scaled)
    torch.testing.assert_close(at_half(p, q), at_one(2 * p, 2 * q))


WANT_ONE_TOKEN = {"ce", "hit", "hit of a match"}  # the target's most likely one, so that q is not the best drafter


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WANT_ONE_TOKEN and "nucleus" not in name])
def test_equal_distributions_give_no_gradient(name, logits):
    p, _ = logits
    values = at_positions(LOSSES[name], N, V)(p, p.detach())
    torch.testing.assert_close(gradient(values, p), torch.zeros(N, V, dtype=torch.float64))


def awkward():
    """Return pairs of logits for which a naive formula gives NaN or infinity."""
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(N, V, generator=generator) for _ in range(2))
    one_hot = torch.full((N, V), -torch.inf).scatter_(1, torch.arange(N)[:, None], 0.0)
    warped = q.masked_fill(q < 0.5, -torch.inf)
    return {
        "large": (1e4 * p, 1e4 * q),
        "opposite": (1e4 * p.sign(), -1e4 * p.sign()),
        "one-hot target": (p, one_hot),
        "sure drafter, another one-hot target": (1e4 * one_hot.roll(1, 1).clamp_min(-1), one_hot),
        "warped target": (p, warped),
        "the same": (p, p),
    }


@pytest.mark.parametrize("case", awkward())
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_finite_where_formulas_are_not(name, case):
    p, q = awkward()[case]
    p = p.clone().requires_grad_()
    values = at_positions(LOSSES[name], N, V)(p, q)
    assert values.isfinite().all()
    assert gradient(values, p).isfinite().all()


def test_the_log_acceptance_has_a_gradient_where_the_acceptance_rate_underflows():
    p = torch.tensor([[0.0, 200.0]], requires_grad=True)
    q = torch.tensor([[200.0, 0.0]])
    assert acceptance_rate(p, q) == 0
    torch.testing.assert_close(nla(p, q), 200 - torch.tensor([2.0]).log())
    assert gradient(nla(p, q), p)[0, 0] == pytest.approx(-0.5, abs=1e-5)  # float32 at 200
    assert gradient(tvd(p, q), p).abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_target_gets_no_gradient(name, logits):
    p, q = logits
    q.requires_grad_()
    values = at_positions(LOSSES[name], N, V)(p, q)
    assert torch.autograd.grad(values.sum(), q, allow_unused=True)[0] is None


@pytest.mark.parametrize("name", LOSSES)
def test_no_positions_give_no_values(name):
    empty = torch.zeros(0, V)
    assert at_positions(LOSSES[name], 0, V)(empty, empty).shape == (0,)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"statistics": "token"}, "loss.statistics is 'token'"),
        ({"estimator": "guess"}, "loss.estimator is 'guess'"),
        ({"temperature": 0.0}, "loss.temperature is 0.0"),
        ({"top_p": 1.5}, "loss.top_p is 1.5"),
    ],
)
def test_an_invalid_setting_is_named(keywords, message, logits):
    with pytest.raises(ValueError, match=message):
        tvdpp(*logits, **keywords)


def test_a_block_of_no_tokens_is_refused(logits):
    with pytest.raises(ValueError, match="num_speculative_tokens is 0"):
        e2e_tvd(*logits, positions=positions(N, V), num_speculative_tokens=0)
