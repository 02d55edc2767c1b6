"""The respond command with a served target: what it checks, what identifies its run, and what it writes."""

import json
import shutil

import pytest
from hydra import initialize_config_module

from drafter.models.loading import load_tokenizer
from experiments.running.composing import configured
from experiments.running.responding import check, settings_of
from tests.data.stub_server import MODEL, Stub
from tests.experiments.test_pipeline import stage

KEY = "sk-a-secret-of-the-test"
SERVED = ["respond.engine=openai", "respond.openai.url=http://127.0.0.1:9/v1", f"respond.openai.model={MODEL}"]


def composed(overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return configured("respond", overrides)


def test_where_the_server_is_and_how_it_is_asked_does_not_identify_a_run(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    how = ["url=http://elsewhere:1/v1", "concurrency=99", "patience=1", "timeout=1", "retries=0"]
    one = settings_of(composed(SERVED))
    assert one == settings_of(composed([*SERVED, *(f"respond.openai.{value}" for value in how)]))
    assert one["openai"] == {"model": MODEL}
    assert KEY not in str(one)
    assert "openai" not in settings_of(composed([]))  # runs with other engines are what they were


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("respond.openai.url=null", r"respond\.openai\.url is None, must be the address"),
        ("respond.openai.model=null", r"respond\.openai\.model is None, must be the name"),
        ("respond.openai.concurrency=0", "must be at least 1"),
        ("respond.openai.timeout=0", "must be above 0 seconds"),
        ("respond.openai.retries=-1", "must be at least 0"),
        ("respond.openai.patience=-1", "must be at least 0 seconds"),
        ("target.parallel=tensor", r"target\.parallel=tensor, must be null"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(change, message):
    check(composed(SERVED))
    with pytest.raises(ValueError, match=message):
        check(composed([*SERVED, change]))


def test_the_command_writes_the_responses_of_a_target_without_weights_that_is_served(world, tmp_path, monkeypatch):
    overrides, root = world
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for path in (root.parent / "target").iterdir():
        if path.suffix == ".json":  # all but the weights
            shutil.copy(path, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    with Stub(tokenizer, 0) as stub:
        stub.answer_text = lambda ids, seed: "the cat saw a bird ."
        served = [*SERVED, f"respond.openai.url={stub.url}", f"out={tmp_path}/out", f"target.path={tmp_path}"]
        stage("respond", [*overrides, *served])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["openai"] == {"model": MODEL}
    assert manifest["counts"]["written"] == manifest["counts"]["asked"] > 0
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written
