import hashlib
import json
import os

import pytest

from drafter.artifacts.manifest import (
    STARTED,
    ArtifactError,
    Stage,
    fingerprint,
    read_jsonl,
    read_manifest,
    require,
    write_json,
    write_jsonl,
)

SETTINGS = {"batch_size": 4, "temperatures": [0.0, 1.0]}
INPUTS = {"data": "aaaa", "target": "bbbb"}


def snapshot(directory):
    """Return content and modification time of every file. They change if anything is written."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def finished(directory, content="one", name="respond", settings=SETTINGS, inputs=INPUTS):
    stage = Stage(directory, name, settings, inputs)
    write_jsonl(directory / "rows.jsonl", [{"text": content}])
    stage.finish(counts={"rows": 1})
    return directory


def test_a_new_directory_is_made_and_is_not_complete(tmp_path):
    stage = Stage(tmp_path / "deep" / "out", "respond", SETTINGS, INPUTS)
    assert not stage.complete
    started = json.loads((tmp_path / "deep" / "out" / STARTED).read_text())
    assert started == {
        "stage": "respond",
        "settings": SETTINGS,
        "inputs": INPUTS,
        "began": stage.began,
        "seconds": 0,
    }


def test_a_complete_directory_is_skipped_and_left_unchanged(tmp_path):
    before = snapshot(finished(tmp_path))
    assert Stage(tmp_path, "respond", SETTINGS, INPUTS).complete
    assert snapshot(tmp_path) == before
    assert STARTED not in before


def test_an_interrupted_directory_is_resumed_with_what_it_has(tmp_path):
    Stage(tmp_path, "respond", SETTINGS, INPUTS)
    write_jsonl(tmp_path / "00000.jsonl", [{"text": "before the interruption"}])
    again = Stage(tmp_path, "respond", SETTINGS, INPUTS)
    assert not again.complete
    assert read_jsonl(tmp_path / "00000.jsonl") == [{"text": "before the interruption"}]
    again.finish()
    assert Stage(tmp_path, "respond", SETTINGS, INPUTS).complete
    assert not (tmp_path / STARTED).exists()


def test_the_seconds_of_an_interrupted_directory_are_those_of_all_its_processes(tmp_path, monkeypatch):
    clock = iter([1000.0, 5000.0, 9000.0, 9001.0])  # the starts of three processes, and the end of the third
    monkeypatch.setattr("drafter.artifacts.manifest.time.time", lambda: next(clock))
    for number, written in enumerate((1060.0, 5007.0)):  # two processes that are killed after 60 and 7 seconds
        Stage(tmp_path, "respond", SETTINGS, INPUTS)._release()
        write_jsonl(tmp_path / f"0000{number}.jsonl", [{"text": "before the interruption"}])
        os.utime(tmp_path / f"0000{number}.jsonl", (written, written))
        os.utime(tmp_path / "00000.jsonl", (1060.0, 1060.0))
    Stage(tmp_path, "respond", SETTINGS, INPUTS).finish()
    assert read_manifest(tmp_path, "respond")["seconds"] == 60 + 7 + 1


def test_a_claim_without_content_does_not_hold_the_directory(tmp_path):
    Stage(tmp_path, "respond", SETTINGS, INPUTS)
    Stage(tmp_path, "respond", {**SETTINGS, "batch_size": 8}, INPUTS).finish()
    assert Stage(tmp_path, "respond", {**SETTINGS, "batch_size": 8}, INPUTS).complete


def test_settings_are_compared_as_json_so_that_a_tuple_is_a_list(tmp_path):
    finished(tmp_path)
    assert Stage(tmp_path, "respond", {**SETTINGS, "temperatures": (0.0, 1.0)}, INPUTS).complete


@pytest.mark.parametrize("interrupted", [False, True], ids=["complete", "interrupted"])
@pytest.mark.parametrize(
    ("name", "settings", "inputs", "named"),
    [
        ("respond", {**SETTINGS, "batch_size": 8}, INPUTS, ["settings.batch_size", "found 4", "requested 8"]),
        ("respond", SETTINGS, {**INPUTS, "data": "cccc"}, ["inputs.data", "found 'aaaa'", "requested 'cccc'"]),
        ("respond", SETTINGS, {"data": "aaaa"}, ["inputs.target", "found 'bbbb'", "requested None"]),
        ("cache", SETTINGS, INPUTS, ["stage", "found 'respond'", "requested 'cache'"]),
    ],
    ids=["settings", "inputs", "fewer-inputs", "stage"],
)
def test_a_directory_made_differently_is_refused_and_left_untouched(
    tmp_path, interrupted, name, settings, inputs, named
):
    if interrupted:
        Stage(tmp_path, "respond", SETTINGS, INPUTS)
        write_jsonl(tmp_path / "00000.jsonl", [{"text": "before the interruption"}])
    else:
        finished(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError) as refusal:
        Stage(tmp_path, name, settings, inputs)
    for part in (*named, str(tmp_path), "Nothing was changed"):
        assert part in str(refusal.value)
    assert snapshot(tmp_path) == before


def test_the_refusal_names_only_the_settings_that_differ(tmp_path):
    finished(tmp_path)
    with pytest.raises(ArtifactError) as refusal:
        Stage(tmp_path, "respond", {**SETTINGS, "batch_size": 8}, INPUTS)
    assert "temperatures" not in str(refusal.value)
    assert "target" not in str(refusal.value)


def test_the_manifest_checksums_content_files_and_leaves_logs_out(tmp_path):
    stage = Stage(tmp_path, "pretrain", SETTINGS, INPUTS)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "extra.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("not content")
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "a.jsonl").write_text('{"x": 1}\n')
    stage.finish(counts={"rows": 1})
    manifest = read_manifest(tmp_path, "pretrain")
    assert manifest["files"] == {"shard/a.jsonl": hashlib.sha256(b'{"x": 1}\n').hexdigest()}
    assert manifest["counts"] == {"rows": 1}
    assert {"argv", "commit", "versions", "finished"} <= manifest["environment"].keys()
    assert manifest["seconds"] >= 0


def test_finish_takes_the_checksums_that_it_is_given(tmp_path):
    stage = Stage(tmp_path, "prepare", SETTINGS, INPUTS)
    for name in ("a.json", "b.json"):
        write_json(tmp_path / name, name)
    stage.finish(files={"b.json": "1234"})
    assert read_manifest(tmp_path, "prepare")["files"] == {"b.json": "1234"}


def test_a_missing_manifest_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ArtifactError, match=r"python -m experiments\.respond") as refusal:
        read_manifest(tmp_path / "nowhere", "respond")
    assert str(tmp_path / "nowhere") in str(refusal.value)


def test_an_interrupted_stage_cannot_be_read(tmp_path):
    Stage(tmp_path, "respond", SETTINGS, INPUTS)
    with pytest.raises(ArtifactError, match="no finished 'respond'"):
        read_manifest(tmp_path, "respond")


def test_a_manifest_of_another_stage_is_refused_with_both_names(tmp_path):
    finished(tmp_path)
    with pytest.raises(ArtifactError, match=r"stage 'respond', expected 'cache'"):
        read_manifest(tmp_path, "cache")


def test_the_fingerprint_is_equal_for_equal_content_and_changes_with_each_part(tmp_path):
    prints = {
        "same": fingerprint(finished(tmp_path / "a"), "respond"),
        "again": fingerprint(finished(tmp_path / "b"), "respond"),
        "content": fingerprint(finished(tmp_path / "c", content="two"), "respond"),
        "settings": fingerprint(finished(tmp_path / "d", settings={"batch_size": 5}), "respond"),
        "inputs": fingerprint(finished(tmp_path / "e", inputs={"data": "x"}), "respond"),
    }
    assert prints["same"] == prints["again"]
    assert len(set(prints.values())) == 4
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in prints.values())


def test_require_accepts_equal_and_names_both_sides_otherwise():
    require("runs/responses", "target", "aaaa", "aaaa")
    with pytest.raises(ArtifactError) as refusal:
        require("runs/responses", "target", "aaaa", "bbbb")
    for part in ("runs/responses", "target aaaa", "target is bbbb"):
        assert part in str(refusal.value)


def test_json_files_roundtrip_are_overwritten_and_leave_no_temporary_files(tmp_path):
    value = {"γ": [1, 2.5, None], "nested": {"a": True}}
    rows = [{"text": "line\nbreak"}, {"text": "é"}, {}]
    for _ in range(2):
        write_json(tmp_path / "value.json", value)
        write_jsonl(tmp_path / "folder" / "rows.jsonl", rows)
    assert json.loads((tmp_path / "value.json").read_text()) == value
    assert read_jsonl(tmp_path / "folder" / "rows.jsonl") == rows
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["rows.jsonl", "value.json"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "value.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"new": object()})
    assert json.loads((tmp_path / "value.json").read_text()) == {"old": 1}
