"""States that are kept while responding are those that the cache computes, and are taken in their place."""

import pytest
import torch

from drafter.artifacts import rows
from drafter.artifacts.manifest import ArtifactError
from drafter.artifacts.storage import Folder
from drafter.data import target_cache
from drafter.data.batches import collate, response_sequence
from drafter.data.dialogues import Answered, Turn, rows_of
from drafter.data.engines import Limits, transformers_engine
from drafter.data.responses import schema, shards, write_responses
from drafter.data.states import states_engine
from drafter.data.target_cache import ExactFormat, SparseFormat, live_target, restore, write_cache
from drafter.models.loading import OutputEmbedding
from drafter.training.samples import Responses
from tests.conftest import capped, finished_rows, small_model
from tests.data.test_responses import HOW, LIMITS, requests

CACHED = {"batch_tokens": 40, "shard_size": 4, "seed": 0}


def respond(target, path, dtype, parts=None):
    """Write responses with states, or without if the dtype is None, and return their rows."""
    asked, folder = requests(9), Folder(path)
    engine = states_engine(target, LIMITS, 40, dtype, asked) if dtype else transformers_engine(target, LIMITS, 40)
    write_responses(engine, shards(asked, 3)[:parts], folder, schema(0.95, dtype), **HOW)
    return None if parts else finished_rows(folder, rows.finish(folder, 3, schema(0.95, dtype))[0], "respond")


def cache(target, responses, path, format, **how):
    folder = Folder(path)
    count, columns = write_cache(target, responses, folder, format, **{**CACHED, **how})
    files, notes = rows.finish(folder, count, columns)
    return finished_rows(folder, files, "cache"), sum(note.get("taken", 0) for note in notes)


@pytest.fixture(scope="module")
def place(target, tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def responses(target, place):
    return respond(target, place / "float32", "float32")


def test_the_responses_are_the_same_with_and_without_states(target, responses, tmp_path):
    without = respond(target, tmp_path, None)
    assert responses.schema.names == [*without.schema.names, "hidden"]
    for row, plain in zip(responses, without, strict=True):
        assert str({name: row[name] for name in plain}) == str(plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_taken_states_are_those_of_the_caches_own_pass(target, tmp_path, dtype):
    responses, format = respond(target, tmp_path / "responses", dtype), ExactFormat(dtype)
    only_head = OutputEmbedding(target.get_output_embeddings())
    taken, count = cache(only_head, responses, tmp_path / "taken", format, take_states=True)
    own, none = cache(target, respond(target, tmp_path / "plain", None), tmp_path / "own", format)
    assert (count, none) == (9, 0)
    assert taken.schema.equals(own.schema, check_metadata=True)
    for row, other in zip(taken, own, strict=True):
        assert row.keys() == other.keys()
        assert row["response_ids"].tolist() == other["response_ids"].tolist()
        (ours, log_z, top), (theirs, other_log_z, _) = (restore(one, taken.schema) for one in (row, other))
        assert ours.dtype == theirs.dtype == getattr(torch, dtype)
        # float32 differs by the order of sums; where that crosses a boundary, bfloat16 differs by one in 8 bits.
        tolerance = 1e-4 if dtype == "float32" else 2**-7
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(log_z, other_log_z, rtol=tolerance, atol=tolerance)
        # The other columns are those of the states that are stored.
        logits = target.lm_head(ours.float())
        torch.testing.assert_close(log_z, logits.logsumexp(-1))
        assert top.tolist() == logits.argmax(-1).tolist()


def test_the_target_runs_for_the_rows_without_states_alone(target, responses, tmp_path, monkeypatch):
    asked, run = [], target_cache._rows
    monkeypatch.setattr(
        target_cache, "_rows", lambda model, chosen, *how: asked.extend(chosen) or run(model, chosen, *how)
    )
    partly = [row | ({"hidden": []} if number % 3 == 0 else {}) for number, row in enumerate(responses)]
    folder = Folder(tmp_path / "partly")
    rows.write_shard(folder, 0, partly, responses.schema, {})
    found = finished_rows(folder, rows.finish(folder, 1, responses.schema)[0], "respond")
    mixed, count = cache(target, found, tmp_path / "mixed", ExactFormat("float32"), take_states=True)
    assert [row["id"] for row in asked] == [row["id"] for row in partly[::3]]
    assert count == 6
    whole, _ = cache(target, responses, tmp_path / "whole", ExactFormat("float32"))
    for row, other in zip(mixed, whole, strict=True):
        for ours, theirs in zip(*(restore(one, mixed.schema) for one in (row, other)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArtifactError, match=r"has \d+ response tokens, and its column 'hidden' has 0 numbers"):
        cache(OutputEmbedding(target.lm_head), found, tmp_path / "refused", ExactFormat("float32"), take_states=True)


@pytest.mark.parametrize("format", [SparseFormat(5, 3), ExactFormat("bfloat16")])
def test_another_format_computes_its_own(target, responses, tmp_path, format):
    plain = respond(target, tmp_path / "plain", None)
    cache(target, responses, tmp_path / "with", format)
    cache(target, plain, tmp_path / "without", format)
    for path in (tmp_path / "with").glob("0*"):
        assert path.read_bytes() == (tmp_path / "without" / path.name).read_bytes()


@pytest.mark.parametrize("damage", [lambda values: values[:-1], lambda values: values * float("nan")])
def test_states_that_are_not_the_responses_are_refused(target, responses, tmp_path, damage):
    folder, row = Folder(tmp_path / "responses"), responses[0]
    rows.write_shard(folder, 0, [row | {"hidden": damage(row["hidden"])}], responses.schema, {})
    found = finished_rows(folder, rows.finish(folder, 1, responses.schema)[0], "respond")
    with pytest.raises(ArtifactError, match=f"the row '{row['id']}' has .* instead of 32 finite ones"):
        cache(target, found, tmp_path / "cache", ExactFormat("float32"), take_states=True)


def test_an_interrupted_run_leaves_the_same_files(target, responses, place, tmp_path):
    respond(target, tmp_path, "float32", parts=2)
    (tmp_path / "00001.json").unlink()
    respond(target, tmp_path, "float32")
    for path in (place / "float32").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_training_with_the_live_target_does_not_read_the_states(responses):
    samples = Responses(responses, "train")
    assert [one.cached_N for one in samples.__getitems__([0, 1])] == [None, None]


def test_targets_that_cannot_keep_their_states_are_refused(target):
    with pytest.raises(ValueError, match=r"respond.states: Capped changes its logits"):
        states_engine(capped(target), LIMITS, 40, "bfloat16", requests())
    sliding = small_model(3)
    sliding.config.sliding_window = 4
    with pytest.raises(ValueError, match=r"needs generation side by side, give null: .* the last 4 tokens"):
        states_engine(sliding, LIMITS, 40, "bfloat16", requests())


def test_later_turns_that_are_too_long_have_no_states(target):
    engine = states_engine(target, Limits(1.0, 4, [7]), 40, "float32", requests()[:1])
    target.config.sliding_window = 20
    try:
        longer = [requests()[0]._replace(prompt_ids=[9] * 18)]
        assert isinstance(engine(longer)[0], list)
    finally:
        del target.config.sliding_window


def test_the_states_of_a_conversation_are_those_of_its_turns_in_one_sequence(target):
    """The second turn begins with the first one: a row. The third does not: another row."""
    asked = requests(3)
    turns, prompt = [], [11, 12, 13]
    for number in range(3):
        prompt = [15, 16] if number == 2 else prompt
        engine = states_engine(target, Limits(1.0, 5, []), 40, "float32", asked)
        ((tokens, hidden_NH),) = engine([asked[0]._replace(prompt_ids=prompt, temperature=0.0)])
        turns.append(Turn(prompt, tokens, hidden_NH))
        prompt = [*prompt, *tokens, 21, 22]
    found = rows_of(Answered(asked[0], turns, None, None), [])
    assert [row["turns"] for row in found] == [[3, 5, 2, 5], [2, 5]]
    for row in found:
        batch = collate(
            [response_sequence({name: row[name] for name in ("prompt_ids", "response_ids", "turns", "temperature")})]
        )
        expected_NH = live_target(target, batch, plain_head=True)[0]
        torch.testing.assert_close(torch.tensor(row["hidden"]).view(-1, 32), expected_NH, rtol=1e-4, atol=1e-4)
    without = rows_of(Answered(asked[0], [turns[0], turns[1]._replace(hidden_NH=None)], None, None), [])
    assert [row["hidden"] for row in without] == [[]]
