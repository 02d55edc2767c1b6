"""A stage writes a cache to an S3-compatible store, and two ranks train from it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from moto.server import ThreadedMotoServer
from transformers import AutoModelForCausalLM

from drafter.artifacts.manifest import ArtifactError
from drafter.artifacts.rows import Rows
from drafter.artifacts.storage import Folder
from tests.experiments.test_pipeline import stage
from tests.training.test_ddp import TORCHRUN


@pytest.fixture(scope="module")
def bucket():
    """Start a server, and return the URL of an empty bucket in it."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    import s3fs

    s3fs.S3FileSystem().mkdir("drafter-test")
    yield "s3://drafter-test"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def remote(world, bucket):
    """Make the cache of `world` again in the bucket."""
    overrides, _ = world
    stage("cache", [*overrides, f"out={bucket}/cache"])
    return f"{bucket}/cache"


def test_a_stage_writes_the_same_files_to_a_store_as_to_a_disk(world, remote):
    _, root = world
    here = {path.name: path.read_bytes() for path in (root / "cache").iterdir()}
    there = {name: Folder(remote).read(name) for name in Folder(remote).sizes()}
    assert there.keys() == here.keys()
    for name in here.keys() - {"manifest.json"}:
        assert there[name] == here[name]
    ours, theirs = (json.loads(files["manifest.json"]) for files in (here, there))
    same = {"stage", "settings", "inputs", "files", "counts"}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert ours.keys() == theirs.keys()


def test_a_finished_cache_in_a_store_is_skipped_and_another_identity_is_refused(world, remote):
    overrides, _ = world
    before = Folder(remote).read("manifest.json")
    stage("cache", [*overrides, f"out={remote}"])
    with pytest.raises(ArtifactError, match=r"s3://drafter-test/cache was made differently \(settings.shard_size"):
        stage("cache", [*overrides, f"out={remote}", "cache.shard_size=7"])
    assert Folder(remote).read("manifest.json") == before


@pytest.mark.end_to_end
def test_two_ranks_that_stream_train_the_same_drafter_as_one_process_from_disk(world, remote, tmp_path):
    overrides, _ = world
    command = ["-m", "experiments.finetune", *overrides, "loss=tvdpp", "finetune.max_steps=6", "finetune.num_workers=1"]
    where = [f"inputs.cache={remote}", "inputs.responses=nowhere", f"out={tmp_path}/two"]
    result = subprocess.run([*TORCHRUN, *command, *where], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    stage("finetune", [*command[2:], f"out={tmp_path}/one"])
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for key in one:
        # Two ranks add the same gradients in another order, in six steps of AdamW.
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)


def test_damage_in_a_store_is_detected(remote):
    folder = Folder(remote)
    data = bytearray(folder.read("00001.arrow"))
    data[-20] ^= 1
    folder.write("00001.arrow", bytes(data))
    rows = Rows(remote, "cache")
    with pytest.raises(ArtifactError, match=r"s3://drafter-test/cache/00001.arrow is damaged: row"):
        rows.read(range(len(rows)))
    folder.remove("00001.arrow")
    with pytest.raises(ArtifactError, match=r"00001.arrow is damaged: it is missing"):
        Rows(remote, "cache")


def test_the_error_names_an_unknown_kind_of_store():
    script = "from drafter.artifacts.manifest import read_manifest; read_manifest('gs3://nowhere/cache', 'cache')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert "gs3" in result.stderr.splitlines()[-1]
