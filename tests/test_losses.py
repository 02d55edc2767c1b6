"""The losses against their formulas, the paper's Lemma, and the identity of exact batch TVD++ with TVD / sigma."""

import pytest
import torch

from drafter.losses import acceptance_rate, kld, tvd, tvdpp

N, V = 12, 30


@pytest.fixture
def logits():
    """Drafter and target logits in float64, where rounding cannot hide a wrong term."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(N, V, dtype=torch.float64, generator=generator) * scale for scale in (1.0, 2.0))
    return p.requires_grad_(), q


def gradient(values, logits_p):
    return torch.autograd.grad(values.mean(), logits_p)[0]


def reward(p, q):
    return (q.softmax(-1) > p.softmax(-1)).double()


def policy_gradient(p, advantage):
    """E_{x~p}[grad log p(x) * -advantage(x)] by autograd of log p, averaged over positions."""
    log_p = p.log_softmax(-1)
    return gradient((log_p.detach().exp() * log_p * -advantage).sum(-1), p)


def test_kld_is_the_sum_of_q_log_q_over_p(logits):
    p, q = logits
    reference = (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kld(p, q), reference)
    # d KL(q || p) / d logits = p - q
    torch.testing.assert_close(gradient(kld(p, q), p), (p.softmax(-1) - q.softmax(-1)).detach() / N)


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


def test_exact_tvdpp_with_position_statistics_weights_each_position_by_its_own_sigma(logits):
    p, q = logits
    sigma = reward(p, q).std(-1, correction=0, keepdim=True)
    ours = gradient(tvdpp(p, q, statistics="position"), p)
    torch.testing.assert_close(ours, gradient(tvd(p, q), p) / sigma, rtol=1e-9, atol=1e-12)
    whole = gradient(tvd(p, q), p)
    assert torch.cosine_similarity(ours.flatten(), whole.flatten(), dim=0) < 0.9999


def test_sampled_tvdpp_has_the_exact_gradient_in_expectation(logits):
    p, q = logits
    torch.manual_seed(0)
    count = 60_000
    sampled = gradient(tvdpp(p, q, estimator="sampled", num_samples=count), p)
    # What it estimates: the policy gradient with mu and sigma under p, over all positions.
    weights = p.softmax(-1).detach() / N
    mean = (weights * reward(p, q)).sum()
    sigma = ((weights * reward(p, q).square()).sum() - mean**2).sqrt()
    exact = policy_gradient(p, (reward(p, q) - mean) / sigma)
    # The standard error of an entry is about sqrt(0.25 / count) / N = 2e-4; 5 of them leave 1 in 5,000 to chance.
    torch.testing.assert_close(sampled, exact, rtol=0, atol=1e-3)


def test_normalising_the_reward_lowers_the_variance_of_the_sampled_gradient(logits):
    p, q = logits
    torch.manual_seed(0)
    sigma = (reward(p, q) * p.softmax(-1)).sum(-1).mean().detach()
    with_baseline, without = [], []
    for _ in range(200):
        with_baseline.append(gradient(tvdpp(p, q, estimator="sampled", num_samples=4), p))
        tokens = torch.multinomial(p.softmax(-1).detach(), 4, replacement=True)
        plain = -(p.log_softmax(-1).gather(-1, tokens) * reward(p, q).gather(-1, tokens)).mean(-1)
        without.append(gradient(plain, p))
    assert sigma > 0
    relative = [
        torch.stack(rows).var(0).sum() / torch.stack(rows).mean(0).square().sum() for rows in (with_baseline, without)
    ]
    assert relative[0] < relative[1]


@pytest.mark.parametrize("loss", [kld, tvd, tvdpp])
def test_temperature_divides_both_models_logits(loss, logits):
    p, q = logits
    torch.testing.assert_close(loss(p, q, temperature=0.5), loss(2 * p, 2 * q))


@pytest.mark.parametrize("loss", [kld, tvd, tvdpp])
def test_equal_distributions_give_no_gradient(loss, logits):
    p, _ = logits
    torch.testing.assert_close(gradient(loss(p, p.detach()), p), torch.zeros(N, V, dtype=torch.float64))


@pytest.mark.parametrize("loss", [kld, tvd, tvdpp])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_float32_is_finite_and_near_float64(loss, scale, logits):
    wide = [part.detach() * scale for part in logits]
    narrow = [part.float().requires_grad_() for part in wide]
    wide[0].requires_grad_()
    value, reference = loss(*narrow), loss(*wide)
    assert value.isfinite().all()
    # float32 keeps 7 digits; a sum of 30 terms and logits of 1e4 lose some.
    torch.testing.assert_close(value.double(), reference, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient(value, narrow[0]).double(), gradient(reference, wide[0]), rtol=1e-3, atol=1e-4)


def test_the_target_gets_no_gradient(logits):
    p, q = logits
    q.requires_grad_()
    for loss in (kld, tvd, tvdpp):
        assert torch.autograd.grad(loss(p, q).sum(), q, allow_unused=True)[0] is None


def test_no_positions_give_no_values():
    empty = torch.zeros(0, V)
    for loss in (kld, tvd, tvdpp):
        assert loss(empty, empty).shape == (0,)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"statistics": "token"}, "loss.statistics is 'token'"),
        ({"estimator": "guess"}, "loss.estimator is 'guess'"),
        ({"temperature": 0.0}, "loss.temperature is 0.0"),
    ],
)
def test_a_wrong_switch_is_named(keywords, message, logits):
    with pytest.raises(ValueError, match=message):
        tvdpp(*logits, **keywords)
