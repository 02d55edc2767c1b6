"""Manifests record process and machine, also on machines that lack git or processor names."""

import platform
import subprocess
import sys
import types

import pytest

from drafter.artifacts import provenance


@pytest.fixture(autouse=True)
def _fresh():
    provenance.process.cache_clear()
    yield
    provenance.process.cache_clear()


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.environment()["commit"] == "unknown"


def test_if_git_fails_or_hangs_the_commit_is_unknown(monkeypatch):
    for problem in (PermissionError("git"), subprocess.TimeoutExpired("git", 60)):

        def refuse(*_, problem=problem, **__):
            raise problem

        monkeypatch.setattr(subprocess, "run", refuse)
        assert provenance.commit() == "unknown"


def test_the_commit_is_the_one_at_the_start_of_the_process(monkeypatch):
    monkeypatch.setattr(provenance, "commit", lambda: "before")
    provenance.process()
    monkeypatch.setattr(provenance, "commit", lambda: "after")
    assert provenance.environment()["commit"] == "before"


def test_the_command_line_does_not_say_where_python_lies(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/home/me/.venv/bin/python3", "-m", "experiments.respond", "root=runs/mine"])
    assert provenance.process()["argv"] == ["python3", "-m", "experiments.respond", "root=runs/mine"]


def test_the_version_of_a_package_without_metadata_is_unknown(monkeypatch):
    monkeypatch.setattr(provenance, "LOGGED_VERSIONS", ("no-such-package",))
    assert provenance.environment()["versions"]["no-such-package"] == "unknown"


def test_the_processor_has_the_name_from_the_kernel_or_else_its_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert provenance.processor(tmp_path / "missing") == "arm64"
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert provenance.processor(tmp_path / "arm") == "arm64"
    (tmp_path / "intel").write_text("processor\t: 0\nmodel name\t: Xeon: 8 cores\n")
    assert provenance.processor(tmp_path / "intel") == "Xeon: 8 cores"


def gpu(used):
    cuda = types.SimpleNamespace(is_initialized=lambda: used, get_device_name=lambda: "NVIDIA H100 80GB HBM3")
    return types.SimpleNamespace(cuda=cuda)


def test_the_machine_includes_a_gpu_that_was_used(monkeypatch):
    monkeypatch.setattr(provenance, "processor", lambda: "Xeon")
    for torch, words in (
        (gpu(True), "NVIDIA H100 80GB HBM3, {cores} CPU cores (Xeon)"),
        (gpu(False), "{cores} CPU cores (Xeon)"),
        (None, "{cores} CPU cores (Xeon)"),
    ):
        monkeypatch.setitem(sys.modules, "torch", torch)
        recorded = provenance.environment()
        assert provenance.describe_machine(recorded) == words.format(cores=recorded["cpus"])


def test_a_manifest_without_a_machine_is_described_by_its_cpus():
    assert provenance.describe_machine({"cpus": 4}) == "4 CPU cores"


def test_manifests_are_read_without_torch():
    code = "import sys; from drafter.artifacts import manifest, provenance as p; p.environment(); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
