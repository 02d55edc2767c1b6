"""A pair is measured without prepared data: what is found is right, and what cannot be measured is refused at once."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from drafter.artifacts.manifest import read_jsonl
from drafter.models.compatibility import VocabularyError
from experiments import measure
from tests.conftest import WORDS, save_target
from tests.experiments.test_pipeline import snapshot, stage
from tests.families import family


def overrides(pair, *more):
    given = {"target.path": f"{pair}/target", "measure.drafter": f"{pair}/drafter", "measure.max_new_tokens": "12"}
    given |= {"measure.prompts": f"{pair}/prompts.jsonl", "measure.largest": "4", "measure.pad": "false"}
    given |= dict(one.split("=", 1) for one in more)
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def measured(pair, tmp_path_factory):
    """Measure the pair with every γ decoded, and return the directory."""
    out = tmp_path_factory.mktemp("measured") / "out"
    stage("measure", overrides(pair, f"out={out}", "measure.decode=[1,2,3,4]", "measure.num_prompts=4"))
    return out


def test_the_page_comes_out_in_three_forms(measured, pair):
    page, found = (measured / "measure.md").read_text(), json.loads((measured / "measure.json").read_text())
    assert found["verdict"] in page
    for part in ("Compatibility", "Speed-up", "τ by acceptance rule", "Call timings", "Settings"):
        assert f"\n## {part}\n" in page
        assert f"<h2>{part}</h2>" in (measured / "measure.html").read_text()
    assert f"Measured on 4 prompts of {pair}/prompts.jsonl" in page
    assert {row["drafter"] for row in found["rows"]} == {"drafter", "ngram", "ngram+drafter"}


def test_tau_as_it_is_predicted_is_that_of_the_greedy_decodings(measured):
    found, counts = json.loads((measured / "measure.json").read_text()), read_jsonl(measured / "counts.jsonl")
    assert found["equal"] == [len(counts), len(counts)] == [4 * 3 * 4] * 2
    for row in found["rows"]:
        same = [one for one in counts if (one["drafter"], one["gamma"]) == (row["drafter"], row["gamma"])]
        tau = sum(one["tokens"] for one in same) / sum(one["target_calls"] for one in same)
        assert row["block_efficiency"] == pytest.approx(tau)
        low, high = row["measured"]["low"], row["measured"]["high"]
        assert 0 < low <= row["measured"]["value"] <= high
    assert found["by_rule"]["greedy"] == [row["block_efficiency"] for row in found["rows"][:4]]
    assert set(found["by_rule"]) == set(found["acceptance_rates"]) == {"greedy", "ratio", "argmax", "match"}
    # Σ p q is at most max q, the chance of which is that of `argmax`, only on average: `ratio` is above both.
    assert found["by_rule"]["ratio"][3] >= max(found["by_rule"]["argmax"][3], found["by_rule"]["match"][3])


def test_without_more_only_two_gammas_of_each_drafter_are_decoded_and_one_directory_is_written(
    pair, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given = overrides(pair, "measure.num_prompts=2", "measure.batch_sizes=[1]")
    stage("measure", given)
    assert [path.name for path in tmp_path.iterdir()] == ["measure"]
    folder = tmp_path / "measure" / "drafter"
    rows = json.loads((folder / "measure.json").read_text())["rows"]
    for name in ("drafter", "ngram", "ngram+drafter"):
        of_name = [row for row in rows if row["drafter"] == name]
        best = sorted(row["predicted"]["value"] for row in of_name)[-2:]
        assert sorted(row["predicted"]["value"] for row in of_name if row["measured"]) == best
        assert all(row["predicted"]["low"] <= row["predicted"]["value"] <= row["predicted"]["high"] for row in of_name)
    before, page = snapshot(folder), capsys.readouterr().out
    stage("measure", given)
    assert snapshot(folder) == before
    assert capsys.readouterr().out.strip() == page.strip()
    with pytest.raises(ValueError, match="was made differently"):
        stage("measure", [*given, "measure.max_new_tokens=11"])


def test_a_drafter_that_is_its_target_is_always_right_and_needs_a_smaller_c(pair, tmp_path):
    stage("measure", overrides(pair, f"measure.drafter={pair}/target", f"out={tmp_path}/out", "measure.num_prompts=3"))
    found = json.loads((tmp_path / "out" / "measure.json").read_text())
    assert found["label"] == "target"
    assert {found["acceptance_rates"][key] for key in ("greedy", "ratio")} == {1.0}
    assert found["size_ratio"] == 1
    assert found["needed_rate"] is None or found["needed_rate"] <= 1
    assert found["compatibility"] == ["The two models give the same meaning to every token id."]
    assert found["export"] is None


def test_a_drafter_without_a_model_is_measured_and_has_the_settings_of_engines_for_it(pair, tmp_path):
    stage("measure", overrides(pair, "measure.drafter=ngram2-3", f"out={tmp_path}/out", "measure.num_prompts=2"))
    found = json.loads((tmp_path / "out" / "measure.json").read_text())
    assert {row["drafter"] for row in found["rows"]} == {"ngram2-3", "ngram"}
    assert not found["acceptance_rates"]
    assert found["size_ratio"] == 0
    engines = {one["engine"]: one["lines"] for one in found["engines"]}
    assert '"prompt_lookup_max": 3, "prompt_lookup_min": 2' in engines["vLLM, ngram2-3"]


def test_the_best_gamma_by_batch_size_is_also_a_schedule(pair, tmp_path):
    given = [f"target.path={pair}/drafter", "measure.batch_sizes=[1,3]", f"out={tmp_path}/out", "measure.rivals=[]"]
    stage("measure", overrides(pair, *given, "measure.num_prompts=2"))
    found = json.loads((tmp_path / "out" / "measure.json").read_text())
    assert [row["batch_size"] for row in found["batches"]] == [1, 3]
    for row in found["batches"]:
        assert (row["gamma"] == 0) == (row["predicted"] <= 1)
    assert found["batches"][0]["measured"] is None  # it is among the drafters that were decoded
    assert 0.01 < found["batches"][1]["measured"] < 3
    assert f"{found['batches'][1]['measured']:.2f} |" in (tmp_path / "out" / "measure.md").read_text()
    assert json.loads(found["schedule"])[0][0] == 1
    assert json.loads(found["schedule"])[-1][1:] == [4096, found["batches"][-1]["gamma"]]
    assert found["rival"] is None


def test_the_targets_first_layers_are_measured_as_drafter_and_rival(pair, tmp_path):
    given = ["measure.drafter=layers1", "measure.rivals=[layers2,ngram+layers1]", "measure.num_prompts=2"]
    given += ["measure.contexts=[20]", f"out={tmp_path}/out"]
    stage("measure", overrides(pair, *given))
    found = json.loads((tmp_path / "out" / "measure.json").read_text())
    assert found["label"] == "layers1"
    assert {row["drafter"] for row in found["rows"]} == {"layers1", "layers2", "ngram+layers1"}
    assert found["equal"][0] == found["equal"][1] > 0
    assert 0 < found["size_ratio"] < 1
    whole = [row for row in found["rows"] if row["drafter"] == "layers2"]
    assert all(row["block_efficiency"] > row["gamma"] / 2 + 1 for row in whole)  # each draft is accepted
    assert not found["engines"]  # none can draft so


def test_contexts_have_their_own_timings_and_the_tau_of_the_answers(pair, tmp_path):
    given = ["measure.contexts=[20,64]", "measure.rivals=[]", "measure.num_prompts=2", f"out={tmp_path}/out"]
    stage("measure", [*overrides(pair, *given), "hardware=cpu"])
    found = json.loads((tmp_path / "out" / "measure.json").read_text())
    assert [row["tokens"] for row in found["contexts"]] == [20, 64 - 16]  # the calls fit into the context of 64
    taus = [row["block_efficiency"] for row in found["rows"]]
    for row in found["contexts"]:
        for one in (row, row["roofline"]):
            costs = [one["ratio"] * gamma + v for gamma, v in enumerate(one["verification"], start=1)]
            assert one["predicted"] == pytest.approx([tau / cost for tau, cost in zip(taus, costs, strict=True)])
    page = (tmp_path / "out" / "measure.md").read_text()
    assert "\n## Contexts\n" in page
    assert "it was not measured with long texts" in page
    assert "The roofline is that of 2 CPU cores" in page
    assert len([line for line in page.splitlines() if line.startswith("| 48 |")]) == 4


def test_contexts_without_a_draft_model_and_without_hardware(pair, tmp_path):
    given = ["measure.drafter=ngram", "measure.contexts=[20]", f"out={tmp_path}/out", "measure.num_prompts=2"]
    stage("measure", overrides(pair, *given))
    (row,) = json.loads((tmp_path / "out" / "measure.json").read_text())["contexts"]
    assert (row["tokens"], len(row["predicted"]), row["roofline"]) == (20, 4, None)
    assert "roofline" not in (tmp_path / "out" / "measure.md").read_text()


def test_the_roofline_is_refused_without_contexts_and_for_states(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.running.timed_pair.load_target", lambda source: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"hardware is 2 CPU cores, and measure\.contexts has none"):
        stage("measure", [*overrides(pair), "hardware=cpu"])
    family("lfm2").save_pretrained(tmp_path / "lfm2")
    given = overrides(pair, f"target.path={tmp_path}/lfm2", "measure.drafter=ngram", "measure.contexts=[20]")
    with pytest.raises(ValueError, match="lfm2 has states, while the roofline is that of attention"):
        stage("measure", [*given, "hardware=cpu"])


def test_the_time_is_said_roughly_before_any_call_is_timed(pair, tmp_path, monkeypatch):
    lines = []

    def stops(*arguments):
        raise RuntimeError("timing begins")

    monkeypatch.setattr("experiments.running.timed_pair.log.info", lambda text, *given: lines.append(text % given))
    monkeypatch.setattr("experiments.running.timed_pair.prepare_pair", stops)
    with pytest.raises(RuntimeError, match="timing begins"):
        stage("measure", overrides(pair, f"out={tmp_path}/out"))
    (line,) = lines
    assert re.fullmatch(r"measure: roughly [\d.]+ (s|min|h) in all, by the first calls .*", line)


def test_contexts_are_not_compiled_on_a_gpu(pair, monkeypatch):
    monkeypatch.setattr("experiments.running.timed_pair.load_target", lambda source: pytest.fail("loaded"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match=r"measure.contexts is \[20\] and measure.compile is true: on a GPU"):
        stage("measure", overrides(pair, "measure.contexts=[20]", "measure.compile=true"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("measure.contexts=[20,100]", r"has 100, and .*target has a context of 64 tokens, .*drafter has a .* of 128"),
        ("measure.contexts=[4,20]", r"measure.contexts is \[4, 20\], must be numbers above measure.largest=4"),
        ("measure.num_prompts=0", r"measure.num_prompts is 0, must be at least 1"),
        ("measure.largest=0", r"measure.largest is 0, must be at least 1"),
        ("measure.max_new_tokens=0", r"measure.max_new_tokens is 0, must be at least 1"),
        ("measure.temperature=0", r"measure.temperature is 0, must be above 0"),
        ("measure.top_p=2", r"top_p is 2, must be above 0, at most 1"),
        ("measure.decode=[5]", r"measure.decode is \[5\], must be null or some of 1 to measure.largest=4"),
        ("measure.decode=[]", r"measure.decode is \[\]"),
        ("measure.batch_sizes=[0]", r"measure.batch_sizes is \[0\]"),
        (
            ("measure.batch_sizes=[1,4]", "measure.compile=true"),
            r"measure.batch_sizes is \[1, 4\] and measure.compile is true: only calls with one sequence are compiled",
        ),
        ("measure.prompts=nowhere.jsonl", r"nowhere.jsonl"),
        ("measure.template='{answer}'", r"answer"),
        ("measure.max_new_tokens=60", r"prompt 0 has \d+ tokens; with max_new_tokens=60 it exceeds the context of 64"),
        ("measure.drafter=nowhere/at/all", r"nowhere/at/all"),
        ("measure.drafter=ngram3", r"drafter 'ngram3': a drafter without a model is"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused_before_a_model_is_loaded(pair, monkeypatch, given, message):
    monkeypatch.setattr("experiments.running.timed_pair.load_target", lambda source: pytest.fail("loaded"))
    with pytest.raises((ValueError, OSError, KeyError), match=message):
        stage("measure", overrides(pair, *([given] if isinstance(given, str) else given)))


@pytest.mark.parametrize("key", ["target.path", "measure.drafter"])
def test_a_pair_of_which_one_model_is_not_given_is_refused_in_one_sentence(pair, monkeypatch, key):
    given = [one for one in overrides(pair) if not one.startswith(f"{key}=")]
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr("sys.argv", ["measure", *given])
    with pytest.raises(SystemExit) as refusal:
        measure.main()
    assert str(refusal.value).splitlines()[0] == f"error: measure needs a value for {key}: give it as `{key}=...`"


def test_prompts_that_are_neither_here_nor_on_the_hub_are_refused_in_one_sentence(pair, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **how: (_ for _ in ()).throw(ConnectionError("x")))
    with pytest.raises(FileNotFoundError, match=r"'missing_dir' is no file or folder here, and no dataset .*: give a"):
        stage("measure", overrides(pair, "measure.prompts=missing_dir"))


def test_an_empty_file_of_prompts_is_refused(pair, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"measure.prompts is .*empty.jsonl, which has no prompt"):
        stage("measure", overrides(pair, f"measure.prompts={tmp_path}/empty.jsonl"))


def test_other_vocabularies_and_architectures_that_cannot_be_decoded_are_refused(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.running.timed_pair.load_target", lambda source: pytest.fail("loaded"))
    save_target(tmp_path / "other", words=[*WORDS[:5], "horse", *WORDS[6:]])
    with pytest.raises(VocabularyError, match=r"is no drafter for .*\n.*vocabulary"):
        stage("measure", overrides(pair, f"measure.drafter={tmp_path}/other"))
    with pytest.raises(VocabularyError):
        stage("measure", overrides(pair, f"measure.rivals=[{tmp_path}/other]"))
    family("rwkv").save_pretrained(tmp_path / "rwkv")
    for path in (pair / "target").glob("tokenizer*"):
        (tmp_path / "rwkv" / path.name).write_bytes(path.read_bytes())
    for key in ("target.path", "measure.drafter"):
        with pytest.raises(ValueError, match=f"{tmp_path}/rwkv: RwkvForCausalLM cannot be .*, gamma, measure, trim"):
            stage("measure", overrides(pair, f"{key}={tmp_path}/rwkv"))


def test_sequences_side_by_side_are_refused_where_a_model_has_states(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.measure.generate_answers", lambda *arguments: pytest.fail("decoded"))
    family("lfm2").save_pretrained(tmp_path / "lfm2")
    for path in (pair / "target").glob("tokenizer*"):
        (tmp_path / "lfm2" / path.name).write_bytes(path.read_bytes())
    given = [f"target.path={tmp_path}/lfm2", "measure.drafter=ngram", "measure.batch_sizes=[1,2]"]
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM has states, .*: decode its sequences one at a time"):
        stage("measure", overrides(pair, *given, f"out={tmp_path}/out"))


def test_a_dry_run_says_that_the_pair_can_be_measured(pair, monkeypatch, capsys):
    monkeypatch.setattr("experiments.running.timed_pair.load_target", lambda source: pytest.fail("loaded"))
    stage("measure", overrides(pair, "dry_run=true"))
    assert "can be measured" in capsys.readouterr().out


def test_the_built_in_prompts_are_of_the_papers_kinds_in_turn(pair):
    from hydra import initialize_config_module

    from experiments.running.composing import configured
    from experiments.running.measuring import read_prompts

    with initialize_config_module("conf", version_base="1.3"):
        cfg = configured("measure", overrides(pair, "measure.prompts=null"))
        prompts = read_prompts(cfg)
        short = read_prompts(configured("measure", overrides(pair, "measure.prompts=null", "measure.num_prompts=4")))
    kinds = ["open_ended", "one_sentence", "summary", "translation"]
    assert [kind for kind, _ in short] == kinds
    assert len(prompts) == len({text for _, text in prompts}) == 12
    assert {kind for kind, _ in prompts} == set(kinds)
    assert all("\n\n" in text for kind, text in prompts if kind != "open_ended")


@pytest.mark.end_to_end
def test_the_command_in_an_empty_directory(pair, tmp_path):
    command = [sys.executable, "-m", "experiments.measure", *overrides(pair, "measure.num_prompts=3")]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "", "HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "this takes about" in done.stdout + done.stderr
    assert "# Is drafter worth it for" in done.stdout
    names = {path.name for path in (tmp_path / "measure" / "drafter").iterdir()}
    assert names == {"measure.md", "measure.html", "measure.json", "counts.jsonl", "manifest.json"}
    refused = subprocess.run(
        [*command, "measure.largest=0"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-2].startswith("error: measure.largest is 0")
