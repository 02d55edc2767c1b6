import copy
import json

import numpy as np
import pytest
import torch

from drafter.artifacts.manifest import read_manifest
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode, speculative_decode_batch
from drafter.models.compatibility import load_drafter
from drafter.models.inspection import num_parameters, vocabulary_rows
from drafter.models.trimming import KEPT, TrimmedHead, most_used, read_kept, trim, write_kept
from drafter.warping import Sampling, warp
from tests.conftest import VOCABULARY, small_model
from tests.experiments.test_pipeline import stage


def test_the_most_used_tokens_come_first_and_ties_by_id():
    assert most_used([[3, 3, 1], [1, 3, 0]], 5).tolist() == [3, 1, 0, 2, 4]


@pytest.mark.parametrize("tied", [True, False])
def test_a_trimmed_head_scores_what_it_kept_as_before_and_nothing_else(tied):
    whole = small_model(seed=3)
    whole.config.tie_word_embeddings = tied
    if tied:
        whole.lm_head.weight = whole.model.embed_tokens.weight
    kept = [5, 2, 60]
    trimmed = trim(copy.deepcopy(whole), kept)
    ids = torch.arange(20)[None]
    ours, theirs = trimmed(input_ids=ids).logits, whole(input_ids=ids).logits
    torch.testing.assert_close(ours[..., sorted(kept)], theirs[..., sorted(kept)], rtol=0, atol=1e-6)
    others = [token for token in range(VOCABULARY) if token not in kept]
    assert (ours[..., others] == -torch.inf).all()
    assert vocabulary_rows(trimmed) == VOCABULARY
    # c counts no row that the head lost, whether or not the table that it was cut from is still looked up.
    hidden = whole.config.hidden_size
    assert num_parameters(trimmed) == num_parameters(whole) - (VOCABULARY - 3) * hidden


@pytest.mark.parametrize("kept", [[], [-1], [VOCABULARY]])
def test_tokens_that_are_none_of_the_model_are_refused(kept):
    with pytest.raises(ValueError, match=f"ids below {VOCABULARY}"):
        trim(small_model(), kept)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9)])
def test_a_trimmed_drafter_drafts_only_what_it_kept_and_greedy_text_is_the_targets(target, drafter, sampling):
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


def test_sampled_text_has_the_targets_distribution_with_a_trimmed_drafter(target, drafter):
    # 3,000 first tokens, each drafted and tested, against the target's own distribution; chi-square at 1 in 10,000.
    trimmed = trim(copy.deepcopy(drafter), range(0, VOCABULARY, 2))
    sampling, generator = Sampling(temperature=3.0, top_p=1.0), torch.Generator().manual_seed(1)
    counts = np.zeros(VOCABULARY)
    for _ in range(3000):
        counts[
            speculative_decode(target, trimmed, [1, 2, 3], 2, DecodingOptions(2, sampling), generator).tokens[0]
        ] += 1
    wanted = warp(target(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1:], sampling)[0].double().numpy()
    often = wanted * 3000 >= 5
    observed, expected = np.append(counts[often], counts[~often].sum()), np.append(wanted[often], wanted[~often].sum())
    kept = expected > 0
    statistic = ((observed[kept] - 3000 * expected[kept]) ** 2 / (3000 * expected[kept])).sum()
    degrees = kept.sum() - 1
    assert degrees >= 3
    assert statistic < degrees + 4 * np.sqrt(2 * degrees) + 8  # above the 99.99th percentile for these degrees


def test_a_trimmed_drafter_is_loaded_trimmed(tmp_path, world):
    _, root = world
    drafter, target = root / "finetune" / "kld-seed1", read_manifest(root / "finetune" / "kld-seed1", "finetune")
    model = load_drafter(str(drafter), target["config"]["target"]["path"])
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((drafter / name).read_bytes())
    assert read_kept(tmp_path) is None
    write_kept(tmp_path, np.array([7, 3]))
    assert json.loads((tmp_path / KEPT).read_text()) == read_kept(tmp_path) == [3, 7]
    trimmed = load_drafter(str(tmp_path), target["config"]["target"]["path"])
    assert isinstance(trimmed.get_output_embeddings(), TrimmedHead)
    assert trimmed.get_output_embeddings().kept_K.tolist() == [3, 7]


@pytest.fixture(scope="module")
def trimmed(world, tmp_path_factory):
    overrides, root = world
    out = tmp_path_factory.mktemp("trim")
    drafter = root / "finetune" / "kld-seed1"
    command = [*overrides, f"out={out}", f"trim.drafter={drafter}", "trim.sizes=[4,12]"]
    stage("trim", command)
    return command, out / drafter.name


def test_the_stage_writes_a_drafter_a_table_and_a_figure(trimmed):
    _, out = trimmed
    rows = [json.loads(line) for line in (out / "trim.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [4, 12, 24]
    ratios, coverage = ([row[name] for row in rows] for name in ("size_ratio", "coverage"))
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1]
    assert coverage == sorted(coverage)
    assert coverage[-1] == 1
    for row in rows:
        assert row["speedup"][0] == pytest.approx(row["block_efficiency"][0] / (1 + 3 * row["size_ratio"]))
    for row in rows[:-1]:
        assert row["gain"][0] == pytest.approx(row["speedup"][0] - rows[-1]["speedup"][0])
    assert rows[-1]["gain"] is None
    best = max(rows, key=lambda row: row["speedup"][0])["tokens"]
    assert (read_kept(out) is None) if best == 24 else (len(read_kept(out)) == best)
    assert (out / "trim.png").exists()
    assert f"| {rows[0]['tokens']} |" in (out / "trim.md").read_text()


def test_the_trimmed_drafter_is_evaluated_under_its_own_name(trimmed, tmp_path):
    command, out = trimmed
    kept = [one for one in command if not one.startswith(("out=", "trim."))]
    stage("evaluate", [*kept, f"out={tmp_path}", f"drafters=['{out}']"])
    counts = read_manifest(tmp_path / out.name, "evaluate")["counts"]
    assert (counts["series"], counts["loss"], counts["seed"]) == ("kld-trimmed", "kld", 1)
    assert counts["greedy_outputs_unlike_the_target"] == 0 < counts["greedy_outputs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trim.sizes=[]", "trim.sizes is"),
        ("trim.sizes=[0]", "trim.sizes is"),
        ("trim.drafter={out}", "trimmed already"),
    ],
)
def test_bad_input_is_refused(trimmed, tmp_path, change, message):
    command, _ = trimmed
    if "{out}" in change:
        write_kept(tmp_path, [1])
    with pytest.raises(ValueError, match=message):
        stage("trim", [*command, f"out={tmp_path}/new", change.format(out=tmp_path)])


def test_a_trimmed_drafter_is_not_finetuned(world, trimmed, tmp_path):
    overrides, root = world
    (tmp_path / "start").mkdir()
    for path in (root / "drafter").iterdir():
        if path.is_file():
            (tmp_path / "start" / path.name).write_bytes(path.read_bytes())
    write_kept(tmp_path / "start", [1, 2])
    with pytest.raises(ValueError, match="trimmed"):
        stage("finetune", [*overrides, f"inputs.drafter={tmp_path}/start", f"out={tmp_path}/out"])
