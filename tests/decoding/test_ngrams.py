"""Drafters without a model: what they propose, that decoding with them is lossless, and how their blocks count."""

from collections import Counter

import numpy as np
import pytest
import torch

from drafter.decoding import acceptance, ngrams
from drafter.decoding.acceptance import RULES
from drafter.decoding.drafting import Combined, models_of, without_model
from drafter.decoding.expected_efficiency import expected_blocks_with_proposals
from drafter.decoding.generation import Decoded, Generation
from drafter.decoding.ngrams import Answered, Lookup, NgramSizes, NgramTable, count_ngrams
from drafter.decoding.options import Adaptive, DecodingOptions
from drafter.decoding.speculative import (
    autoregressive_decode,
    autoregressive_decode_batch,
    speculative_decode,
    speculative_decode_batch,
)
from drafter.metrics import count
from drafter.models.early_exit import first_layers
from drafter.warping import Sampling, warp
from experiments.running.predictions import proposals_along
from tests.conftest import small_model
from tests.decoding.chi_square import FALSE_ALARM, p_value
from tests.families import family

PROMPTS = [[3, 1, 4, 1], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2, 9, 7], [2, 3, 8, 4]]
STOP = DecodingOptions(24, stop_ids=[5])


def sequence(tokens):
    return Generation(list(tokens), len(tokens), 10_000)


def random_tokens(seed, length, vocabulary=4):
    return np.random.default_rng(seed).integers(0, vocabulary, length).tolist()


@pytest.mark.parametrize(
    ("tokens", "sizes", "expected"),
    [
        ([1, 2, 3, 9, 2, 3, 7, 8, 5, 2, 3], (1, 4), [7, 8, 5, 2]),  # the last occurrence, of all of the longest n-grams
        ([1, 2, 3, 9, 4, 3, 7, 8, 5, 2, 3], (1, 4), [9, 4, 3, 7]),  # [2, 3] before the later [3]
        ([1, 2, 3, 9, 4, 3, 7, 8, 5, 2, 3], (1, 1), [7, 8, 5, 2]),
        ([1, 2, 3, 9, 4, 3, 7, 8, 5, 2, 3], (3, 4), []),
        ([1, 2, 3, 4], (1, 4), []),
        ([1], (1, 4), []),
        ([1, 6, 6], (1, 4), [6, 6, 6, 6]),  # a repetition goes on
        ([1, 2, 3, 1, 2, 3, 1], (1, 4), [2, 3, 1, 2]),
    ],
)
def test_the_longest_ngram_and_its_last_occurrence_decide(tokens, sizes, expected):
    assert Lookup(NgramSizes(*sizes)).propose(sequence(tokens), 4) == expected


@pytest.mark.parametrize("sizes", [(1, 4), (2, 3), (5, 5)])
def test_a_growing_sequence_gives_the_proposals_of_a_plain_search(sizes):
    tokens, one, lookup = random_tokens(0, 300), sequence([]), Lookup(NgramSizes(*sizes))
    for length in range(1, 300, 3):
        one.tokens[:] = tokens[:length]
        expected = []
        for size in range(min(sizes[1], length), sizes[0] - 1, -1):
            ends = [end for end in range(size, length) if tokens[end - size : end] == tokens[length - size : length]]
            if ends:
                text = tokens[:length]
                for position in range(ends[-1], ends[-1] + 5):
                    text.append(text[position])
                expected = text[length:]
                break
        assert lookup.propose(one, 5) == expected


def test_sizes_that_are_no_range_are_refused():
    for sizes in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match=f"the n-grams have {sizes[0]} to 2 tokens, must have at least 1"):
            Lookup(NgramSizes(*sizes))
        with pytest.raises(ValueError, match=f"the n-grams have {sizes[0]} to 2 tokens, must have at least 1"):
            count_ngrams([], NgramSizes(*sizes))


def answered(seed, length=120, vocabulary=4):
    written = np.random.default_rng(seed + 1000).random(length) < 0.7
    return Answered(np.array(random_tokens(seed, length, vocabulary), np.int32), written)


@pytest.mark.parametrize("at_once", [2**21, 50])
def test_a_table_proposes_what_the_target_wrote_most_often(monkeypatch, at_once):
    monkeypatch.setattr(ngrams, "AT_ONCE", at_once)
    answers, followers = [answered(seed) for seed in range(6)], {}
    for tokens, written in answers:
        for size in (1, 2, 3):
            for end in np.flatnonzero(written[size:]) + size:
                followers.setdefault(tuple(tokens[end - size : end].tolist()), Counter())[int(tokens[end])] += 1
    table = count_ngrams(answers, NgramSizes(1, 3))
    assert len(table.keys) == len(followers)
    for seed in range(50):
        text, expected = random_tokens(seed + 50, 1 + seed % 5, 5), []  # token 4 has never been seen
        while len(expected) < 4:
            seen = [text[-size:] for size in (3, 2, 1) if len(text) >= size and tuple(text[-size:]) in followers]
            if not seen:
                break
            token, _ = min(followers[tuple(seen[0])].items(), key=lambda one: (-one[1], one[0]))
            expected.append(token)
            text = [*text, token]
        assert table.propose(sequence(text[: len(text) - len(expected)]), 4) == expected


@pytest.mark.parametrize("at_once", [2**21, 400])
def test_a_table_has_no_more_entries_than_it_may_and_keeps_the_frequent_ones(monkeypatch, at_once):
    monkeypatch.setattr(ngrams, "AT_ONCE", at_once)
    often = Answered(np.array([1, 2, 3] * 20, np.int32), np.ones(60, bool))
    answers = [*(answered(seed, 200, 1000) for seed in range(5)), often]
    table = count_ngrams([*answers, *[often] * 3], NgramSizes(1, 2), most_entries=40)
    assert len(table.keys) == 40
    assert table.propose(sequence([3, 1]), 3) == [2, 3, 1]
    assert len(count_ngrams(answers, NgramSizes(1, 2)).keys) > 400
    assert len(count_ngrams([], NgramSizes(1, 2)).keys) == 0


def table_of(target):
    """Return the table of what a target writes after other prompts."""
    prompts = [[number, number + 1] for number in range(30)]
    written = autoregressive_decode_batch(target, prompts, DecodingOptions(20))
    rows = [
        Answered(np.array(prompt + one.tokens, np.int32), np.arange(22) >= 2)
        for prompt, one in zip(prompts, written, strict=True)
    ]
    return count_ngrams(rows, NgramSizes(1, 3))


@pytest.fixture(scope="module")
def drafters(target, drafter):
    table = table_of(target)
    return {
        "lookup": Lookup(),
        "table": table,
        "lookup, model": Combined(Lookup(NgramSizes(2, 3)), drafter),
        "lookup, table": Combined(Lookup(NgramSizes(2, 4)), table),
        "table, lookup, model": Combined(table, Combined(Lookup(), drafter)),
    }


@pytest.fixture(scope="module")
def baselines(target):
    return [autoregressive_decode(target, prompt, STOP).tokens for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("kind", "gamma", "batch_size"),
    [
        ("lookup", 1, None),
        ("lookup, model", 4, 2),
        ("lookup, model", Adaptive(6, 0.2), None),
        ("table", 4, None),
        ("table, lookup, model", 4, None),
        ("lookup, table", Adaptive(6, 0.2), 2),
    ],
)
def test_greedy_text_is_the_targets_own_alone_and_in_a_batch(target, drafters, baselines, kind, gamma, batch_size):
    alone = [speculative_decode(target, drafters[kind], prompt, gamma, STOP) for prompt in PROMPTS]
    assert [one.tokens for one in alone] == baselines
    for one in alone:
        assert [token for block in one.blocks for token in block.emitted] == one.tokens
    assert sum(block.accepted for one in alone for block in one.blocks) > 0
    batch = speculative_decode_batch(target, drafters[kind], PROMPTS, gamma, STOP, batch_size=batch_size)
    assert [(one.tokens, one.blocks) for one in batch] == [(one.tokens, one.blocks) for one in alone]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["lookup", "lookup, model"])
def test_sampled_sequences_of_a_batch_equal_those_decoded_alone(target, drafters, kind, rule):
    options = DecodingOptions(17, Sampling(1.0, 0.95), [5], rule)

    def generators():
        return [torch.Generator().manual_seed(number) for number in range(5)]

    alone = [
        speculative_decode(target, drafters[kind], prompt, 4, options, generator)
        for prompt, generator in zip(PROMPTS, generators(), strict=True)
    ]
    batch = speculative_decode_batch(target, drafters[kind], PROMPTS, 4, options, generators(), 2)
    assert [one.tokens for one in batch] == [one.tokens for one in alone]
    for together, single in zip(batch, alone, strict=True):
        assert [block[:3] for block in together.blocks] == [block[:3] for block in single.blocks]


@pytest.mark.parametrize("gamma", [3, Adaptive(5, 0.3)])
def test_the_model_drafts_only_where_nothing_is_found_and_as_if_it_had_read_everything(target, gamma):
    small, lookup = small_model(4, sharpness=60.0), Lookup(NgramSizes(2, 3))
    lengths = {True: 0, False: 0}
    for prompt in PROMPTS:
        text = list(prompt)
        for block in speculative_decode(target, Combined(lookup, small), prompt, gamma, STOP).blocks:
            found = lookup.propose(sequence(text), len(block.drafted)) if block.drafted else []
            expected = list(text)
            while len(expected) < len(text) + len(block.drafted):
                expected.append(int(small(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
            assert block.drafted == (found or expected[len(text) :])
            lengths[bool(found)] += len(block.drafted)
            text += block.emitted
    assert min(lengths.values()) > 20


SAMPLINGS = [Sampling(1.0), Sampling(0.6, 0.9)]
SHORT_PROMPTS = [0, 1, 0], [3, 3], [2, 4, 5, 2]


def certain_model(layers=1):
    return small_model(1, layers=layers, vocab=6, sharpness=20.0)


def p_of_decoding(drafter, rule, sampling, number=700, target=None):
    """Return the p-value of the hypothesis that two sampled tokens have the target's distribution."""
    target, prompts = target or certain_model(), SHORT_PROMPTS
    options, generator = DecodingOptions(2, sampling, rule=rule), torch.Generator().manual_seed(0)
    decoded = speculative_decode_batch(target, drafter, list(prompts) * number, 3, options, generator)
    assert sum(block.accepted for one in decoded for block in one.blocks) > 20
    least = 1.0
    for start, prompt in enumerate(prompts):
        with torch.inference_mode():
            once = warp(target(input_ids=torch.tensor([prompt])).logits[0, -1], sampling)
            rows = torch.tensor([[*prompt, token] for token in range(6)])
            twice = warp(target(input_ids=rows).logits[:, -1], sampling)
        counts = np.bincount([6 * one.tokens[0] + one.tokens[1] for one in decoded[start::3]], minlength=36)
        least = min(least, p_value(counts, (once[:, None] * twice).flatten().double().numpy()))
    return least


def greedily_answered(prompt):
    tokens = autoregressive_decode(certain_model(), prompt, DecodingOptions(8)).tokens
    return Answered(np.array([*prompt, *tokens], np.int32), np.array([False] * len(prompt) + [True] * len(tokens)))


@pytest.fixture(scope="module")
def small_drafters():
    drafter = small_model(1, vocab=6, sharpness=8.0)  # as the target, but less certain
    answers = [answered(seed, 30, 3) for seed in range(3)]  # tokens 3 to 5 are followed by nothing
    table = count_ngrams(answers, NgramSizes(1, 1))
    return {
        "lookup": Lookup(),
        "table": count_ngrams(map(greedily_answered, SHORT_PROMPTS), NgramSizes(1, 1)),
        "table, model": Combined(table, drafter),
        "lookup, model": Combined(Lookup(), drafter),
    }


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("found_first", [None, Lookup()], ids=["early exit", "lookup, early exit"])
def test_sampled_tokens_have_the_distribution_of_a_target_whose_first_layer_drafts(found_first, sampling, rule):
    target = certain_model(layers=2)
    drafter = first_layers(target, 1)
    chosen = Combined(found_first, drafter) if found_first else drafter
    assert p_of_decoding(chosen, rule, sampling, target=target) > FALSE_ALARM


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["lookup", "table", "table, model", "lookup, model"])
def test_sampled_tokens_have_the_targets_distribution(small_drafters, kind, sampling, rule):
    assert p_of_decoding(small_drafters[kind], rule, sampling) > FALSE_ALARM


def test_a_combination_that_verifies_with_the_wrong_distribution_is_caught(small_drafters, monkeypatch):
    kind = small_drafters["lookup, model"]
    assert p_of_decoding(kind, "ratio", SAMPLINGS[0]) > FALSE_ALARM
    # As if the drafts that were found had been drawn uniformly.
    monkeypatch.setattr(
        "drafter.decoding.drafting.one_hot", lambda tokens, width: torch.full((*tokens.shape, width), 1 / 6)
    )
    assert p_of_decoding(small_drafters["table, model"], "ratio", SAMPLINGS[0]) < 1e-6


def test_a_lookup_that_keeps_a_rejected_token_is_caught(small_drafters, monkeypatch):
    verify = acceptance.verify

    def wrong(drafted_BG, p_BGV, q_BGV, generator=None, lengths=None):
        assert p_BGV is None
        return verify(
            drafted_BG, torch.zeros_like(q_BGV[:, :-1]) + 1e-9, q_BGV, generator, [0] * len(drafted_BG)
        )._replace(accepted_B=verify(drafted_BG, None, q_BGV, generator, lengths).accepted_B)

    monkeypatch.setattr("drafter.decoding.blocks.verify", wrong)
    assert p_of_decoding(small_drafters["lookup"], "ratio", SAMPLINGS[0]) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_is_accepted_with_the_targets_probability_of_it_under_each_rule(target, rule):
    sampling = Sampling(1.3, 0.95)
    options, prompt = DecodingOptions(40, sampling, rule=rule), [3, 1, 4, 3, 1]
    decoded = speculative_decode(target, Lookup(), prompt, 3, options, torch.Generator().manual_seed(1))
    text, seen = list(prompt), 0
    for block in decoded.blocks:
        for position, (token, probability) in enumerate(
            zip(block.drafted, block.acceptance_probabilities, strict=True)
        ):
            logits = target(input_ids=torch.tensor([[*text, *block.drafted[:position]]])).logits[0, -1]
            assert probability == pytest.approx(float(warp(logits, sampling)[token]), rel=1e-3, abs=1e-6)
            seen += 1
        text += block.emitted
    assert seen > 20
    same = speculative_decode(
        target, Lookup(), prompt, 3, DecodingOptions(40, sampling), torch.Generator().manual_seed(1)
    )
    assert (decoded.tokens, decoded.blocks) == (same.tokens, same.blocks)  # the rules are the same one


def test_a_block_without_drafts_is_a_target_call_with_one_token(target):
    never = NgramTable(NgramSizes(), np.empty(0, np.uint64), np.empty(0, np.int32))
    decoded = speculative_decode(target, never, [1, 2, 3], 4, DecodingOptions(9))
    counts = count(decoded, decoded)
    assert [len(block.emitted) for block in decoded.blocks] == [1] * 9
    assert (counts.tokens, counts.target_calls, counts.drafted, counts.tested, counts.expected) == (9, 9, 0, 0, 9.0)


def test_blocks_of_different_lengths_count_as_they_are(target):
    decoded: Decoded = speculative_decode(target, Lookup(), [7, 7, 1, 2], 4, DecodingOptions(60))
    counts, lengths = count(decoded, decoded), [len(block.drafted) for block in decoded.blocks]
    assert {0, 4} <= set(lengths)
    assert counts.drafted == sum(lengths)
    assert counts.tokens == 60 == counts.accepted + counts.target_calls


def test_a_lookup_has_no_context_of_its_own(target):
    decoded = speculative_decode(target, Lookup(), [1] * 100, 3, DecodingOptions(100))
    assert len(decoded.tokens) == target.config.max_position_embeddings - 100


def test_a_short_sequence_may_take_a_row_while_another_lacks_more_tokens_than_it_has(target):
    prompts, options = [[1, 5, 9, 2], [8], [3], [4]], DecodingOptions(11)
    batch = speculative_decode_batch(target, target, prompts, 3, options, batch_size=2)
    for prompt, decoded in zip(prompts, batch, strict=True):
        assert decoded.tokens == autoregressive_decode(target, prompt, options).tokens


@pytest.mark.parametrize("kind", ["lookup", "lookup, model", "table, lookup, model"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
def test_the_number_of_blocks_follows_from_the_text(target, drafters, kind, sampling):
    """With the rule `argmax` the text determines the blocks, of drafts by a model too."""
    generator, models = torch.Generator().manual_seed(0), models_of(drafters[kind])
    options = DecodingOptions(30, sampling, [5], "argmax")
    for prompt in PROMPTS:
        decoded = speculative_decode(target, drafters[kind], prompt, 3, options, generator)
        ids, accept = torch.tensor([[*prompt, *decoded.tokens]]), None
        for model in models:
            best = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
            accept = np.array([float(one == token) for one, token in zip(best, decoded.tokens, strict=True)])
        proposals = proposals_along(without_model(drafters[kind]), prompt, decoded.tokens, 4)
        found = expected_blocks_with_proposals(proposals, decoded.tokens, accept, 3)
        assert found.by_drafted.sum() == len(decoded.blocks)
        by_lengths = np.bincount([len(block.drafted) for block in decoded.blocks], minlength=4)
        # Blocks that begin at one of the last three tokens draft no more than the limit allows.
        assert abs(found.by_drafted - by_lengths).sum() <= 2 * 3
        assert 0 <= found.drafted_by_model - decoded.drafted_by_model <= 1 + 2 + 3
        assert (found.drafted_by_model > 0) <= bool(models)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "mamba"])
@pytest.mark.parametrize("gamma", [1, 3, Adaptive(4, 0.3)])
def test_models_with_states_decode_exactly_beside_a_lookup(kind, gamma):
    """Neither a block of one target call, nor one that the draft model does not read, may change the states."""
    target, prompts = family(kind), [[3, 5, 3, 5, 3], [7]]
    for seed in (0, 1):  # a draft model whose drafts are all right, and another one
        for drafter in (Lookup(), Combined(Lookup(NgramSizes(2, 3)), family(kind, seed))):
            for prompt in prompts:
                options = DecodingOptions(24)
                decoded = speculative_decode(target, drafter, prompt, gamma, options)
                assert decoded.tokens == autoregressive_decode(target, prompt, options).tokens
                if isinstance(drafter, Combined) and seed == 0:
                    assert decoded.drafted_by_model > 0
                    assert max(len(block.emitted) for block in decoded.blocks) > 1
