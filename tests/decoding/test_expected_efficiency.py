"""The three ways to block efficiency agree: decoding, its accept probabilities, and none of it."""

import numpy as np
import pytest
import torch

from drafter.decoding.expected_efficiency import acceptance_of_written, expected_blocks, split_rows
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from drafter.warping import Sampling
from tests.conftest import small_model


def by_simulation(accept, gamma, generator, runs=20_000):
    """Mean number of blocks of one text, by tossing the coins."""
    total = 0
    for _ in range(runs):
        place = 0
        while place < len(accept):
            accepted = 0
            while accepted < gamma and place + accepted < len(accept):
                if generator.random() >= accept[place + accepted]:
                    break
                accepted += 1
            place += accepted + 1
            total += 1
    return total / runs


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_the_chain_counts_the_blocks_that_coins_count(gamma):
    generator = np.random.default_rng(0)
    accept = torch.tensor(generator.random((2, 9)))
    found = expected_blocks(accept, torch.tensor([9, 4]), gamma)
    for row, length in ((0, 9), (1, 4)):
        # 20,000 runs of at most 9 blocks: a standard error below 0.02
        assert found[row].item() == pytest.approx(by_simulation(accept[row, :length], gamma, generator), abs=0.08)


@pytest.mark.parametrize(
    ("accept", "length", "gamma", "blocks"), [(1.0, 12, 3, 3), (1.0, 13, 3, 4), (0.0, 7, 3, 7), (1.0, 5, 8, 1)]
)
def test_all_accepted_and_none_accepted_are_exact(accept, length, gamma, blocks):
    found = expected_blocks(torch.full((1, length + 3), accept), torch.tensor([length]), gamma)
    assert found.tolist() == [blocks]


def test_rows_follow_each_other():
    values, lengths = torch.arange(6.0), torch.tensor([2, 0, 3, 1])
    assert split_rows(values, lengths).tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4], [5, 0, 0]]


def test_the_acceptance_of_a_written_token_is_the_ratio_of_the_warped_probabilities():
    logits_p, logits_q = (torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    tokens = logits_q.argmax(-1)
    found = acceptance_of_written(logits_p, logits_q, tokens, Sampling(0.7))
    p, q = (logits.div(0.7).softmax(-1).gather(-1, tokens[:, None])[:, 0] for logits in (logits_p, logits_q))
    torch.testing.assert_close(found, (p / q).clamp_max(1))
    greedy = acceptance_of_written(logits_p, logits_q, tokens, Sampling(0.0))
    assert greedy.tolist() == (logits_p.argmax(-1) == tokens).float().tolist()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 0.9)])
@pytest.mark.parametrize("gamma", [1, 3])
def test_decoding_its_chances_and_no_decoding_give_one_block_efficiency(sampling, gamma):
    target, drafter = small_model(1, 32, layers=2, sharpness=12.0), small_model(2, sharpness=12.0)
    with torch.no_grad():  # a drafter that knows something of the target
        drafter.lm_head.weight.copy_(target.lm_head.weight[:, :16])
        drafter.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight[:, :16])
    generator, prompts = torch.Generator().manual_seed(0), [[n % 60 + 1, n % 7, 3] for n in range(150)]
    decoded = [speculative_decode(target, drafter, p, gamma, 20, sampling, [5], generator) for p in prompts]
    tokens = np.array([len(one.tokens) for one in decoded])
    calls = np.array([len(one.blocks) for one in decoded])
    written = [autoregressive_decode(target, p, 20, sampling, [5], generator).tokens for p in prompts]
    accept = []
    for prompt, text in zip(prompts, written, strict=True):
        ids = torch.tensor([[*prompt, *text]])
        p, q = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] for model in (drafter, target))
        accept.append(acceptance_of_written(p, q, torch.tensor(text), sampling))
    lengths = torch.tensor([len(text) for text in written])
    blocks = expected_blocks(split_rows(torch.cat(accept), lengths), lengths, gamma).numpy()
    lengths = lengths.numpy()
    ours, theirs = lengths.sum() / blocks.sum(), tokens.sum() / calls.sum()
    # Standard errors of the two ratios, by the delta method.
    errors = [
        np.std(a - ratio * b) * len(a) ** 0.5 / b.sum()
        for a, b, ratio in ((lengths, blocks, ours), (tokens, calls, theirs))
    ]
    assert abs(ours - theirs) < 4 * np.hypot(*errors) + 1e-9
    expected = sum(block.expected for one in decoded for block in one.blocks) / calls.sum()
    spread = np.std([len(block.emitted) - block.expected for one in decoded for block in one.blocks])
    assert abs(expected - theirs) < 4 * spread / calls.sum() ** 0.5 + 1e-6
    if sampling.temperature == 0:
        assert ours == pytest.approx(theirs)
        assert expected == pytest.approx(theirs)
