"""Three estimates of block efficiency agree: by decoding, by its acceptance probabilities, and without decoding."""

import copy
import inspect
import statistics
from itertools import product

import numpy as np
import pytest
import torch

from drafter.decoding.acceptance import RULES
from drafter.decoding.expected_efficiency import acceptance_of_written, expected_blocks, split_rows
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import speculative_decode_batch
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import load_target, load_tokenizer
from drafter.warping import Sampling, warp
from tests.conftest import small_model


def by_simulation(accept, gamma, generator, runs=20_000):
    """Return the mean number of blocks of one sequence, by simulating the acceptance rule in all runs at once."""
    begins, blocks = np.zeros(runs, dtype=int), 0
    padded = np.append(accept, np.zeros(gamma))
    while (active := begins < len(accept)).any():
        blocks += active.sum()
        drafts = np.minimum(begins[:, None] + np.arange(gamma), len(padded) - 1)
        accepted = (generator.random(drafts.shape) < padded[drafts]).cumprod(1).sum(1)
        begins += np.where(active, accepted + 1, 0)
    return blocks / runs


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_the_chain_counts_as_many_blocks_as_simulations_do(gamma):
    generator = np.random.default_rng(0)
    accept = torch.tensor(generator.random((2, 9)))
    found = expected_blocks(accept, torch.tensor([9, 4]), gamma)
    for row, length in ((0, 9), (1, 4)):
        # 20,000 runs of at most 9 blocks: a standard error below 0.02
        assert found[row].item() == pytest.approx(
            by_simulation(accept[row, :length].numpy(), gamma, generator), abs=0.08
        )


@pytest.mark.parametrize(
    ("accept", "length", "gamma", "blocks"), [(1.0, 12, 3, 3), (1.0, 13, 3, 4), (0.0, 7, 3, 7), (1.0, 5, 8, 1)]
)
def test_all_accepted_and_none_accepted_are_exact(accept, length, gamma, blocks):
    found = expected_blocks(torch.full((1, length + 3), accept), torch.tensor([length]), gamma)
    assert found.tolist() == [blocks]


def test_concatenated_values_are_split_into_rows():
    values, lengths = torch.arange(6.0), torch.tensor([2, 0, 3, 1])
    assert split_rows(values, lengths).tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4], [5, 0, 0]]


def test_the_acceptance_probability_of_a_generated_token_is_the_ratio_of_the_warped_probabilities():
    logits_p, logits_q = (torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    tokens = logits_q.argmax(-1)
    found = acceptance_of_written(logits_p, logits_q, tokens, Sampling(0.7))
    p, q = (logits.div(0.7).softmax(-1).gather(-1, tokens[:, None])[:, 0] for logits in (logits_p, logits_q))
    torch.testing.assert_close(found, (p / q).clamp_max(1))
    greedy = acceptance_of_written(logits_p, logits_q, tokens, Sampling(0.0))
    assert greedy.tolist() == (logits_p.argmax(-1) == tokens).float().tolist()


def test_the_rules_argmax_and_match_need_the_drafters_distribution_alone():
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    tokens, p = torch.tensor([0, 3, 7, 1, 2]), warp(logits, Sampling(0.7, 0.8))
    argmax, match = (acceptance_of_written(logits, None, tokens, Sampling(0.7, 0.8), rule) for rule in RULES[1:])
    assert argmax.tolist() == (logits.argmax(-1) == tokens).float().tolist()
    torch.testing.assert_close(match, p[torch.arange(5), tokens])
    with pytest.raises(ValueError, match="the rule 'ratio' needs the target's logits above temperature 0"):
        acceptance_of_written(logits, None, tokens, Sampling(0.7))
    with pytest.raises(ValueError, match="the acceptance rule is 'typical'"):
        acceptance_of_written(logits, logits, tokens, Sampling(0.7), "typical")


@torch.no_grad()
def generate(target, prompts_BT, length, sampling, generator):
    """Sample sequences from the target by full forward passes, independently of the decoders; shape (B, length)."""
    ids_BT = prompts_BT
    for _ in range(length):
        probabilities_BV = warp(target(input_ids=ids_BT).logits[:, -1], sampling)
        ids_BT = torch.cat([ids_BT, torch.multinomial(probabilities_BV, 1, generator=generator)], 1)
    return ids_BT[:, prompts_BT.shape[1] :]


def ratio_and_error(tokens, blocks):
    """Return a ratio of sums over sequences and its standard error, by the delta method."""
    ratio = tokens.sum() / blocks.sum()
    return ratio, np.std(tokens - ratio * blocks) * len(tokens) ** 0.5 / blocks.sum()


@pytest.mark.parametrize(
    ("sampling", "rule"), [(Sampling(), "ratio"), *product([Sampling(1.0), Sampling(0.7, 0.9)], RULES)]
)
@pytest.mark.parametrize("gamma", [1, 3])
def test_three_estimates_of_block_efficiency_agree(sampling, gamma, rule):
    target, drafter = small_model(1, 32, layers=2, sharpness=12.0), small_model(2, sharpness=12.0)
    with torch.no_grad():  # the drafter shares some weights with the target, so that it is accepted now and then
        drafter.lm_head.weight.copy_(target.lm_head.weight[:, :16])
        drafter.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight[:, :16])
    generator, length, stop = torch.Generator().manual_seed(0), 20, 5
    prompts = [[n % 60 + 1, n % 7, 3] for n in range(150)]
    options = DecodingOptions(length, sampling, [stop], rule)
    decoded = speculative_decode_batch(target, drafter, prompts, gamma, options, generator)
    blocks = [block for one in decoded for block in one.blocks]
    measured, error = ratio_and_error(
        np.array([len(one.tokens) for one in decoded]), np.array([len(one.blocks) for one in decoded])
    )

    generated_BL = generate(target, torch.tensor(prompts), length, sampling, generator)
    before_stop_BL = (generated_BL == stop).cumsum(1).roll(1, 1)
    before_stop_BL[:, 0] = 0
    lengths_B = (before_stop_BL == 0).sum(1)
    ids_BT = torch.cat([torch.tensor(prompts), generated_BL], 1)
    p_NV, q_NV = (model(input_ids=ids_BT).logits[:, 2:-1].flatten(0, 1) for model in (drafter, target))
    accept_BL = acceptance_of_written(p_NV, q_NV, generated_BL.flatten(), sampling, rule).view(generated_BL.shape)
    expected_B = expected_blocks(accept_BL, lengths_B, gamma)
    expected, expected_error = ratio_and_error(lengths_B.numpy(), expected_B.numpy())
    assert abs(expected - measured) < 4 * np.hypot(error, expected_error) + 1e-9

    by_probabilities = sum(block.expected for block in blocks) / len(blocks)
    spread = np.std([len(block.emitted) - block.expected for block in blocks])
    assert abs(by_probabilities - measured) < 4 * spread / len(blocks) ** 0.5 + 1e-6
    if sampling.temperature == 0:
        assert expected == pytest.approx(measured)
        assert by_probabilities == pytest.approx(measured)


def noisy(target, level):
    """Return a drafter: the target with normal noise on its matrices, of `level` times their standard deviation."""
    generator, drafter = torch.Generator().manual_seed(0), copy.deepcopy(target)
    with torch.no_grad():
        for weight in drafter.parameters():
            if weight.dim() == 2:
                weight.add_(level * weight.std() * torch.randn(weight.shape, generator=generator))
    return drafter


@pytest.mark.end_to_end
@pytest.mark.parametrize("rule", RULES)
def test_the_chain_and_decoding_agree_within_two_percent_on_real_text(rule):
    """Given the text that decoding writes, the chain has to predict the number of its blocks.

    Both are of the same text, so that their difference has a standard error of about 1%; with `argmax` the text
    determines the blocks, and both are equal.
    """
    target, tokenizer = load_target("assets/tiny-target"), load_tokenizer("assets/tiny-target")
    drafter, sampling, gamma = noisy(target, 0.3), Sampling(0.8), 3
    names = [name for name, value in vars(statistics).items() if inspect.isfunction(value)][:24]
    messages = [[{"role": "user", "content": f"Write the docstring of {name}"}] for name in names]
    prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompts *= 2 if rule == "argmax" else 5
    options = DecodingOptions(32, sampling, end_of_turn_ids("assets/tiny-target", tokenizer), rule)
    decoded = speculative_decode_batch(target, drafter, prompts, gamma, options, torch.Generator().manual_seed(0))
    measured, predicted = np.array([len(one.blocks) for one in decoded]), np.zeros(len(decoded))
    for number, (prompt, one) in enumerate(zip(prompts, decoded, strict=True)):
        ids, start = torch.tensor([[*prompt, *one.tokens]]), len(prompt) - 1
        with torch.no_grad():
            p_NV, q_NV = (model(input_ids=ids).logits[0, start:-1] for model in (drafter, target))
        accept_N = acceptance_of_written(p_NV, q_NV, ids[0, start + 1 :], sampling, rule)
        predicted[number] = expected_blocks(accept_N[None], torch.tensor([len(one.tokens)]), gamma)
    error = np.std(measured - predicted) * len(decoded) ** 0.5 / measured.sum()
    assert error < 0.012
    assert predicted.sum() == pytest.approx(measured.sum(), rel=1e-9 if rule == "argmax" else 0.02)
    expected = sum(block.expected for one in decoded for block in one.blocks)
    assert expected == pytest.approx(sum(len(one.tokens) for one in decoded), rel=0.02)
