"""Each acceptance rule is lossless and knows its acceptance probabilities; wrong rules show that the tests can fail."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

from drafter.decoding import speculative
from drafter.decoding.acceptance import RULES, check_rule, verify
from drafter.decoding.decoders import Compiled, Padded
from drafter.decoding.options import Adaptive, DecodingOptions
from drafter.decoding.speculative import speculative_decode, speculative_decode_batch
from drafter.models.packing import pack
from drafter.warping import Sampling, warp
from tests.conftest import small_model
from tests.decoding.chi_square import FALSE_ALARM, p_value, p_value_of_zero

SAMPLES = 10_000
SAMPLINGS = [Sampling(temperature, top_p) for temperature in (1.0, 0.6) for top_p in (1.0, 0.9)]


class Drafted(NamedTuple):
    """What a rule is given: the drafts, their distributions p, q, and the number in [0, 1) that drew each draft."""

    tokens_BG: torch.Tensor
    p_BGV: torch.Tensor
    q_BGV: torch.Tensor
    uniform_BG: torch.Tensor


def by_inverse(p_BGV, uniform_BG):
    """Draw a token for each random number, by the inverse of the cumulative distribution."""
    cumulative = p_BGV.double().cumsum(-1)
    return torch.searchsorted(cumulative, uniform_BG[..., None] * cumulative[..., -1:], right=True)[..., 0]


def ratio(given, generator):
    return verify(given.tokens_BG, given.p_BGV, given.q_BGV, generator)


def certain(given, generator):
    return verify(given.tokens_BG, None, given.q_BGV, generator)


# Whether the rule drafts the most likely token, and how it verifies.
CORRECT = {"ratio": (False, ratio), "argmax": (True, certain), "match": (False, certain)}


def accept_all(given, generator):
    found = ratio(given, generator)
    bonus = torch.multinomial(given.q_BGV[:, -1], 1, generator=generator)[:, 0]
    return found._replace(accepted_B=torch.full_like(found.accepted_B, given.tokens_BG.shape[1]), bonus_B=bonus)


def bonus_from_q(right):
    """A common mistake: the right acceptance probabilities, but a redraw from q with the rejected token."""

    def rule(given, generator):
        found = right(given, generator)
        q_BV = given.q_BGV[torch.arange(len(given.q_BGV)), found.accepted_B]
        return found._replace(bonus_B=torch.multinomial(q_BV, 1, generator=generator)[:, 0])

    return rule


def one_number_drafts_and_accepts(given, generator):
    """Accept a draft by the number that drew it."""
    found = certain(given, generator)
    accepted_B = (given.uniform_BG < found.acceptance_probabilities_BG).long().cumprod(1).sum(1)
    weights_BV = given.q_BGV[torch.arange(len(given.q_BGV)), accepted_B].clone()
    count = given.tokens_BG.shape[1]
    rejected_B = (accepted_B < count).nonzero()[:, 0]
    weights_BV[rejected_B, given.tokens_BG[rejected_B, accepted_B[rejected_B]]] = 0
    weights_BV += 1e-30 * (weights_BV.sum(1, keepdim=True) == 0)
    return found._replace(accepted_B=accepted_B, bonus_B=torch.multinomial(weights_BV, 1, generator=generator)[:, 0])


def drawn_with(given, uniform_BG, generator):
    """Draw the target's tokens with given random numbers, and accept the drafts that equal them."""
    found = certain(given, generator)
    drawn_BG = by_inverse(given.q_BGV, uniform_BG)
    accepted_B = (drawn_BG[:, :-1] == given.tokens_BG).long().cumprod(1).sum(1)
    return found._replace(accepted_B=accepted_B, bonus_B=drawn_BG.gather(1, accepted_B[:, None])[:, 0])


def one_number_draws_both(given, generator):
    """Draw the target's token with the draft's number. This is lossless, but accepts other shares than `match`."""
    another_B1 = torch.rand(len(given.q_BGV), 1, generator=generator, dtype=torch.float64)
    return drawn_with(given, torch.cat([given.uniform_BG, another_B1], 1), generator)


def one_number_for_the_block(given, generator):
    """Draw the target's tokens of all positions with one number."""
    uniform_B1 = torch.rand(len(given.q_BGV), 1, generator=generator, dtype=torch.float64)
    return drawn_with(given, uniform_B1.expand(-1, given.q_BGV.shape[1]), generator)


WRONG = {
    "accept all": (False, accept_all),
    "ratio, bonus from q": (False, bonus_from_q(ratio)),
    "argmax, bonus from q": (True, bonus_from_q(certain)),
    "argmax, verified as drawn": (True, ratio),
    "match, bonus from q": (False, bonus_from_q(certain)),
    "match, one number drafts and accepts": (False, one_number_drafts_and_accepts),
    "match, one number draws both": (False, one_number_draws_both),
    "match, one number for the block": (False, one_number_for_the_block),
}


def decode_pairs(rule, p, q, gamma):
    """Decode SAMPLES pairs of tokens by a rule, from first-order chains p and q, (V, V) each.

    Returns:
        the histogram of the pairs, and for each sample the number of accepted tokens of its first block minus the
        number that the acceptance probabilities predict.
    """
    takes_best, verification = rule
    generator = torch.Generator().manual_seed(0)

    def block(last_B):
        states, uniform_BG = [last_B], torch.rand(len(last_B), gamma, generator=generator, dtype=torch.float64)
        for step in range(gamma):
            p_BV = p[states[-1]]
            states.append(p_BV.argmax(-1) if takes_best else by_inverse(p_BV, uniform_BG[:, step]))
        states = torch.stack(states, 1)
        given = Drafted(states[:, 1:], p[states[:, :-1]], q[states], uniform_BG)
        accepted_B, bonus_B, probabilities_BG = verification(given, generator)
        positions, predicted_B = torch.arange(gamma + 1), probabilities_BG.double().cumprod(1).sum(1)
        drafts = given.tokens_BG[:, positions.clamp_max(gamma - 1)]
        emitted = torch.where(positions < accepted_B[:, None], drafts, bonus_B[:, None])
        return accepted_B, emitted, (accepted_B - predicted_B).numpy()

    accepted_B, emitted, differences = block(torch.zeros(SAMPLES, dtype=torch.long))
    second_B = torch.where(accepted_B > 0, emitted[:, 1], block(emitted[:, 0])[1][:, 0])
    return np.bincount(emitted[:, 0] * len(p) + second_B, minlength=len(p) ** 2), differences


def is_correct(rule, chain, sampling, gamma):
    """Return whether the pairs have the target's distribution, and as many drafts are accepted as predicted."""
    p, q = (warp(logits, sampling) for logits in chain)
    counts, differences = decode_pairs(rule, p, q, gamma)
    expected = (q[0][:, None] * q).flatten().double().numpy()
    # A token with probability 0 suffices, without any statistic.
    lossless = counts[expected == 0].sum() == 0 and p_value(counts, expected) > FALSE_ALARM
    return lossless, p_value_of_zero(differences) > FALSE_ALARM


@pytest.fixture(scope="module")
def chain():
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.randn(2, 6, 6, generator=generator)).unbind(0)


@pytest.mark.parametrize("gamma", [1, 3, 5])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rule", CORRECT.values(), ids=CORRECT)
def test_pairs_have_the_targets_distribution_and_the_predicted_acceptance(chain, rule, sampling, gamma):
    assert is_correct(rule, chain, sampling, gamma) == (True, True)


@pytest.mark.parametrize("gamma", [1, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_detected(chain, name, sampling, gamma):
    lossless, predicted = is_correct(WRONG[name], chain, sampling, gamma)
    if name == "match, one number draws both":
        assert (lossless, predicted) == (True, False)
    else:
        assert not lossless


class Chain:
    """A stub model whose logits depend on the last token alone, in the place of a decoder."""

    device, config = torch.device("cpu"), PreTrainedConfig()

    def __init__(self, logits_VV):
        self.logits_VV, self.model = logits_VV, self

    def forward(self, ids, starts, keep):
        return self.logits_VV[torch.tensor([row[-keep:] for row in ids])]

    def replace_row(self, row, ids):
        pass

    def keep_rows(self, rows):
        pass


@pytest.fixture
def models(chain, monkeypatch):
    """Return drafter and target as stub models, which the decoding functions take as they are."""
    monkeypatch.setattr(speculative, "decoder_of", lambda model: model)
    monkeypatch.setattr(speculative, "RaggedDecoder", lambda model, capacity: model)
    monkeypatch.setattr(speculative, "check_side_by_side", lambda model, capacity: None)
    return tuple(map(Chain, chain))


def check_transitions(decoded, chain, sampling, first):
    """Check each token's distribution given the one before it, and the predicted numbers of emitted tokens."""
    q = warp(chain[1], sampling).double().numpy()
    counts = np.zeros_like(q)
    for one, token in zip(decoded, first, strict=True):
        np.add.at(counts, ([token, *one.tokens[:-1]], one.tokens), 1)
    reached = counts.sum(1) > 0
    assert min(map(p_value, counts[reached], q[reached])) > FALSE_ALARM / reached.sum()
    differences = [len(block.emitted) - block.expected for one in decoded for block in one.blocks]
    assert p_value_of_zero(differences) > FALSE_ALARM


GAMMAS = [1, 3, 5, Adaptive(5, 0.4)]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rule", RULES)
def test_batched_decoding_by_each_rule_samples_the_targets_distribution(chain, models, rule, sampling, gamma):
    drafter, target = models
    generator, prompts = torch.Generator().manual_seed(0), [[5, n % 6] if n % 2 else [n % 6] for n in range(240)]
    options = DecodingOptions(8, sampling, rule=rule)
    decoded = speculative_decode_batch(target, drafter, prompts, gamma, options, generator, 200)
    check_transitions(decoded, chain, sampling, [prompt[-1] for prompt in prompts])


@pytest.mark.parametrize("gamma", [3, Adaptive(5, 0.4)])
@pytest.mark.parametrize("rule", RULES)
def test_decoding_one_sequence_by_each_rule_samples_the_targets_distribution(chain, models, rule, gamma):
    drafter, target = models
    options = DecodingOptions(400, Sampling(0.8, 0.95), rule=rule)
    decoded = speculative_decode(target, drafter, [0], gamma, options, torch.Generator().manual_seed(0))
    check_transitions([decoded], chain, options.sampling, [0])


@pytest.mark.parametrize("gamma", [3, Adaptive(4, 0.4)])
def test_greedy_decoding_is_the_same_by_each_rule(target, drafter, gamma):
    runs = [speculative_decode(target, drafter, [1, 2], gamma, DecodingOptions(20, rule=rule)) for rule in RULES]
    assert runs[0].tokens == runs[1].tokens == runs[2].tokens
    assert runs[0].blocks == runs[1].blocks == runs[2].blocks


@pytest.mark.parametrize("rule", RULES)
def test_packed_padded_and_compiled_models_decode_by_each_rule_as_plain_ones(monkeypatch, rule):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    target, drafter = small_model(1, sharpness=20.0), small_model(2, sharpness=20.0)
    options = DecodingOptions(16, Sampling(0.8, 0.95), rule=rule)
    found = []
    for kind in (lambda model: model, pack, lambda model: Compiled(model, 60), lambda model: Padded(model, {4: 6})):
        generator = torch.Generator().manual_seed(0)
        found.append(speculative_decode(kind(target), kind(drafter), [1, 2, 3], 3, options, generator))
    for one in found:
        assert one.tokens == found[0].tokens
        assert [block[:3] for block in one.blocks] == [block[:3] for block in found[0].blocks]


def test_argmax_drafts_the_most_likely_tokens_and_states_the_targets_probability_of_them(chain, models):
    drafter, target = models
    options = DecodingOptions(40, Sampling(0.7, 0.9), rule="argmax")
    decoded = speculative_decode(target, drafter, [0], 3, options, torch.Generator().manual_seed(0))
    last, best, q = 0, chain[0].argmax(-1).tolist(), warp(chain[1], options.sampling)
    for block in decoded.blocks:
        state = last
        for token, probability in zip(block.drafted, block.acceptance_probabilities, strict=True):
            assert token == best[state]
            assert probability == pytest.approx(float(q[state, token]))
            state = token
        last = block.emitted[-1]


def test_an_unknown_rule_is_refused_before_any_call():
    with pytest.raises(ValueError, match="the acceptance rule is 'typical', must be ratio, argmax or match"):
        DecodingOptions(8, rule="typical")
    for rule in RULES:
        check_rule(rule)
