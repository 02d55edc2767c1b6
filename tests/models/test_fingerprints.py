"""A model's fingerprint depends on every file that loading it may read, and on nothing else."""

import os

import pytest

from drafter.artifacts.manifest import MANIFEST, STARTED
from drafter.models import fingerprints, source
from drafter.models.fingerprints import file_checksum, model_fingerprint, tokenizer_fingerprint
from drafter.models.source import ModelSource


def model_directory(path, weights=b"w", tokenizer="{}", template="chat"):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_bytes(weights)
    (path / "tokenizer.json").write_text(tokenizer)
    (path / "chat_template.jinja").write_text(template)
    return str(path)


def test_the_model_fingerprint_differs_with_weights_and_the_tokenizer_fingerprint_does_not(tmp_path):
    one, other = model_directory(tmp_path / "one"), model_directory(tmp_path / "other", weights=b"v")
    assert model_fingerprint(one) != model_fingerprint(other)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)


@pytest.mark.parametrize("changed", [{"tokenizer": '{"a": 1}'}, {"template": "another"}])
def test_both_fingerprints_differ_with_the_tokenizer_or_the_chat_template(tmp_path, changed):
    one, other = model_directory(tmp_path / "one"), model_directory(tmp_path / "other", **changed)
    assert model_fingerprint(one) != model_fingerprint(other)
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)


def test_the_model_fingerprint_does_not_depend_on_the_directory_or_on_stage_records(tmp_path):
    one, moved = model_directory(tmp_path / "one"), model_directory(tmp_path / "moved")
    (tmp_path / "moved" / MANIFEST).write_text('{"seconds": 3}')
    (tmp_path / "moved" / STARTED).write_text("{}")
    assert model_fingerprint(one) == model_fingerprint(moved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "modeling_own.py", "vocab.txt", "extra.json"])
def test_the_model_fingerprint_includes_files_that_loading_may_read(tmp_path, name):
    one = model_directory(tmp_path / "one")
    before = model_fingerprint(one)
    (tmp_path / "one" / name).write_bytes(b"a")
    with_it = model_fingerprint(one)
    (tmp_path / "one" / name).write_bytes(b"b")
    assert len({before, with_it, model_fingerprint(one)}) == 3


@pytest.mark.parametrize(
    "name", ["README.md", "trim.png", "notes", ".lock", "logs/metrics.csv", "steps/kept/config.json"]
)
def test_the_model_fingerprint_leaves_out_files_that_loading_does_not_read(tmp_path, name):
    one = model_directory(tmp_path / "one")
    before = model_fingerprint(one)
    (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "one" / name).write_bytes(b"a")
    assert model_fingerprint(one) == before


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replace the hub by one with a moving branch, and return the list of its commits, the head last."""
    commits = ["a" * 40]
    monkeypatch.setattr(
        source, "cached_file", lambda path, name, revision: f"{tmp_path}/{path}/snapshots/{commits[-1]}/{name}"
    )
    source.hub_commit.cache_clear()
    yield commits
    source.hub_commit.cache_clear()


def test_a_hub_model_is_identified_by_name_and_commit(hub):
    before = model_fingerprint("owner/model")
    assert model_fingerprint(ModelSource("owner/model", "a" * 40)) == before  # the same commit, given explicitly
    assert model_fingerprint("owner/other") != before
    assert tokenizer_fingerprint("owner/model") == before
    source.hub_commit.cache_clear()  # as in another process, after the branch has moved
    hub.append("b" * 40)
    assert model_fingerprint("owner/model") != before


def test_all_files_of_a_hub_model_are_read_at_one_commit_even_if_its_branch_moves(hub):
    model = ModelSource("owner/model", "main", trust_remote_code=True)
    assert model.where() == {
        "pretrained_model_name_or_path": "owner/model",
        "revision": "a" * 40,
        "trust_remote_code": True,
    }
    hub.append("b" * 40)
    assert model.where()["revision"] == "a" * 40


def test_a_hub_model_that_cannot_be_reached_is_named(monkeypatch):
    def offline(path, name, revision):
        raise OSError("no connection")

    monkeypatch.setattr(source, "cached_file", offline)
    with pytest.raises(OSError, match="cannot load 'no/such-model'") as refusal:
        model_fingerprint("no/such-model")
    assert "no connection" in str(refusal.value)


def test_a_large_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(fingerprints, "LARGE", 4)
    monkeypatch.setattr(fingerprints, "sha256", lambda path: reads.append(path) or f"{len(reads)}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"12345678")
    assert [file_checksum(weights) for _ in range(3)] == ["1", "1", "1"]
    times = weights.stat()
    weights.write_bytes(b"87654321")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and modification time, as after rsync
    assert [file_checksum(weights) for _ in range(2)] == ["2", "2"]


def test_if_the_cache_cannot_be_written_files_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "LARGE", 4)
    (tmp_path / "cache").write_text("a file instead of a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "w.bin").write_bytes(b"12345678")
    assert file_checksum(tmp_path / "w.bin") == fingerprints.sha256(tmp_path / "w.bin")
