"""Drafters without a model in the commands: their names, what is refused, and their evaluation beside models."""

import json

import pytest
from hydra import initialize_config_module
from omegaconf import OmegaConf

from drafter.artifacts.manifest import ArtifactError, read_jsonl
from drafter.decoding.drafting import Combined
from drafter.decoding.ngrams import Lookup, NgramSizes, NgramTable
from experiments.reporting.identity import DrafterIdentity
from experiments.reporting.results import read_evaluations, summarise
from experiments.running.composing import configured, with_home
from experiments.running.drafters import find_drafters, output_directories
from experiments.running.named_drafters import (
    check_compiles,
    check_named,
    exit_layer,
    fingerprint_of,
    label_of,
    load_named,
    model_of,
    named_identity,
    parse,
)
from tests.experiments.test_pipeline import stage
from tests.families import family


def test_a_name_says_what_drafts_first_and_what_otherwise():
    assert parse("ngram") == (NgramSizes(), None, None)
    assert parse("ngram2-5") == (NgramSizes(2, 5), None, None)
    assert parse("ngram:a/responses+ngram+org/name") == (NgramSizes(), "a/responses", "ngram+org/name")
    assert model_of("ngram:a/responses+ngram+org/name") == "org/name"
    for name in ("./ngram", "org/ngram", "ngrams/kld", "ngram-kld", "runs/ngram+kld", "a:b"):
        assert parse(name) is None
        assert model_of(name) == name
    assert [label_of(name) for name in ("ngram1-4", "ngram1-2+runs/x/kld-seed1", "ngram:a/responses/")] == [
        "ngram", "ngram1-2+kld-seed1", "ngram-responses",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ngram3", "ngram2-", "ngram:", "ngram+", "ngram+ngram3", "ngram:a+"])
def test_a_name_that_only_begins_like_one_is_refused_with_all_forms(name):
    with pytest.raises(
        ValueError, match=r"a drafter without a model is ngram, ngram2-5 .* a directory of this name is"
    ):
        find_drafters([name])


def test_sizes_that_are_no_range_are_refused_with_the_name():
    with pytest.raises(ValueError, match="drafter 'ngram5-2': the n-grams have 5 to 2 tokens"):
        find_drafters(["ngram5-2"])


def test_the_home_directory_is_expanded_in_each_part_of_a_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    written = ["~/x", "ngram:~/a/responses", "ngram+~/b", "ngram2-5:~/a+ngram:~/b+~/c", "ngram:a~b+c/~d"]
    expected = [name.replace("~/", "/home/me/") for name in written]
    assert with_home(OmegaConf.create({"drafters": written})).drafters == expected


def test_names_are_completed_and_have_directories_of_their_own(tmp_path):
    for name in ("kld-seed1", "tvd-seed1"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "manifest.json"):
            (tmp_path / name / file).write_text("{}")
    found = find_drafters([f"{tmp_path}/*", "ngram", f"ngram:r+{tmp_path}/*", "ngram:r"])
    models = [f"{tmp_path}/kld-seed1", f"{tmp_path}/tvd-seed1"]
    assert found == [*models, "ngram", *(f"ngram:r+{model}" for model in models), "ngram:r"]
    assert [path.name for path in output_directories(tmp_path, found).values()] == [
        "kld-seed1", "tvd-seed1", "ngram", "ngram-r+kld-seed1", "ngram-r+tvd-seed1", "ngram-r",
    ]  # fmt: skip
    with pytest.raises(ArtifactError, match="matches no trained drafter"):
        find_drafters([f"ngram+{tmp_path}/none/*"])


def test_tables_of_two_sets_of_responses_have_different_directories(world, tmp_path):
    _, root = world
    (tmp_path / "other").symlink_to(root)
    manifest = json.loads((root / "responses" / "manifest.json").read_text())
    (tmp_path / "more" / "responses").mkdir(parents=True)
    (tmp_path / "more" / "responses" / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    names = [f"ngram:{root}/responses", f"ngram:{tmp_path}/more/responses", f"ngram:{tmp_path}/other/responses"]
    found = output_directories(tmp_path, names)
    assert [path.name for path in found.values()] == [f"{root.name}-ngram-responses", "more-ngram-responses"]


def test_a_table_is_of_the_targets_own_answers_alone(world, tmp_path):
    overrides, root = world
    with pytest.raises(ArtifactError, match="no finished 'respond'"):
        stage("evaluate", [*overrides, f"out={tmp_path}/out", f"drafters=[ngram:{root}/finetune]"])
    with pytest.raises(ArtifactError, match=r"written by the stage 'cache'.* A table is made from responses; a cache"):
        stage("evaluate", [*overrides, f"out={tmp_path}/out", f"drafters=[ngram:{root}/cache]"])
    manifest = json.loads((root / "responses" / "manifest.json").read_text())
    for name, changed in (("inputs", {"target": "0" * 16}), ("settings", {"by": "drafter"})):
        (tmp_path / name).mkdir()
        other = manifest | {name: manifest[name] | changed}
        (tmp_path / name / "manifest.json").write_text(json.dumps(other))
        message = "target" if name == "inputs" else "has answers by the drafter: give the target's"
        with pytest.raises(ArtifactError, match=message):
            stage("evaluate", [*overrides, f"out={tmp_path}/out", f"drafters=[ngram:{tmp_path}/{name}]"])
    assert not (tmp_path / "out").exists()


def test_a_name_is_loaded_as_what_it_says(world):
    overrides, root = world
    with initialize_config_module("conf", version_base="1.3"):
        cfg = configured("evaluate", overrides)
    combined = load_named(cfg, f"ngram2-3+ngram:{root}/responses+{root}/drafter", None)
    assert isinstance(combined, Combined)
    assert combined.first == Lookup(NgramSizes(2, 3))
    assert isinstance(combined.otherwise, Combined)
    assert isinstance(combined.otherwise.first, NgramTable)
    assert len(combined.otherwise.first.keys) > 20
    assert combined.otherwise.otherwise.config.vocab_size == 24
    assert named_identity(f"ngram+{root}/finetune/kld-seed1") == DrafterIdentity("ngram+kld", seed=1)


def test_drafters_without_a_model_are_evaluated_beside_models(world, tmp_path):
    overrides, root = world
    names = ["ngram", f"ngram:{root}/responses", f"ngram2-3+{root}/drafter", f"{root}/drafter"]
    out = [f"out={tmp_path}/evaluate", "evaluate.num_speculative_tokens=[3,adaptive]"]
    stage("evaluate", [*overrides, *out, f"drafters=[{','.join(names)}]"])
    labels = {"ngram", "ngram-responses", "ngram2-3+drafter", "drafter"}
    assert {path.name for path in (tmp_path / "evaluate").iterdir()} == labels
    for label in labels:
        rows = read_jsonl(tmp_path / "evaluate" / label / "counts.jsonl")
        manifest = json.loads((tmp_path / "evaluate" / label / "manifest.json").read_text())
        assert manifest["counts"]["greedy_outputs_unlike_the_target"] == 0 < manifest["counts"]["greedy_outputs"]
        assert (manifest["counts"]["drafter_parameters"] == 0) == (label in ("ngram", "ngram-responses"))
        assert sum(row["accepted"] for row in rows) > 0
        for row in rows:
            assert row["tokens"] <= row["accepted"] + row["target_calls"]
            assert row.get("drafted_by_model", row["drafted"]) <= row["drafted"]
            assert ("drafted_by_model" in row) <= (label != "drafter")
    evaluations = read_evaluations(tmp_path / "evaluate")
    by_series = {(row.series, row.task, row.gamma): row for row in summarise(evaluations)}
    assert {series for series, *_ in by_series} == {"pretrained", "ngram", "ngram-responses", "ngram2-3+pretrained"}
    for (series, task, gamma), result in by_series.items():
        tau, c = result.block_efficiency.value, next(one.size_ratio for one in evaluations if one.series == series)
        assert (result.gain is None) == (series == "pretrained")
        if series in ("ngram", "ngram-responses"):
            assert result.speedup.value == tau
        if series == "ngram2-3+pretrained" and gamma == 3:
            rows = read_jsonl(tmp_path / "evaluate" / "ngram2-3+drafter" / "counts.jsonl")
            rows = [one for one in rows if task in (one["task"], "in domain, all") and one["gamma"] == 3]
            by_model = sum(one.get("drafted_by_model", one["drafted"]) for one in rows)
            assert result.speedup.value == pytest.approx(
                tau / (1 + c * by_model / sum(one["target_calls"] for one in rows))
            )
            assert result.speedup.value > tau / (1 + 3 * c)
    # The same again, side by side.
    stage(
        "evaluate",
        [*overrides, f"out={tmp_path}/batch", *out[1:], "evaluate.batch_size=3", f"drafters=[{','.join(names)}]"],
    )
    for label in labels:
        one, other = (read_jsonl(tmp_path / name / label / "counts.jsonl") for name in ("evaluate", "batch"))
        fields = ("task", "gamma", "prompt", "tokens", "target_calls", "accepted", "drafted", "drafted_by_model")
        assert [[row.get(field) for field in fields] for row in one] == [
            [row.get(field) for field in fields] for row in other
        ]


def test_the_targets_first_layers_have_names_and_fingerprints():
    assert [exit_layer(name) for name in ("layers4", "layers12", "layers", "./layers4", "org/layers4")] == [
        4, 12, None, None, None,
    ]  # fmt: skip
    assert find_drafters(["layers4", "ngram2-4+layers4"]) == ["layers4", "ngram2-4+layers4"]
    assert [label_of(name) for name in ("layers4", "ngram2-4+layers4")] == ["layers4", "ngram2-4+layers4"]
    assert named_identity("layers4") == DrafterIdentity("layers4")
    assert named_identity("ngram+layers4") == DrafterIdentity("ngram+layers4")
    found = {fingerprint_of(name, target) for name in ("layers1", "layers2", "ngram+layers1") for target in ("a", "b")}
    assert len(found) == 6


def test_the_targets_first_layers_are_evaluated_beside_others(world, tmp_path):
    overrides, _ = world
    out = [f"out={tmp_path}/evaluate", "evaluate.num_speculative_tokens=[3]"]
    stage("evaluate", [*overrides, *out, "drafters=[layers1,layers2,ngram+layers1]"])
    counted = {}
    for label in ("layers1", "layers2", "ngram+layers1"):
        counts = json.loads((tmp_path / "evaluate" / label / "manifest.json").read_text())["counts"]
        assert counts["greedy_outputs_unlike_the_target"] == 0 < counts["greedy_outputs"]
        counted[label] = counts["drafter_parameters"]
        whole = counts["target_parameters"]
    assert counted["layers1"] == counted["ngram+layers1"] < counted["layers2"] == whole
    series = {row.series for row in summarise(read_evaluations(tmp_path / "evaluate"))}
    assert series == {"layers1", "layers2", "ngram+layers1"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["layers0"], "drafter 'layers0': .* has 2 layers: give 1 to 2 of them, not 0"),
        (["ngram+layers3"], "drafter 'layers3': .* has 2 layers: give 1 to 2 of them, not 3"),
        (["layers1", "target.parallel=tensor"], "drafter 'layers1': target.parallel is tensor"),
    ],
)
def test_layers_that_are_no_drafter_are_refused(world, tmp_path, given, message):
    overrides, _ = world
    name, *more = given
    with initialize_config_module("conf", version_base="1.3"):
        cfg = configured("evaluate", [*overrides, *more])
    with pytest.raises(ValueError, match=message):
        check_named(cfg, name)


def test_layers_of_a_target_with_states_and_compiled_ones_are_refused(world, tmp_path):
    overrides, _ = world
    family("lfm2").save_pretrained(tmp_path / "lfm2")
    with initialize_config_module("conf", version_base="1.3"):
        cfg = configured("evaluate", [*overrides, f"target.path={tmp_path}/lfm2"])
        compiled = configured("gamma", [*overrides, "gamma.compile=true", "gamma.drafter=ngram+layers1"])
    with pytest.raises(ValueError, match="lfm2 has states, so that its layers are no drafter"):
        check_named(cfg, "layers1")
    with pytest.raises(ValueError, match=r"gamma.compile is true, and gamma.drafter is .*layers1, whose layers are"):
        check_compiles(compiled, "gamma")


def test_gamma_takes_the_targets_first_layers(world, tmp_path):
    overrides, _ = world
    given = ["gamma.drafter=ngram+layers1", "gamma.largest=2", f"out={tmp_path}/gamma", "gamma.prompts_per_task=1"]
    stage("gamma", [*overrides, *given])
    assert (tmp_path / "gamma" / "ngram+layers1" / "gamma.md").exists()
