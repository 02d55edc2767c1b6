"""Tests of all stages, through their entry points, on a pair that is not that of the embedded default.

The target is a GPT-2 with learned positions and a word-level tokenizer without chat template; the data are local files.
"""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from transformers import AutoConfig, AutoModelForCausalLM

from drafter.artifacts.manifest import ArtifactError, read_jsonl, write_jsonl
from drafter.models.compatibility import VocabularyError
from drafter.models.fingerprints import model_fingerprint
from experiments.pipeline import main
from experiments.running.composing import configured
from tests.conftest import WORDS, save_target


def stage(name, overrides):
    from hydra import initialize_config_module

    with initialize_config_module("conf", version_base="1.3"):
        import_module(f"experiments.{name}").main(configured(name, overrides))


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path(folder).rglob("*") if path.is_file()}


def test_every_stage_leaves_a_finished_directory(world):
    _, root = world
    finished = {str(path.parent.relative_to(root)) for path in root.rglob("manifest.json")}
    assert finished == {
        "data", "drafter", "responses", "cache", "finetune/kld-seed1", "finetune/tvdpp-seed1",
        "evaluate/drafter", "evaluate/kld-seed1", "evaluate/tvdpp-seed1", "evaluate/ngram",
    }  # fmt: skip


def test_counts_add_up_and_greedy_text_equals_the_targets(world):
    _, root = world
    for name in ("drafter", "kld-seed1", "tvdpp-seed1", "ngram"):
        rows = read_jsonl(root / "evaluate" / name / "counts.jsonl")
        assert {(row["task"], row["gamma"]) for row in rows} == {(t, g) for t in ("prompts", "sampled") for g in (3, 5)}
        for row in rows:
            assert row["target_calls"] <= row["tokens"] <= row["accepted"] + row["target_calls"]
            assert row["accepted"] <= row["tested"]
        summary = json.loads((root / "evaluate" / name / "manifest.json").read_text())["counts"]
        assert summary["greedy_outputs"] == sum(row["task"] == "prompts" for row in rows) > 0
        assert summary["greedy_outputs_unlike_the_target"] == 0


def test_the_report_is_written(world):
    _, root = world
    assert "| prompts | tvdpp |" in (root / "report" / "results.md").read_text()
    assert "<svg" in (root / "report" / "report.html").read_text()
    assert (root / "report" / "figures" / "curves.png").stat().st_size > 10_000


def test_finetuning_logs_the_metrics_shared_by_all_losses_from_step_zero(world):
    _, root = world
    header, *lines = (root / "finetune" / "kld-seed1" / "logs" / "metrics.csv").read_text().splitlines()
    for name in ("train/loss", "val/kld", "val/tvd", "val/acceptance_rate"):
        assert name in header.split(",")
    steps = [line.split(",")[header.split(",").index("step")] for line in lines]
    assert steps[0] == "0"
    assert steps[-1] == "6"


def test_the_drafter_has_the_targets_padded_vocabulary(world):
    _, root = world
    drafter = AutoModelForCausalLM.from_pretrained(root / "finetune" / "kld-seed1")
    assert drafter.get_output_embeddings().weight.shape[0] == 24


def test_a_second_run_changes_no_artifact(world):
    overrides, root = world
    before = {path: what for path, what in snapshot(root).items() if "report" not in path.parts}
    main([*overrides, "losses=[kld,tvdpp]", "seeds=[1]"])
    after = {path: what for path, what in snapshot(root).items() if "report" not in path.parts}
    assert after == before


def test_manifests_have_the_stop_ids(world):
    _, root = world
    for path in ("responses", "evaluate/drafter", "evaluate/kld-seed1"):
        assert json.loads((root / path / "manifest.json").read_text())["counts"]["stop_ids"] == [0]


@pytest.mark.parametrize("key", ["inputs.cache", "inputs.validation"])
def test_an_exact_cache_of_another_output_embedding_is_refused(world, tmp_path, key):
    overrides, root = world
    shutil.copytree(root / "cache", tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    manifest["counts"]["output_embedding"] = "0" * 16
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"cache was made with the output embedding 0{16}, but this run's"):
        stage("finetune", [*overrides, f"{key}={tmp_path}/cache", f"out={tmp_path}/out", "loss=kld"])


def test_a_cached_and_a_live_target_train_the_same_drafter(world):
    overrides, root = world
    exact = [*overrides, f"inputs.cache={root}/cache32", "name=cached", "finetune.max_steps=3"]
    stage("cache", [*overrides, f"out={root}/cache32", "cache.format.dtype=float32"])
    stage("finetune", [*exact, "loss=kld"])
    stage("finetune", [*overrides, "inputs.cache=null", "name=live", "finetune.max_steps=3", "loss=kld"])
    cached, live = (
        AutoModelForCausalLM.from_pretrained(root / "finetune" / name).state_dict() for name in ("cached", "live")
    )
    for key in cached:
        # The states are the same but for rounding: one run computes them in a padded batch of another width.
        torch.testing.assert_close(cached[key], live[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        ["loss=block", "weighting=dpace"],
        ["loss=kld_nla", "weighting=adaspec", "weighting.reference={root}/finetune/kld-seed1"],
        ["loss=e2e_tvd", "inputs.cache=null"],
        ["loss=tvdpp", "loss.estimator=sampled", "loss.statistics=position"],
    ],
    ids=lambda how: " ".join(how[:2]),
)
def test_every_kind_of_objective_trains(world, tmp_path, how):
    overrides, root = world
    how = [part.format(root=root) for part in how]
    stage("finetune", [*overrides, f"out={tmp_path}/out", "finetune.max_steps=3", *how])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert 0 < manifest["counts"]["val/acceptance_rate"] < 1
    assert bool(manifest["inputs"].get("reference")) == ("weighting=adaspec" in how)
    before = AutoModelForCausalLM.from_pretrained(root / "drafter").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in after if after[key].ndim > 1)


def test_an_interrupted_evaluation_with_adaptive_drafts_continues(world, tmp_path):
    overrides, root = world
    command = [*overrides, f"out={tmp_path}/out", f"drafters=[{root}/drafter,{root}/finetune/kld-seed1]"]
    command += ["evaluate.num_speculative_tokens=[2,adaptive]"]
    stage("evaluate", command)
    rows = {name: read_jsonl(tmp_path / "out" / name / "counts.jsonl") for name in ("drafter", "kld-seed1")}
    for found in rows.values():
        assert {row["gamma"] for row in found} == {2, "adaptive"}
        for row in found:
            accepted, tested = row["by_position"]
            assert (sum(accepted), sum(tested)) == (row["accepted"], row["tested"])
            assert 0 < row["drafting_seconds"] + row["verifying_seconds"] <= row["seconds"]
    # The baseline was decoded once for both.
    times = [[row["baseline_seconds"] for row in found] for found in rows.values()]
    assert times[0] == times[1]
    for path in (tmp_path / "out" / "drafter" / "manifest.json", tmp_path / "out" / "drafter" / "counts.jsonl"):
        path.unlink()
    settings = json.loads((tmp_path / "out" / "kld-seed1" / "manifest.json").read_text())
    settings["inputs"]["drafter"] = model_fingerprint(str(root / "drafter"))
    (tmp_path / "out" / "drafter" / "started.json").write_text(json.dumps(settings))
    part = [{**row, "message": "kept", "blocks": []} for row in rows["drafter"]]
    write_jsonl(tmp_path / "out" / "drafter" / "part-00000.jsonl", part)
    stage("evaluate", command)
    assert read_jsonl(tmp_path / "out" / "drafter" / "counts.jsonl") == rows["drafter"]
    assert read_jsonl(tmp_path / "out" / "drafter" / "samples.jsonl")[0]["message"] == "kept"


def test_the_gamma_report_names_the_best_gamma_of_each_task(world, tmp_path):
    overrides, root = world
    how = [f"gamma.drafter={root}/finetune/kld-seed1", "gamma.largest=3", "gamma.prompts_per_task=3"]
    stage("gamma", [*overrides, *how, f"out={tmp_path}/gamma"])
    folder = tmp_path / "gamma" / "kld-seed1"
    page = (folder / "gamma.md").read_text()
    for task in ("prompts", "sampled"):
        section = page.split(f"## {task}\n\n")[1]
        assert section.startswith(("No γ pays on this machine", "γ = "))
        assert section.count("\n| ") >= 4
    assert (folder / "gamma.png").stat().st_size > 10_000
    rows = [row for row in read_jsonl(folder / "gamma.jsonl") if row["task"] == "prompts"]
    counts = [row for row in read_jsonl(folder / "counts.jsonl") if row["task"] == "prompts"]
    for row in rows:  # in greedy decoding the expected block efficiency equals the measured one
        decoded = [one for one in counts if one["gamma"] == row["gamma"]]
        tokens, calls = (sum(one[name] for one in decoded) for name in ("tokens", "target_calls"))
        assert row["block_efficiency"] == pytest.approx(tokens / calls)


def test_gammas_that_are_not_decoded_are_predicted_and_calls_are_compiled_for_the_decoded_and_the_largest(
    world, tmp_path, monkeypatch
):
    overrides, root = world
    widths = set()

    def compiled(function, **_):
        return lambda ids: widths.add(ids.shape[1]) or function(ids)

    monkeypatch.setattr(torch, "compile", compiled)
    how = ["gamma.largest=3", "gamma.decode=[2]", "gamma.compile=true", "gamma.prompts_per_task=2"]
    stage("gamma", [*overrides, f"gamma.drafter={root}/finetune/kld-seed1", *how, f"out={tmp_path}/gamma"])
    rows = read_jsonl(tmp_path / "gamma" / "kld-seed1" / "gamma.jsonl")
    assert [(row["gamma"], row["measured"] is not None) for row in rows] == [(1, False), (2, True), (3, False)] * 2
    assert widths == {1, 2, 3, 4}  # one token, a block with γ = 2 or 3, and the drafter's two after a block
    page = (tmp_path / "gamma" / "kld-seed1" / "gamma.md").read_text()
    assert "padded where that is faster on this machine: 2 to 3 tokens" in page
    assert page.count("γ = 2") == 2


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("gamma", "gamma.decode=[0]", ValueError, r"gamma.decode is \[0\], must be null or some of 1 to gamma.larg"),
        ("gamma", "gamma.decode=[9]", ValueError, r"gamma.decode is \[9\], must be null or some of 1 to gamma.larg"),
        ("evaluate", "evaluate.num_speculative_tokens=[3,many]", ValueError, "has 'many': numbers and 'adaptive'"),
        ("gamma", "gamma.largest=0", ValueError, "gamma.largest is 0"),
        ("respond", "respond.top_p=0.5", ArtifactError, "settings.top_p: found 0.95, requested 0.5"),
        ("pretrain", "seed=7", ArtifactError, "settings.seed: found 0, requested 7"),
        ("respond", "inputs.data=nowhere", ArtifactError, "nowhere holds no finished 'prepare'"),
        ("respond", "target.path={other}", ArtifactError, "was made with the tokenizer"),
        ("cache", "target.path={reseeded}", ArtifactError, "was made with the target"),
        ("finetune", "target.path={reseeded}", ArtifactError, "was made with the target"),
        ("evaluate", "drafters=[{stranger}]", VocabularyError, r"'\?' as id 18, the drafter .* '\?' as id 19"),
        ("evaluate", "drafters=[./nothing]", ArtifactError, "'./nothing' matches no trained drafter"),
        ("evaluate", "evaluate.num_speculative_tokens=[3,0]", ValueError, "num_speculative_tokens .* is 0"),
        (
            "evaluate",
            "evaluate.batch_size=0",
            ValueError,
            "evaluate.batch_size is 0, must be a whole number, at least 1",
        ),
        ("evaluate", "evaluate.acceptance_rules=[typical]", ValueError, "the acceptance rule is 'typical'"),
        ("gamma", "gamma.acceptance_rule=typical", ValueError, "the acceptance rule is 'typical'"),
        ("evaluate", "task.prompts.max_new_tokens=62", ValueError, "exceeds the context of 64 tokens"),
        ("finetune", "finetune.text_share=1.5", ValueError, "text_share is 1.5"),
        ("finetune", "+loss.gamma=3", ValueError, r"loss: kld\(\) got an unexpected keyword argument 'gamma'"),
        ("finetune", "weighting=dpace weighting.smoothing=2", ValueError, "weighting.smoothing is 2"),
        ("evaluate", "+evaluate.sampling.topp=0.9", ValueError, "evaluate.sampling"),
        ("evaluate", "task.prompts.top_p=0", ValueError, "task.prompts: top_p is 0"),
        ("evaluate", "task.prompts.top_k=-1", ValueError, "task.prompts: top_k is -1"),
        ("evaluate", "+evaluate.sampling.top_k=2.5", ValueError, "top_k is 2.5"),
        ("evaluate", "+evaluate.sampling.temperature=-1", ValueError, "temperature is -1"),
    ],
)
def test_bad_input_raises_one_clear_error_and_changes_nothing(world, tmp_path, name, change, error, message):
    overrides, root = world
    save_target(tmp_path / "other", [*WORDS, "new"])
    save_target(tmp_path / "reseeded", seed=1)
    swapped = [*WORDS[:18], WORDS[19], WORDS[18]]
    save_target(tmp_path / "stranger", swapped)
    change = change.format(**{part: tmp_path / part for part in ("other", "reseeded", "stranger")})
    fresh = [] if error is ArtifactError else [f"out={tmp_path}/out"]
    before = snapshot(root)
    with pytest.raises(error, match=message):
        stage(name, [*overrides, *fresh, *change.split()])
    assert snapshot(root) == before
    assert not list(tmp_path.glob("out/**/manifest.json"))


def test_an_empty_corpus_is_refused(world, tmp_path):
    overrides, _ = world
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="the corpus is empty"):
        stage("prepare", [*overrides, f"out={tmp_path}/out", f"data.pretraining.path={tmp_path}/empty.jsonl"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("losses=[kld,tvdx]", HydraException, "tvdx"),
        ("evaluate.num_speculative_tokens=[0]", ValueError, "num_speculative_tokens .* is 0"),
        ("finetune.text_share=1", ValueError, "text_share is 1"),
        ("acceptance_rule=argmax", ValueError, r"'argmax', .* among evaluate.acceptance_rules, which are \['ratio'\]"),
        ("loss.statistics=all", ValueError, "loss.statistics is 'all'"),
        ("respond.top_p=0", ValueError, "respond.top_p is 0"),
        ("respond.temperatures=[]", ValueError, "respond.temperatures is"),
        ("respond.num_responses=5", ValueError, "respond.num_responses is 5"),
        ("respnd.top_p=0.9", ValueError, "'respnd' is none of .*'respond'"),
        ("respond.topp=0.9", HydraException, "topp"),
        (
            "data=files",
            ValueError,
            r"prepare needs a value for data.instructions.questions.path, data.pretraining.path",
        ),
        ("scale=gigantic", HydraException, "gigantic"),
        (
            "task.summary.max_new_tokens=489",
            ValueError,
            r"task.summary.max_new_tokens is 489, and prompts have up to 300",
        ),
        ("respond.max_new_tokens=213", ValueError, "exceed the context of the target assets/tiny-target, 512 tokens"),
        ("drafter.max_position_embeddings=256", ValueError, "exceed the context of the drafter .*, 256 tokens"),
    ],
)
def test_the_pipeline_refuses_a_wrong_value_of_its_last_stage_before_the_first_computes(
    tmp_path, change, error, message
):
    with pytest.raises(error, match=message):
        main(["scale=smoke", "logger=csv", f"root={tmp_path}/run", "losses=[tvdpp]", change])
    assert not (tmp_path / "run").exists()


def save_hybrid(folder):
    """Save a target whose states are not in transformers' cache; it is refused without weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "layer_types": ["linear_attention", "full_attention"],
    }
    AutoConfig.for_model("minimax", vocab_size=4096, **sizes, **kinds).save_pretrained(folder)
    for path in Path("assets/tiny-target").glob("*token*"):
        shutil.copy(path, folder)
    return str(folder)


def test_a_target_that_cannot_be_decoded_is_refused_before_anything_computes(tmp_path):
    target, how = save_hybrid(tmp_path / "target"), ["scale=smoke", "logger=csv", f"root={tmp_path}/run"]
    how += [f"target.path={target}", "dry_run=true"]
    refusal = r"/target: MiniMaxForCausalLM cannot be decoded with: .* no evaluate, gamma, measure, trim and chat"
    with pytest.raises(ValueError, match=refusal):
        main([*how, "losses=[kld]"])
    for name in ("evaluate", "gamma", "trim"):
        drafter = [] if name == "evaluate" else [f"{name}.drafter=nowhere"]
        with pytest.raises(ValueError, match="MiniMaxForCausalLM cannot be decoded with"):
            stage(name, [*how, *drafter])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["drafter.model_type=gemma2"], "Gemma2ForCausalLM changes its logits after the output embedding"),
        (["drafter.model_type=rwkv"], "RwkvForCausalLM cannot be decoded with"),
        (
            ["drafter.model_type=gpt2", "drafter.max_position_embeddings=16"],
            r"\(pretrain.sequence_length\) have up to \d+ tokens, and GPT2LMHeadModel was made for 16",
        ),
        (["trainer.precision=16-mixed"], "trainer.precision is 16-mixed: .* Give bf16-mixed"),
    ],
)
def test_the_check_of_pretrain_refuses_drafters_that_cannot_be_trained(tmp_path, change, message):
    from hydra import initialize_config_module

    with initialize_config_module("conf", version_base="1.3"):
        cfg = configured("pretrain", ["scale=smoke", f"root={tmp_path}/run", *change])
    with pytest.raises(ValueError, match=message):
        import_module("experiments.pretrain").check(cfg)


@pytest.mark.end_to_end
def test_a_refusal_is_one_line_on_the_command_line(tmp_path):
    command = [sys.executable, "-m", "experiments.pipeline", f"root={tmp_path}", "scale=smoke", "respond.top_p=2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: respond.top_p is 2, must be above 0, at most 1")


@pytest.mark.end_to_end
def test_two_processes_that_share_an_evaluation_give_the_counts_of_one_process(world, tmp_path):
    overrides, root = world
    shutil.copytree(root, tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "evaluate" / "kld-seed1")
    main([*overrides, f"root={tmp_path}/root", "losses=[kld,tvdpp]", "seeds=[1]", "ranks.evaluate=2"])
    one, two = (read_jsonl(folder / "evaluate" / "kld-seed1" / "counts.jsonl") for folder in (root, tmp_path / "root"))
    assert len(one) == len(two) == 12
    for expected, found in zip(one, two, strict=True):
        assert {key: value for key, value in found.items() if "seconds" not in key} == {
            key: value for key, value in expected.items() if "seconds" not in key
        }


def test_stages_that_are_not_finished_are_shared_by_processes(monkeypatch, tmp_path):
    from experiments import pipeline

    started, entered = [], []
    monkeypatch.setattr(pipeline, "run_to_the_end", started.append)
    for name in ("prepare", "pretrain", "respond"):
        monkeypatch.setattr(pipeline.MODULES[name], "main", lambda cfg, name=name: entered.append(name))
    with pytest.raises(ArtifactError, match="no finished 'respond'"):  # nothing ran, so the cache has no responses
        main(["scale=smoke", f"root={tmp_path}", "ranks={prepare: 1, respond: 3, evaluate: 1}"])
    assert entered == ["prepare", "pretrain", "respond"]
    (command,) = started
    assert command[3:7] == ["--standalone", "--nproc-per-node=3", "-m", "experiments.respond"]
    assert {"scale=smoke", f"root={tmp_path}"} <= set(command)


def test_a_number_of_processes_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ranks\.respond is 0, must be a whole number, 1 or above"):
        main(["scale=smoke", f"root={tmp_path}", "ranks.respond=0"])
