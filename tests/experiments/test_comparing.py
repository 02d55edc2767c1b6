"""The expected blocks of a row of a cache are those of decoding it: conversations, and drafters of every kind."""

from functools import cache

import numpy as np
import pytest
import torch

from drafter.data.batches import States, response_sequence
from drafter.decoding.acceptance import RULES
from drafter.decoding.drafting import Combined
from drafter.decoding.ngrams import Lookup, NgramSizes
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import speculative_decode
from drafter.models.loading import OutputEmbedding
from drafter.models.trimming import trim
from drafter.warping import Sampling, warp
from experiments.running.comparing import Judged, expected_counts
from tests.conftest import VOCABULARY, small_model

GAMMAS = [1, 2, 4]


def near_target():
    """Return a drafter that often agrees with the fixture `target`, whose weights it has with noise."""
    model, generator = small_model(seed=1, hidden=32, layers=2, sharpness=60.0), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


LOOKUP = Lookup(NgramSizes(1, 2))
DRAFTERS = {
    "model": near_target,
    "trimmed": lambda: trim(near_target(), range(0, VOCABULARY, 2)),
    "ngram": lambda: LOOKUP,
    "ngram+model": lambda: Combined(LOOKUP, near_target()),
    "ngram+trimmed": lambda: Combined(LOOKUP, trim(near_target(), range(0, VOCABULARY, 2))),
}


def conversation(target, sampling):
    """Return a conversation of three turns, and for each the tokens before it and the target's response."""
    sequence, parts, turns = [], [], []
    generator = torch.Generator().manual_seed(7)
    for given, length in (([3, 5, 9], 11), ([8, 8, 2], 1), ([5], 14)):
        options = DecodingOptions(length, sampling)
        sequence = [*sequence, *given]
        tokens = speculative_decode(target, target, sequence, 1, options, generator).tokens
        turns.append((sequence, tokens))
        sequence = [*sequence, *tokens]
        parts += [len(given), len(tokens)]
    ends = np.cumsum(parts)
    pieces = np.split(np.array(sequence), ends[:-1])
    row = {"prompt_ids": np.concatenate(pieces[0::2]), "response_ids": np.concatenate(pieces[1::2]), "turns": parts}
    return row | {"temperature": sampling.temperature}, turns


def judged(row, target=None):
    """Return a row with the target's states, as an exact cache has them, if the target is given."""
    sample = response_sequence(row)
    if target is None:
        return Judged("chat:1", "chat", sample)
    ids_1T = torch.from_numpy(sample.ids_T.astype(np.int64))[None]
    states_TH = target.model(ids_1T).last_hidden_state[0]
    positions = np.concatenate([np.arange(start - 1, end - 1) for start, end in sample.predicted()])
    return Judged("chat:1", "chat", sample._replace(cached_N=States(states_TH[positions])))


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_blocks_of_a_conversation_are_those_of_decoding_each_turn(target, name):
    row, turns = conversation(target, Sampling(0.0))
    drafter = DRAFTERS[name]()
    found = expected_counts(drafter, target, judged(row), GAMMAS, RULES, 1.0)
    expected = []
    for gamma in GAMMAS:
        decoded = [
            speculative_decode(target, drafter, before, gamma, DecodingOptions(len(tokens), Sampling(0.0)))
            for before, tokens in turns
        ]
        assert [one.tokens for one in decoded] == [tokens for _, tokens in turns]
        expected.append(sum(len(one.blocks) for one in decoded))
    assert [one["blocks"] for one in found] == expected
    assert all("rule" not in one and one["tokens"] == 26 for one in found)
    if "model" in name:  # some drafts are accepted, and some are not
        assert 10 < expected[-1] < 24


def chain(accept, gamma):
    """Return the expected number of blocks from the acceptance probabilities, by its definition."""

    @cache
    def blocks_from(position):
        if position >= len(accept):
            return 0.0
        total, reached = 1.0, 1.0
        for number in range(gamma):
            after = position + number
            accepted = accept[after] if after < len(accept) else 0.0
            total += reached * (1 - accepted) * blocks_from(after + 1)
            reached *= accepted
        return total + reached * blocks_from(position + gamma + 1)

    return blocks_from(0)


@pytest.mark.parametrize("kept", [VOCABULARY, 32])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 1.0), (1.0, 0.9)])
def test_sampled_blocks_of_a_conversation_are_those_of_each_turn_alone(target, temperature, top_p, kept):
    sampling = Sampling(temperature, top_p)
    row, turns = conversation(target, sampling)
    drafter = near_target() if kept == VOCABULARY else trim(near_target(), range(kept))
    head = OutputEmbedding(target.get_output_embeddings())
    found = expected_counts(drafter, head, judged(row, target), GAMMAS, RULES, top_p)
    expected = dict.fromkeys([(gamma, rule) for gamma in GAMMAS for rule in RULES], 0.0)
    for before, tokens in turns:
        ids, generated = torch.tensor([[*before, *tokens]]), torch.tensor(tokens)
        logits_p_LV, logits_q_LV = (model(ids).logits[0, len(before) - 1 : -1] for model in (drafter, target))
        p_L, q_L = (
            warp(logits_LV, sampling).gather(-1, generated[:, None])[:, 0] for logits_LV in (logits_p_LV, logits_q_LV)
        )
        accepts = {
            "ratio": (p_L / q_L).clamp(max=1),
            "argmax": (logits_p_LV.argmax(-1) == generated).float(),
            "match": p_L,
        }
        for gamma, rule in expected:
            expected[gamma, rule] += chain(tuple(accepts[rule].tolist()), gamma)
    assert [(one["gamma"], one["rule"], one["temperature"]) for one in found] == [
        (gamma, rule, temperature) for gamma, rule in expected
    ]
    # the states pass through the output embedding in another order of float32 sums
    assert [one["blocks"] for one in found] == pytest.approx(list(expected.values()), rel=1e-4)


def test_a_drafter_whose_logits_are_not_numbers_is_refused(target):
    row, _ = conversation(target, Sampling(0.0))
    broken = near_target()
    broken.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="not numbers: leave it out"):
        expected_counts(broken, target, judged(row), GAMMAS, ["argmax"], 1.0)
