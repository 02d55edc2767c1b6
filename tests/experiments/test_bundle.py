"""The command `bundle`: another run starts from its file, which is small and the same for the same rows."""

import shutil
import subprocess

import pytest

from drafter.artifacts.manifest import ArtifactError, read_manifest
from drafter.artifacts.rows import Rows
from tests.chat_target import save_chat_target
from tests.experiments.test_pipeline import snapshot, stage
from tests.experiments.test_prepare_self import overrides


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Prepare what the target writes, and answer it with states. Return the folder, the root and the overrides."""
    folder = tmp_path_factory.mktemp("bundle")
    save_chat_target(folder / "target")
    given = [*overrides(folder, folder / "target"), "scale.num_responses=12", "scale.shard_size=5"]
    stage("prepare", given)
    stage("respond", [*given, "respond.states=bfloat16"])
    return folder, folder / "run", given


def test_a_run_starts_from_a_bundle(answered, tmp_path, capsys):
    folder, root, given = answered
    for name in ("first", "second"):
        stage("bundle", [*given, f"out={tmp_path}/{name}.tar.xz"])
    assert (tmp_path / "first.tar.xz").read_bytes() == (tmp_path / "second.tar.xz").read_bytes()
    printed = capsys.readouterr().out
    assert f"{folder}/run, " in printed.split("its manifests name paths of this machine, ")[1]
    assert f"mkdir -p {root} && tar -xJf {tmp_path}/first.tar.xz -C {root}\n" in printed
    (tmp_path / "run").mkdir()
    subprocess.run(["tar", "-xJf", tmp_path / "first.tar.xz", "-C", tmp_path / "run"], check=True)
    ours, theirs = (Rows(one / "responses", "respond") for one in (tmp_path / "run", root))
    assert "hidden" not in ours.schema.names
    for one, other in zip(ours, theirs, strict=True):
        assert {name: str(one[name]) for name in one} == {name: str(other[name]) for name in one}
    before, moved = snapshot(tmp_path / "run"), [*given, f"root={tmp_path}/run"]
    stage("prepare", moved)
    stage("respond", [*moved, "respond.states=bfloat16"])
    assert snapshot(tmp_path / "run") == before
    stage("cache", moved)
    counts = read_manifest(tmp_path / "run" / "cache", "cache")["counts"]
    assert counts["taken_from_responses"] == 0
    assert counts["rows"] == len(theirs)


def test_responses_to_other_data_are_refused(answered, tmp_path):
    _, root, given = answered
    shutil.copytree(root / "data", tmp_path / "data")
    text = (tmp_path / "data" / "manifest.json").read_text()
    (tmp_path / "data" / "manifest.json").write_text(text.replace('"seed": 0', '"seed": 7', 1))
    with pytest.raises(ArtifactError, match=r"responses was made with the data \w+, but this run's data is"):
        stage("bundle", [*given, f"inputs.data={tmp_path}/data", f"out={tmp_path}/bundle.tar.xz"])
    assert not (tmp_path / "bundle.tar.xz").exists()
