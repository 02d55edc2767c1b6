"""Tests of unusual paths, locales other than UTF-8, and drafters whose directories have the same name."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from drafter.artifacts.manifest import ArtifactError, Stage
from drafter.artifacts.storage import Folder, is_url, local_directory
from drafter.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from drafter.models.loading import load_config
from experiments.running.composing import configured, override, with_home
from experiments.running.drafters import find_drafters, output_directories

PROJECT = Path(__file__).parents[2]
NAMES = [
    "über", "r[1]", "it's", 'q"q', "a b", "a,b", "k=v", "~", "a:b", "s3:x", "a::b", "a{b}", "a(b)", "$HOME", "100%",
    "#x", "a\\b", "end\\", "a\\'b", "null", "1", "true", "*", "!x", "&|;<>`", "tab\tbed", "日本", "a://b",
]  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, "${root}", "\\${x}"])
def test_any_text_can_be_given_as_an_override(name):
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("evaluate", [override("out", name), override("drafters", [name, name + "x"])])
    assert cfg.out == name
    assert list(cfg.drafters) == [name, name + "x"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a://b"])
def test_a_stage_writes_and_reads_in_a_directory_of_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for directory in (name, tmp_path / name, f"below/{name}"):
        stage = Stage(directory, "respond", {}, {})
        stage.folder.write("a.json", b"{}")
        assert stage.folder.sizes().keys() >= {"a.json"}
        assert stage.folder.read_ranges([("a.json", 0, 1)]) == [b"{"]
        stage.finish()
        assert Stage(directory, "respond", {}, {}).complete
        assert (tmp_path / directory / "manifest.json").exists()


@pytest.mark.parametrize(("path", "found"), [("s3://b/c", True), ("hf://x", True), ("a://b", True), ("/a://b", False)])
def test_only_a_path_that_begins_with_a_scheme_is_a_url(path, found):
    assert is_url(path) is found
    assert Folder(path).is_local is not found


@pytest.mark.parametrize("name", NAMES)
def test_drafters_are_found_under_roots_of_any_name(tmp_path, name):
    for drafter in ("kld-seed1", "tvd-seed1", "unfinished"):
        folder = tmp_path / name / "finetune" / drafter
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if drafter != "unfinished":
            (folder / "manifest.json").write_text("{}")
    root = f"{tmp_path}/{name}"
    wanted = [f"{root}/finetune/{drafter}" for drafter in ("kld-seed1", "tvd-seed1")]
    assert [os.path.abspath(path) for path in find_drafters([f"{root}/finetune/*"])] == [
        os.path.abspath(path) for path in wanted
    ]
    assert find_drafters([wanted[0]]) == wanted[:1]
    with pytest.raises(ArtifactError, match="matches no trained drafter"):
        find_drafters([f"{root}/none/*"])


def test_a_path_that_begins_with_a_tilde_is_expanded_in_every_section(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["root='~/r'", "inputs.data='~/data'", "drafters=['~/a','${root}/b',org/c]", "target.path='~/t'"]
    with initialize_config_module("conf", version_base="1.3"):
        cfg = configured("evaluate", overrides)
    assert (cfg.root, cfg.out) == (f"{tmp_path}/r", f"{tmp_path}/r/evaluate")
    assert (cfg.inputs.data, cfg.target.path) == (f"{tmp_path}/data", f"{tmp_path}/t")
    assert list(cfg.drafters) == [f"{tmp_path}/a", f"{tmp_path}/r/b", "org/c"]
    written = {
        "root": "~/runs/${name}",
        "name": "x",
        "late": "???",
        "data": {"template": "~{text}"},
        "other": "${data}",
    }
    cfg = with_home(OmegaConf.create(written))
    assert (cfg.root, cfg.data.template) == (f"{tmp_path}/runs/x", "~{text}")


@pytest.mark.end_to_end
def test_a_root_below_home_is_one_directory_for_all_artifacts(world, tmp_path):
    overrides, root = world
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    command = [sys.executable, "-m", "experiments.tables", *overrides, "root='~/r [1]'"]
    (home / "r [1]").mkdir(parents=True)
    (home / "r [1]" / "evaluate").symlink_to(root / "evaluate")
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(PROJECT)}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # and in a locale of ASCII alone
    ended = subprocess.run(command, cwd=here, env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
    assert "τ" in ended.stdout.decode()
    assert "τ" in (home / "r [1]" / "report" / "results.md").read_text(encoding="utf-8")
    assert not list(here.iterdir())


def test_the_embedded_target_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    prints = model_fingerprint("assets/tiny-target"), tokenizer_fingerprint("assets/tiny-target")
    monkeypatch.chdir(tmp_path)
    assert (model_fingerprint("assets/tiny-target"), tokenizer_fingerprint("assets/tiny-target")) == prints
    assert load_config("assets/tiny-target").vocab_size == 4096
    assert local_directory("drafter") is None  # a package, not a model
    (tmp_path / "assets" / "tiny-target").mkdir(parents=True)  # a directory in the working directory comes first
    assert model_fingerprint("assets/tiny-target") not in prints


def test_every_file_is_read_and_written_in_utf8_in_every_locale():
    for path in (file for package in ("drafter", "experiments") for file in (PROJECT / package).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            given = {keyword.arg for keyword in call.keywords}
            binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args)
            safe = ast.unparse(call.func) in {"os.open", "self._open", "safe_open", "write_text"}
            if name in {"open", "read_text", "write_text"} and not safe and not binary:
                assert "encoding" in given, f"{path}:{call.lineno}"
            assert "text" not in given or name != "run", f"{path}:{call.lineno}: give encoding instead of text"


def drafter(folder, weights):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return str(folder)


def test_drafters_with_the_same_name_get_the_shortest_distinct_names(tmp_path, monkeypatch):
    monkeypatch.setattr("drafter.models.fingerprints.hub_commit", lambda source: "a" * 40)
    out = tmp_path / "out"
    one, two = drafter(tmp_path / "a" / "mine", "1"), drafter(tmp_path / "b" / "mine", "2")
    other = drafter(tmp_path / "other", "3")
    assert output_directories(out, [one, other]) == {one: out / "mine", other: out / "other"}
    both = output_directories(out, [one, two, other])
    assert both == {one: out / "a-mine", two: out / "b-mine", other: out / "other"}
    deep = [drafter(tmp_path / name / "finetune" / "kld", name) for name in ("x", "y")]
    assert [path.name for path in output_directories(out, deep).values()] == ["x-kld", "y-kld"]
    hub = output_directories(out, ["org-a/drafter", "org-b/drafter"])
    assert [path.name for path in hub.values()] == ["org-a-drafter", "org-b-drafter"]
    taken = drafter(tmp_path / "a-mine", "4")
    assert len({*output_directories(out, [taken, one, two]).values()}) == 3


def test_an_evaluated_drafter_keeps_its_name_when_another_has_the_same_name(tmp_path):
    one, two = drafter(tmp_path / "a" / "mine", "1"), drafter(tmp_path / "b" / "mine", "2")
    Stage(tmp_path / "out" / "mine", "evaluate", {}, {"drafter": model_fingerprint(one)}).finish({}, {})
    found = output_directories(tmp_path / "out", [two, one])
    assert {path: directory.name for path, directory in found.items()} == {one: "mine", two: "b-mine"}


def test_copies_of_a_drafter_are_evaluated_once(tmp_path):
    one, copy = drafter(tmp_path / "a" / "mine", "1"), drafter(tmp_path / "b" / "mine", "1")
    assert output_directories(tmp_path, [one, copy, f"{one}/"]) == {one: tmp_path / "mine"}


def test_another_drafter_in_a_finished_evaluation_is_refused_with_the_command_that_made_it(tmp_path):
    stage = Stage(tmp_path, "evaluate", {}, {"drafter": "aaaa"}, {"command": "python -m x 'drafters=[a/mine]'"})
    stage.finish({}, {})
    with pytest.raises(ArtifactError, match=r"inputs.drafter: found 'aaaa', requested 'bbbb'.*drafters=\[a/mine\]"):
        Stage(tmp_path, "evaluate", {}, {"drafter": "bbbb"})
    assert json.loads((tmp_path / "manifest.json").read_text())["inputs"] == {"drafter": "aaaa"}
