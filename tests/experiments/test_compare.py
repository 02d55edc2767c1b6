"""The command `compare`: its counts are those of decoding, and what it refuses."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch

from drafter.artifacts.manifest import ArtifactError, read_jsonl, read_manifest
from drafter.artifacts.rows import Rows
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import speculative_decode
from drafter.models.loading import load_target
from drafter.warping import Sampling, warp
from experiments import compare
from experiments.running.comparing import expected_counts
from tests.experiments.test_pipeline import snapshot, stage

pytestmark = pytest.mark.end_to_end
SETTINGS = ["compare.num_speculative_tokens=[1,3]", "compare.acceptance_rules=[ratio,argmax,match]"]


@pytest.fixture(scope="module")
def judged(world):
    """Write responses of the target to compare drafters on, with its distributions in float32."""
    overrides, root = world
    stage("respond", [*overrides, "distillation=judged"])
    stage("cache", [*overrides, "distillation=judged", "cache.format.dtype=float32"])
    yield overrides, root
    for name in ("responses-judged", "cache-judged"):  # other tests use the same root
        shutil.rmtree(root / name)


@pytest.fixture(scope="module")
def compared(judged, tmp_path_factory):
    overrides, root = judged
    out, start = tmp_path_factory.mktemp("compared") / "compare", root / "drafter"
    drafters = [str(start), f"{root}/finetune/*", "ngram4-4", f"ngram4-4+{root}/finetune/kld-seed1", "layers1"]
    arguments = [*overrides, *SETTINGS, f"out={out}", f"drafters={drafters}"]
    stage("compare", arguments)
    return arguments, root, out


def rows_of(out, label):
    return read_jsonl(out / label / "counts.jsonl")


def test_each_instruction_is_answered_at_each_temperature(judged):
    _, root = judged
    asked = [(row["id"], round(float(row["temperature"]), 2)) for row in Rows(root / "responses-judged", "respond")]
    wanted = {(name, temperature) for name, _ in asked for temperature in (0.0, 0.6, 1.0)}
    counts = read_manifest(root / "responses-judged", "respond")["counts"]
    assert len(asked) == len(set(asked)) == len(wanted) - sum(counts["failed"].values())
    assert set(asked) <= wanted
    assert {row["split"] for row in Rows(root / "responses-judged", "respond")} == {"validation"}


def test_greedy_counts_are_the_calls_of_decoding(compared, judged):
    _, root, out = compared
    target, drafter = (load_target(str(path)) for path in (root.parent / "target", root / "drafter"))
    cache = Rows(root / "cache-judged", "cache")
    counts = {(row["prompt"], row["gamma"]): row for row in rows_of(out, "drafter") if row["temperature"] == 0}
    checked = 0
    for row in cache:
        if row["temperature"] > 0:
            continue
        for gamma in (1, 3):
            options = DecodingOptions(len(row["response_ids"]), Sampling(0.0))
            decoded = speculative_decode(target, drafter, row["prompt_ids"].tolist(), gamma, options)
            assert decoded.tokens == row["response_ids"].tolist()
            assert counts[row["id"], gamma]["blocks"] == len(decoded.blocks)
            checked += 1
    assert checked > 10


def test_sampled_counts_follow_the_rules(compared):
    """With γ = 1 a block is begun at the next token with the probability that the one before was not accepted."""
    _, root, out = compared
    target, drafter = (load_target(str(path)) for path in (root.parent / "target", root / "drafter"))
    rows = [row for row in rows_of(out, "drafter") if row["gamma"] == 1 and row["temperature"] > 0]
    expected = []
    for row in (row for row in Rows(root / "cache-judged", "cache") if row["temperature"] > 0):
        ids = torch.tensor([[*row["prompt_ids"].tolist(), *row["response_ids"].tolist()]])
        first, tokens = len(row["prompt_ids"]) - 1, torch.from_numpy(row["response_ids"].copy()).long()
        sampling = Sampling(round(float(row["temperature"]), 6))
        with torch.inference_mode():
            p_LV, q_LV = (model(ids).logits[0, first:-1] for model in (drafter, target))
        p, q = (warp(logits, sampling).gather(-1, tokens[:, None])[:, 0] for logits in (p_LV, q_LV))
        accepts = {"ratio": (p / q).clamp(max=1), "argmax": (p_LV.argmax(-1) == tokens).float(), "match": p}
        for rule, accept in accepts.items():
            blocks, begins = 0.0, 1.0
            for accepted in accept.tolist():
                blocks += begins
                begins = 1 - begins * accepted
            expected.append((row["id"], sampling.temperature, rule, blocks))
    found = [(row["prompt"], row["temperature"], row["rule"], row["blocks"]) for row in rows]
    assert len(found) == len(expected) > 30
    for ours, theirs in zip(sorted(found), sorted(expected), strict=True):
        assert ours[:3] == theirs[:3]
        # the cached states pass through the output embedding alone, in another order of float32 sums
        assert ours[3] == pytest.approx(theirs[3], rel=1e-4)


def test_drafters_without_a_model_are_compared_too(compared):
    _, _, out = compared
    lookup, combined = (
        sum(row["blocks"] for row in rows_of(out, label) if row["gamma"] == 3 and row.get("rule") == "match")
        for label in ("ngram4-4", "ngram4-4+kld-seed1")
    )
    tokens = sum(row["tokens"] for row in rows_of(out, "drafter") if row["gamma"] == 3 and row.get("rule") == "match")
    assert 0 < lookup <= tokens
    assert 0 < combined <= tokens
    assert combined != lookup
    assert sum(row["blocks"] for row in rows_of(out, "layers1")) > 0


def test_the_page_and_a_second_run(compared):
    arguments, root, out = compared
    page = (out / "compare.md").read_text()
    for text in ("## Expected τ, γ = 1", "## Difference of expected τ to kld, γ = 3", "`argmax`", "| layers1 |"):
        assert text in page
    responses = Rows(root / "cache-judged", "cache")
    assert f"{len(responses)} responses, with top-p 1 above T = 0: " in page
    runs = json.loads((out / "runs.json").read_text())
    assert {"kld-seed1", "drafter"} <= {Path(run).name for run in runs}
    assert str(root / "finetune" / "kld-seed1") in runs
    assert str(root / "drafter") in runs
    assert read_manifest(out / "kld-seed1", "compare")["counts"]["series"] == "kld"
    before = {path: state for path, state in snapshot(out).items() if path.name in ("counts.jsonl", "manifest.json")}
    stage("compare", [*arguments, "compare.yardsticks=[pretrained]"])
    assert "Difference of expected τ to pretrained" in (out / "compare.md").read_text()
    assert before == {path: state for path, state in snapshot(out).items() if path in before}


def test_what_it_cannot_say_is_refused(judged, tmp_path):
    overrides, root = judged
    start = f"drafters=[{root}/drafter]"
    stage(
        "cache", [*overrides, "distillation=judged", "cache=sparse", "cache.format.top_k=4", f"out={tmp_path}/sparse"]
    )
    sparse = [*overrides, start, f"inputs.cache={tmp_path}/sparse", f"out={tmp_path}/compare"]
    with pytest.raises(ValueError, match=r"acceptance_rules=\[argmax,match\]"):
        stage("compare", sparse)
    stage("compare", [*sparse, "compare.acceptance_rules=[argmax]"])
    with pytest.raises(ArtifactError, match="acceptance_rules"):
        stage("compare", [*sparse, "compare.acceptance_rules=[match]"])
    with pytest.raises(ArtifactError, match="compared with other settings"):
        stage("compare", [*sparse, "drafters=[ngram]", "compare.acceptance_rules=[match]"])
    with pytest.raises(ArtifactError, match=r"compared with other settings .*'target_dtype': 'float64'"):
        stage("compare", [*sparse, "compare.acceptance_rules=[argmax]", "target.dtype=float64"])
    assert not (tmp_path / "compare" / "ngram").exists()
    with pytest.raises(ValueError, match="whole numbers"):
        stage("compare", [*overrides, start, "compare.num_speculative_tokens=[adaptive]", f"out={tmp_path}/new"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_speculative_tokens=3", "num_speculative_tokens is 3, must be a list"),
        ("num_speculative_tokens=[]", r"num_speculative_tokens is \[\], must be a list of at least one"),
        ("num_speculative_tokens=[3,3]", r"num_speculative_tokens is \[3, 3\], .* each once"),
        ("num_speculative_tokens=[0]", "is 0, must be at least 1"),
        ("acceptance_rules=argmax", "the acceptance rules are 'argmax'"),
        ("acceptance_rules=[typical]", "the acceptance rule is 'typical'"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_settings_that_are_no_lists_or_out_of_range_are_refused(world, tmp_path, command, setting, message):
    overrides, _ = world
    with pytest.raises(ValueError, match=message):
        stage(command, [*overrides, f"{command}.{setting}", f"out={tmp_path}/new"])
    assert not (tmp_path / "new").exists()


def test_responses_that_the_target_did_not_write_or_that_drafters_were_trained_on_are_refused(world, tmp_path):
    overrides, root = world
    assert read_manifest(root / "cache", "cache")["counts"]["by"] == "target"
    start, out = f"drafters=[{root}/drafter,ngram]", tmp_path / "compare"
    for name, settings, message in (
        ("drafter", ["distillation.splits=[validation]"], "cache-drafter has responses by the drafter, .*inputs.cache"),
        ("greedy", ["respond.num_responses=10"], "cache-greedy has no responses to validation instructions"),
    ):
        shared = [*overrides, f"distillation={name}"]
        stage("respond", [*shared, *settings, f"out={tmp_path}/responses"])
        stage("cache", [*shared, f"inputs.responses={tmp_path}/responses", f"out={tmp_path}/cache-{name}"])
        with pytest.raises(ArtifactError, match=message):
            stage("compare", [*overrides, start, f"inputs.cache={tmp_path}/cache-{name}", f"out={out}"])
        assert not out.exists()
        shutil.rmtree(tmp_path / "responses")


def test_responses_of_another_top_p_are_judged_with_it(world, tmp_path):
    overrides, root = world
    stage(
        "compare", [*overrides, f"drafters=[{root}/drafter]", f"inputs.cache={root}/cache", f"out={tmp_path}/compare"]
    )
    assert "responses, with top-p 0.95 above T = 0" in (tmp_path / "compare" / "compare.md").read_text()


def test_an_interrupted_comparison_goes_on_with_the_drafters_it_has_not_counted(judged, tmp_path, monkeypatch):
    overrides, root = judged
    out, seen = tmp_path / "compare", []
    arguments = [*overrides, f"drafters=[{root}/drafter,{root}/finetune/kld-seed1]", f"out={out}"]

    def killed(drafter, *given):
        if drafter not in seen:
            seen.append(drafter)
        if len(seen) == 2:
            raise RuntimeError("killed")
        return expected_counts(drafter, *given)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "expected_counts", killed)
        with pytest.raises(RuntimeError, match="killed"):
            stage("compare", arguments)
    gc.collect()  # the locks of the stages end with them
    first = out / "drafter" / "counts.jsonl"
    before = first.stat().st_mtime_ns
    assert not list(out.glob("*/manifest.json"))
    stage("compare", arguments)
    assert first.stat().st_mtime_ns == before
    assert {path.parent.name for path in out.glob("*/manifest.json")} == {"drafter", "kld-seed1"}
