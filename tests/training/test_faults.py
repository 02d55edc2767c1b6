"""Failures and the state they leave: killed processes, damaged files, full disks, second writers, wrong inputs."""

import contextlib
import csv
import errno
import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafter.artifacts import locks, storage
from drafter.artifacts.manifest import STARTED, ArtifactError, Stage
from drafter.artifacts.storage import Folder, write_file
from tests.conftest import WORDS, save_target
from tests.experiments.test_pipeline import snapshot, stage

pytestmark = pytest.mark.end_to_end

# Forked processes have everything imported, so that a run takes no time for imports.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.training.test_faults", "experiments.pipeline"])
KILLS = 5  # per stage

STEPS = {
    "respond": ["respond.num_responses=60", "respond.shard_size=4"],
    "cache": ["cache.shard_size=2"],
    "pretrain": ["pretrain.max_steps=24", "pretrain.validate_every=4"],
    "finetune": ["finetune.max_steps=26", "finetune.validate_every=4", "loss=tvdpp", "loss.estimator=sampled"],
}


def run_stage(name, overrides):
    torch.set_num_threads(1)
    stage(name, overrides)


def started(name, overrides):
    process = FORKED.Process(target=run_stage, args=(name, overrides))
    process.start()
    return process


def curve(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def content(folder):
    """Return all files, and those fields of the manifest that do not depend on time and machine."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            files["manifest"] = {key: manifest[key] for key in ("stage", "settings", "inputs", "files", "counts")}
        elif path.name == "metrics.csv":
            files["curve"] = curve(path)
        elif path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def run_to_the_end(name, overrides):
    process = started(name, overrides)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("name", STEPS)
def test_a_run_that_is_killed_repeatedly_ends_as_an_uninterrupted_one(world, tmp_path, name):
    overrides, _ = world
    command = [*overrides, *STEPS[name]]
    run_to_the_end(name, [*command, f"out={tmp_path}/warm"])
    began = time.monotonic()
    run_to_the_end(name, [*command, f"out={tmp_path}/uninterrupted"])
    length, expected = time.monotonic() - began, content(tmp_path / "uninterrupted")
    moments, killed, folder = random.Random(name), 0, tmp_path / "killed0"
    while killed < KILLS:
        process = started(name, [*command, f"out={folder}"])
        time.sleep(moments.uniform(0.1, 1.0) * length)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it finished before it was killed: start another
            assert content(folder) == expected
            folder = tmp_path / f"killed{killed}"
    run_to_the_end(name, [*command, f"out={folder}"])
    again = content(folder)
    assert again.keys() == expected.keys()
    for part in expected:
        assert again[part] == expected[part], part


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_what_a_run_that_was_killed_right_after_its_end_has_left_is_removed(world, tmp_path, name):
    overrides, _ = world
    out = tmp_path / "out"
    command = [*overrides, *STEPS[name], f"out={out}"]
    run_to_the_end(name, command)
    before = content(out)
    (out / "checkpoints").mkdir()
    for left in ("checkpoints/last.ckpt", locks.LOCK, locks.MARKER, STARTED):
        (out / left).touch()
    run_to_the_end(name, command)
    assert not (out / "checkpoints").exists()
    assert content(out) == before


def test_a_resumed_curve_has_each_step_once(world, tmp_path):
    overrides, _ = world
    command = [*overrides, *STEPS["finetune"], f"out={tmp_path}/out"]
    process = started("finetune", command)
    while not (tmp_path / "out" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "out" / "manifest.json").exists()
    process = started("finetune", command)
    process.join()
    rows = curve(tmp_path / "out" / "logs" / "metrics.csv")
    validated = [int(row["step"]) for row in rows if row["val/acceptance_rate"]]
    trained = [int(row["step"]) for row in rows if row["train/loss"]]
    # By Lightning's step numbers. The first and the last validation are extra.
    assert validated == [0, 3, 7, 11, 15, 19, 23, 26]
    assert trained == [9, 19]


@pytest.fixture
def copied(world, tmp_path):
    """Return a copy of the cache, which a test may damage."""
    _, root = world
    for path in (root / "cache").iterdir():
        write_file(tmp_path / "cache" / path.name, path.read_bytes())
    return tmp_path / "cache"


def flip(path):
    """Flip a bit in the last value of the last row."""
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"0000\d.arrow is damaged: row '.*', bytes \d+ to \d+, has changed since it was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), r"is damaged: it has 1000 bytes, not"),
        (lambda path: path.unlink(), "is damaged: it is missing"),
    ],
    ids=["flipped bit", "cut", "missing"],
)
def test_a_damaged_cache_stops_finetuning_with_the_file_and_the_remedy(world, tmp_path, copied, damage, message):
    overrides, _ = world
    command = [*overrides, f"inputs.cache={copied}", f"out={tmp_path}/out", "loss=kld", "finetune.max_steps=30"]
    for path in copied.glob("*.arrow"):
        damage(path)
    before = snapshot(copied)
    with pytest.raises(ArtifactError, match=message) as refusal:
        stage("finetune", command)
    assert "rename" in str(refusal.value)
    assert snapshot(copied) == before
    assert not list(tmp_path.glob("out/manifest.json"))


def test_a_damaged_shard_is_made_again_as_the_error_says_and_the_others_are_kept(world, tmp_path, copied):
    overrides, root = world
    wanted = content(root / "cache")
    flip(copied / "00000.arrow")
    (copied / "manifest.json").rename(copied / "started.json")
    (copied / "00000.arrow").unlink()
    kept = (copied / "00001.arrow").stat().st_mtime_ns
    stage("cache", [*overrides, f"out={copied}"])
    assert content(copied) == wanted
    assert (copied / "00001.arrow").stat().st_mtime_ns == kept


@contextlib.contextmanager
def full_disk(name):
    """Make writing a file of that name fail for lack of space."""

    def temporary_path(path):
        temporary = storage_path(path)
        if path.name == name:
            temporary.symlink_to("/dev/full")
        return temporary

    storage_path = storage.temporary_path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "temporary_path", temporary_path)
        yield


def test_a_full_disk_stops_with_the_file_and_the_remedy_and_keeps_what_was_written(world, tmp_path):
    overrides, _ = world
    command = [*overrides, f"out={tmp_path}/out", "cache.shard_size=8"]
    with (
        full_disk("00003.arrow"),
        pytest.raises(
            OSError, match=r"cannot write .*00003.arrow \(No space left on device\).* free some space"
        ) as refusal,
    ):
        stage("cache", command)
    assert refusal.value.errno == errno.ENOSPC
    del refusal  # its frames keep the stage and its lock alive
    gc.collect()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"00002.arrow", "00002.json"} < names
    assert not {"00003.arrow", "00003.json", "manifest.json"} & names
    kept = (tmp_path / "out" / "00002.arrow").stat().st_mtime_ns
    stage("cache", command)
    assert (tmp_path / "out" / "00002.arrow").stat().st_mtime_ns == kept
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".arrow", ".json", ".parquet"}


def hold(folder, ready, done):
    claim = Stage(folder, "respond", {}, {})
    ready.set()
    done.wait()
    claim.finish()


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    ready, done = FORKED.Event(), FORKED.Event()
    process = FORKED.Process(target=hold, args=(str(tmp_path), ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ArtifactError, match=rf"process {process.pid} on .* is writing to .*Nothing was changed"):
        Stage(tmp_path, "respond", {}, {})
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    Stage(tmp_path, "respond", {}, {}).finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json"]


@pytest.mark.parametrize("refusal", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_a_marker_file_refuses_a_second_writer(tmp_path, monkeypatch, refusal):
    """A marker of a process that has ended is ignored."""

    def no_locks(lock):
        Path(lock.lock_file).touch()
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(locks.FileLock, "_acquire", no_locks)
    (tmp_path / "one").mkdir()
    ended = FORKED.Process(target=print)
    ended.start()
    ended.join()
    (tmp_path / "one" / locks.MARKER).write_text(f"{ended.pid}\n{socket.gethostname()}\n")
    claim = Stage(tmp_path / "one", "respond", {}, {})
    assert not (tmp_path / "one" / locks.LOCK).exists()
    with pytest.raises(ArtifactError, match=rf"process {os.getpid()} on .* is writing to .*Nothing was changed"):
        Stage(tmp_path / "one", "respond", {}, {})
    claim.finish()
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["manifest.json"]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / locks.MARKER).write_text("77\nelsewhere\n")
    with pytest.raises(ArtifactError, match=r"77 on elsewhere \(if it has ended, remove .*two/\.lock\.marker\)"):
        Stage(tmp_path / "two", "respond", {}, {})


def test_ranks_beside_the_first_neither_lock_nor_record(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    claim = Stage(tmp_path, "respond", {}, {})
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    Stage(tmp_path, "respond", {}, {}).finish()
    del claim


def test_temporary_names_differ_between_machines_and_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.socket, "gethostname", lambda: "one")
    assert ".one." in storage.temporary_path(tmp_path / "a").name
    assert storage.temporary_path(tmp_path / "a") != storage.temporary_path(tmp_path / "a")


def test_files_of_unknown_origin_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match=r"has files but neither manifest\.json nor started\.json"):
        Stage(tmp_path, "respond", {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def broken_target(world, folder):
    """Save the world's target with one weight that is NaN. Return the overrides and the root."""
    overrides, root = world
    save_target(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.transformer.wte.weight.data[3, 5] = float("nan")
    model.save_pretrained(folder)
    return [*overrides, f"target.path={folder}"], root


@pytest.mark.parametrize("name", ["respond", "cache", "finetune"])
def test_a_target_with_logits_that_are_not_finite_is_refused_by_every_stage(world, tmp_path, name):
    command, root = broken_target(world, tmp_path / "broken")
    if name != "respond":  # responses that claim to be from the broken target
        for path in (root / "responses").iterdir():
            write_file(tmp_path / "responses" / path.name, path.read_bytes())
        from drafter.models.fingerprints import model_fingerprint

        manifest = json.loads((tmp_path / "responses" / "manifest.json").read_text())
        manifest["inputs"]["target"] = model_fingerprint(str(tmp_path / "broken"))
        (tmp_path / "responses" / "manifest.json").write_text(json.dumps(manifest))
        command = [*command, f"inputs.responses={tmp_path}/responses"]
    extra = {"finetune": ["inputs.cache=null", "loss=kld"]}.get(name, [])
    with pytest.raises(ValueError, match="not finite"):
        stage(name, [*command, *extra, f"out={tmp_path}/out"])
    assert not list((tmp_path / "out").glob("manifest.json"))
    assert not list((tmp_path / "out").glob("*.arrow"))


def test_a_cache_of_another_tokenizer_or_target_is_refused(world, tmp_path):
    overrides, _ = world
    save_target(tmp_path / "other", [*WORDS, "new"])
    with pytest.raises(ArtifactError, match="was made with the tokenizer"):
        stage("finetune", [*overrides, f"target.path={tmp_path}/other", f"out={tmp_path}/out", "loss=kld"])
    save_target(tmp_path / "reseeded", seed=1)
    with pytest.raises(ArtifactError, match=r"cache was made with the target"):
        stage("finetune", [*overrides, f"target.path={tmp_path}/reseeded", f"out={tmp_path}/out", "loss=kld"])


def test_a_drafter_without_the_padding_of_its_targets_vocabulary_is_refused(world, tmp_path):
    overrides, root = world
    drafter = AutoModelForCausalLM.from_pretrained(root / "drafter")
    drafter.resize_token_embeddings(len(WORDS))
    drafter.save_pretrained(tmp_path / "narrow")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_file(tmp_path / "narrow" / name, (root / "drafter" / name).read_bytes())
    with pytest.raises(ValueError, match=rf"the target has 24, the drafter {len(WORDS)}. Give pad_vocabulary=true"):
        stage("finetune", [*overrides, f"inputs.drafter={tmp_path}/narrow", f"out={tmp_path}/out", "loss=kld"])


class Malice:
    def __reduce__(self):
        return (os.system, ("echo executed",))


def test_weights_that_would_run_code_are_refused(tmp_path):
    save_target(tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()
    torch.save({"wte.weight": Malice()}, tmp_path / "target" / "pytorch_model.bin")
    from drafter.models.loading import load_target

    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load_target(str(tmp_path / "target"))


def test_a_sparse_cache_is_refused_at_the_start_for_a_loss_that_it_would_bias(world, tmp_path):
    overrides, _ = world
    stage("cache", [*overrides, f"out={tmp_path}/sparse", "cache=sparse", "cache.format.top_k=4"])
    counts = json.loads((tmp_path / "sparse" / "manifest.json").read_text())["counts"]
    assert 0 < counts["undecided_mass"] < 1
    command = [*overrides, f"inputs.cache={tmp_path}/sparse", "finetune.max_steps=3"]
    with pytest.raises(ValueError, match="loss 'nla' of a sparse target would be biased"):
        stage("finetune", [*command, "loss=nla", f"out={tmp_path}/nla"])
    assert not (tmp_path / "nla").exists()
    stage("finetune", [*command, "loss=tvd", f"out={tmp_path}/tvd"])
    assert 0 < json.loads((tmp_path / "tvd" / "manifest.json").read_text())["counts"]["val/acceptance_rate"] < 1


def test_respond_counts_what_it_skips_and_refuses_when_nothing_is_left(world, tmp_path):
    overrides, _ = world
    stage("respond", [*overrides, f"out={tmp_path}/out", "respond.max_new_tokens=40"])
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts["skipped"].keys() == {"prompt and max_new_tokens exceed the context of 64"}
    assert counts["asked"] == counts["written"] + sum(counts["skipped"].values()) + sum(counts["failed"].values())
    assert counts["asked"] == 64 + 6
    with pytest.raises(ValueError, match=r"each of the 64 train prompts exceeds the context of 64 tokens"):
        stage("respond", [*overrides, f"out={tmp_path}/none", "respond.max_new_tokens=64"])


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    folder = Folder(tmp_path / "new")
    folder.write("a", b"old")
    with full_disk("a"), pytest.raises(OSError, match="No space left"):
        folder.write("a", b"new")
    assert folder.read("a") == b"old"
    assert folder.sizes() == {"a": 3}
