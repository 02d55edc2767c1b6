"""Trimmed output embeddings: their logits, lossless decoding with them, and how they are stored and loaded."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch

from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode, speculative_decode_batch
from drafter.models.compatibility import load_drafter
from drafter.models.inspection import num_parameters, vocabulary_rows
from drafter.models.trimming import KEPT, TrimmedHead, most_used, read_kept, trim, write_kept
from drafter.warping import Sampling, warp
from tests.conftest import VOCABULARY, save_target, small_model


def test_the_most_used_tokens_come_first_and_ties_by_id():
    assert most_used([[3, 3, 1], [1, 3, 0]], 5).tolist() == [3, 1, 0, 2, 4]


@pytest.mark.parametrize("tied", [True, False])
def test_a_trimmed_head_keeps_the_logits_of_the_kept_tokens_alone(tied):
    full = small_model(seed=3)
    full.config.tie_word_embeddings = tied
    if tied:
        full.lm_head.weight = full.model.embed_tokens.weight
    kept = [5, 2, 60]
    trimmed = trim(copy.deepcopy(full), kept)
    ids = torch.arange(20)[None]
    ours, theirs = trimmed(input_ids=ids).logits, full(input_ids=ids).logits
    torch.testing.assert_close(ours[..., sorted(kept)], theirs[..., sorted(kept)], rtol=0, atol=1e-6)
    others = [token for token in range(VOCABULARY) if token not in kept]
    assert (ours[..., others] == -torch.inf).all()
    assert vocabulary_rows(trimmed) == VOCABULARY
    # Rows that the head has lost do not count, even if the tied input embedding still has them.
    hidden = full.config.hidden_size
    assert num_parameters(trimmed) == num_parameters(full) - (VOCABULARY - 3) * hidden


@pytest.mark.parametrize("kept", [[], [-1], [VOCABULARY]])
def test_no_tokens_and_ids_outside_the_vocabulary_are_refused(kept):
    with pytest.raises(ValueError, match=f"ids below {VOCABULARY}"):
        trim(small_model(), kept)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9)])
def test_a_trimmed_drafter_drafts_kept_tokens_alone_and_greedy_output_is_the_targets(target, drafter, sampling):
    kept = list(range(0, VOCABULARY, 3))
    trimmed = trim(copy.deepcopy(drafter), kept)
    options, generator = DecodingOptions(30, sampling), torch.Generator().manual_seed(0)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    alone = [speculative_decode(target, trimmed, prompt, 3, options, generator) for prompt in prompts]
    together = speculative_decode_batch(target, trimmed, prompts, 3, options, generator)
    drafted = {token for one in [*alone, *together] for block in one.blocks for token in block.drafted}
    assert drafted
    assert drafted <= set(kept)
    if sampling.temperature == 0:
        wanted = [autoregressive_decode(target, prompt, options).tokens for prompt in prompts]
        assert [one.tokens for one in alone] == [one.tokens for one in together] == wanted


def test_sampled_tokens_have_the_targets_distribution_with_a_trimmed_drafter(target, drafter):
    # 10,000 first tokens, each drafted and verified, against the target's distribution: chi-square at 1 in 10,000.
    count = 10_000
    trimmed = trim(copy.deepcopy(drafter), range(0, VOCABULARY, 2))
    sampling, generator = Sampling(temperature=3.0, top_p=1.0), torch.Generator().manual_seed(1)
    decoded = speculative_decode_batch(target, trimmed, [[1, 2, 3]] * count, 2, DecodingOptions(2, sampling), generator)
    assert all(one.blocks[0].tested for one in decoded)
    counts = np.bincount([one.tokens[0] for one in decoded], minlength=VOCABULARY)
    probabilities = warp(target(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1:], sampling)[0].double().numpy()
    often = probabilities * count >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = count * np.append(probabilities[often], probabilities[~often].sum())
    statistic = ((observed - expected) ** 2 / expected)[expected > 0].sum()
    degrees = (expected > 0).sum() - 1
    assert degrees >= 3
    assert statistic < degrees + 4 * np.sqrt(2 * degrees) + 8  # above the 99.99th percentile for these degrees


def test_a_trimmed_drafter_is_loaded_trimmed(tmp_path):
    save_target(tmp_path / "target")
    shutil.copytree(tmp_path / "target", tmp_path / "drafter")
    assert read_kept(tmp_path / "drafter") is None
    write_kept(tmp_path / "drafter", np.array([7, 3]))
    assert json.loads((tmp_path / "drafter" / KEPT).read_text()) == read_kept(tmp_path / "drafter") == [3, 7]
    head = load_drafter(str(tmp_path / "drafter"), str(tmp_path / "target")).get_output_embeddings()
    assert isinstance(head, TrimmedHead)
    assert head.kept_K.tolist() == [3, 7]
