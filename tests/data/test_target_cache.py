"""A cache holds the distributions that the live target computes: exactly, or in expectation."""

import json
import math

import pytest
import torch

from drafter.artifacts import rows
from drafter.artifacts.manifest import ArtifactError
from drafter.artifacts.storage import Folder
from drafter.data import dealing, target_cache
from drafter.data.batches import collate, response_sequence
from drafter.data.columns import number_column
from drafter.data.responses import schema
from drafter.data.target_cache import (
    ExactFormat,
    SparseFormat,
    live_target,
    normalise,
    require_output_embedding,
    restore,
    target_at,
    write_cache,
)
from drafter.losses.chunked import Head
from drafter.losses.distributions import Sparse
from drafter.losses.divergences import acceptance_rate, kld
from drafter.models.loading import embedding_checksum
from tests.conftest import capped, finished_rows, small_model

HOW = {"batch_tokens": 20, "shard_size": 3, "seed": 0}
ROWS = [
    {
        "id": str(number),
        "kind": "k",
        "split": "train",
        "temperature": 1.0,
        "prompt_ids": [1] * (1 + number % 3),
        "response_ids": list(range(2, 4 + number % 4)),
        "turns": [1 + number % 3, 2 + number % 4],
        "truncated": False,
    }
    for number in range(7)
]


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("responses"))
    for number in (0, 1):
        rows.write_shard(folder, number, ROWS[4 * number : 4 * number + 4], schema(0.95), {})
    return finished_rows(folder, rows.finish(folder, 2, schema(0.95))[0], "respond")


def cached(target, responses, path, format, **how):
    folder = Folder(path)
    count, schema = write_cache(target, responses, folder, format, **{**HOW, **how})
    return finished_rows(folder, rows.finish(folder, count, schema)[0], "cache")


def batch_of(found, order):
    return collate([response_sequence(row, restore(row, found.schema)) for row in found.read(order)])


def live(target, responses, order):
    batch = collate([response_sequence(row) for row in responses.read(order)])
    return live_target(target, batch, plain_head=True)[1](slice(None))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 3e-3), ("bfloat16", 2e-2)])
def test_exact_logits_equal_the_live_ones_in_any_order(target, responses, tmp_path, dtype, tolerance):
    found = cached(target, responses, tmp_path, ExactFormat(dtype))
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 5]):
        ours, theirs = target_at(target, batch_of(found, order))(slice(None)), live(target, responses, order)
        # bfloat16 keeps 8 significant bits of a hidden state, float16 keeps 11; a logit is a sum over 32 of them.
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
        assert ours.shape == theirs.shape


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sparse_log_probabilities_equal_the_live_ones(target, responses, tmp_path, dtype):
    found = cached(target, responses, tmp_path, SparseFormat(top_k=5, num_samples=3, dtype=dtype))
    order = [6, 2, 5]
    sparse = target_at(target, batch_of(found, order))(slice(None))
    log_q_NV = live(target, responses, order).log_softmax(-1)
    assert isinstance(sparse, Sparse)
    assert sparse.ids_NK.shape == (len(log_q_NV), 5 + 3 + 1)
    top = log_q_NV.topk(5).indices
    assert sparse.ids_NK[:, :5].tolist() == top.tolist()
    assert not (sparse.ids_NK[:, 5:8, None] == top[:, None]).any()
    assert sparse.ids_NK[:, -1].tolist() == [token for i in order for token in ROWS[i]["response_ids"]]  # type: ignore[attr-defined]
    # Half a unit in the last of 8 or 11 significant bits.
    tolerance = {"float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    torch.testing.assert_close(sparse.log_q_NK, log_q_NV.gather(-1, sparse.ids_NK), rtol=tolerance, atol=1e-5)
    mass = (sparse.weight_NK * sparse.log_q_NK.exp()).sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=30 * tolerance, atol=1e-4)


def test_acceptance_and_kld_of_a_sparse_cache_are_right_in_expectation(responses, tmp_path):
    # Flat distributions, so that much of the mass lies outside the top_k.
    target, drafter = small_model(1, 32, sharpness=8.0), small_model(2, sharpness=8.0)
    order = list(range(7))
    logits_q = live(target, responses, order)
    batch = collate([response_sequence(row) for row in responses.read(order)])
    logits_p = drafter(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits[
        batch.target_mask_BT
    ]
    one_file = {"batch_tokens": 1000, "shard_size": len(order)}
    found = [
        cached(target, responses, tmp_path / str(seed), SparseFormat(4, 4), **one_file, seed=seed) for seed in range(60)
    ]
    sparse = [target_at(target, batch_of(one, order))(slice(None)) for one in found]
    for measure in (acceptance_rate, kld):
        values = torch.stack([measure(logits_p, one).mean() for one in sparse])
        reference = measure(logits_p, logits_q).mean()
        assert values.std() > 0
        # A normal variable exceeds five standard errors less than once in a million draws.
        assert abs(values.mean() - reference) < 5 * values.std() / 60**0.5


@pytest.mark.parametrize("format", [ExactFormat(), SparseFormat(5, 3)])
def test_ranks_and_resumption_write_the_same_files(target, responses, tmp_path, monkeypatch, format):
    whole = cached(target, responses, tmp_path / "whole", format)
    with monkeypatch.context() as patch:
        patch.setattr(dealing, "deal", lambda numbers, world_size: enumerate([1]))
        write_cache(target, responses, Folder(tmp_path / "parts"), format, **HOW, world_size=2)
    (tmp_path / "parts" / "00000.arrow").write_bytes(b"a shard whose index was not written")
    parts = cached(target, responses, tmp_path / "parts", format)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(
        [f"0000{n}.{end}" for n in range(3) for end in ("arrow", "json")] + ["index.parquet", "manifest.json"]
    )
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert [row["id"] for row in whole] == [row["id"] for row in parts] == [row["id"] for row in responses]


@pytest.mark.parametrize(
    ("format", "columns"),
    [(ExactFormat(), {"hidden", "log_z", "top"}), (SparseFormat(5, 3), {"ids", "log_q", "log_rest"})],
)
def test_a_row_of_a_cache_is_a_row_of_the_responses_with_more_columns(target, responses, tmp_path, format, columns):
    found = cached(target, responses, tmp_path, format)
    for row, original in zip(found, responses, strict=True):
        assert row.keys() - original.keys() == columns
        assert row["response_ids"].tolist() == original["response_ids"].tolist()
    assert restore(responses[0], responses.schema) is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_log_z_and_the_most_likely_token_are_those_of_the_states_as_stored(responses, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(target_cache, "chunk_rows", lambda device, vocabulary: 2)
    target = small_model(1, 32, sharpness=60.0)
    batch = batch_of(cached(target, responses, tmp_path, ExactFormat(dtype)), [6, 2, 5])
    states, logits = batch.cached_N, target_at(target, batch)(slice(None))
    assert states.hidden_NH.dtype == getattr(torch, dtype)
    assert (states.log_z_N.dtype, states.top_N.dtype) == (torch.float32, torch.long)
    # A float32 of about 20 has an error of 1e-6, which is the relative error of a probability.
    torch.testing.assert_close(
        (logits - states.log_z_N[:, None]).exp().sum(-1), torch.ones(len(logits)), rtol=5e-6, atol=0
    )
    assert states.top_N.tolist() == logits.argmax(-1).tolist()


def test_of_several_most_likely_tokens_the_first_is_stored_and_infinite_logits_are_refused():
    head = Head(torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 0.0], [1.0, 1.0]]))
    found = normalise(torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 2.0]], dtype=torch.bfloat16), head)
    logits = [[1, 2, 2, 2], [0, 1, 2, 1], [2, 3, 2, 3]]
    assert found["top"].tolist() == [1, 2, 1]
    assert found["log_z"].tolist() == pytest.approx([math.log(sum(map(math.exp, one))) for one in logits])
    head.weight_VH[3, 1] = 3e38
    with pytest.raises(ValueError, match="the target's logits: not finite"):
        normalise(torch.tensor([[1.0, 2.0]]), head)


class EarlierExactFormat(ExactFormat):
    """The format of earlier versions, without log Z and the most likely token."""

    def fields(self, vocabulary):
        return [self.field()]


def test_an_exact_cache_of_an_earlier_version_has_states_alone(target, responses, tmp_path):
    old = cached(target, responses, tmp_path / "old", EarlierExactFormat())
    new = cached(target, responses, tmp_path / "new", ExactFormat())
    assert new[0].keys() - old[0].keys() == {"log_z", "top"}
    ours, theirs = (batch_of(found, [6, 2, 5]).cached_N for found in (old, new))
    assert ours[1:] == (None, None)
    assert torch.equal(ours.hidden_NH, theirs.hidden_NH)
    row = {name: value for name, value in new[0].items() if name != "top"}
    assert restore(row, new.schema).log_z_N is None  # of unknown rounding without its companion


def test_an_exact_cache_that_an_earlier_version_began_is_completed_in_its_form(target, responses, tmp_path):
    expected = cached(target, responses, tmp_path, EarlierExactFormat())[:]
    for name in ("00000.json", "00002.json", "index.parquet", "manifest.json"):
        (tmp_path / name).unlink()
    begun = cached(target, responses, tmp_path, ExactFormat())
    assert [str(row) for row in begun] == [str(row) for row in expected]


class EarlierSparseFormat(SparseFormat):
    """The format with the column `log_z`, which earlier versions wrote and nothing reads."""

    def fields(self, vocabulary):
        return [*super().fields(vocabulary), number_column("log_z", self.dtype)]

    def columns(self, hidden_NH, logits, tokens_N):
        columns = super().columns(hidden_NH, logits, tokens_N)
        return columns | {"log_z": columns["log_rest"] + 1}


def test_a_cache_of_an_earlier_version_is_read_although_it_has_a_column_more(target, responses, tmp_path):
    new = cached(target, responses, tmp_path / "new", SparseFormat(5, 3))
    old = cached(target, responses, tmp_path / "old", EarlierSparseFormat(5, 3))
    assert "log_z" in old[0].keys() - new[0].keys()
    sparse = [target_at(target, batch_of(found, [6, 2, 5]))(slice(None)) for found in (new, old)]
    for ours, theirs in zip(*sparse, strict=True):
        assert torch.equal(ours, theirs)


def test_a_cache_that_an_earlier_version_began_is_completed(target, responses, tmp_path):
    whole = cached(target, responses, tmp_path / "whole", SparseFormat(5, 3))
    cached(target, responses, tmp_path / "begun", EarlierSparseFormat(5, 3))
    for name in ("00001.json", "index.parquet", "manifest.json"):
        (tmp_path / "begun" / name).unlink()
    begun = cached(target, responses, tmp_path / "begun", SparseFormat(5, 3))
    for ours, theirs in zip(begun, whole, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("ids", "log_q", "log_rest"):
            assert ours[name].tolist() == theirs[name].tolist()


def test_exact_refuses_a_target_that_changes_its_logits_after_the_head_and_sparse_stores_it(
    target, responses, tmp_path
):
    with pytest.raises(ValueError, match="use cache=sparse"):
        cached(capped(target), responses, tmp_path / "exact", ExactFormat())
    assert not list(tmp_path.glob("exact/*"))
    found = cached(capped(target), responses, tmp_path / "sparse", SparseFormat(5, 3))
    batch = batch_of(found, [3])
    sparse = target_at(capped(target), batch)(slice(None))
    theirs = capped(target)(input_ids=batch.input_ids_BT).logits[batch.target_mask_BT].log_softmax(-1)
    # float16 keeps 11 significant bits of a log-probability of about 10.
    torch.testing.assert_close(sparse.log_q_NK, theirs.gather(-1, sparse.ids_NK), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("format", [ExactFormat("float32"), SparseFormat(5, 3)])
@pytest.mark.parametrize("part", ["norm", "lm_head"])
def test_a_target_whose_weights_are_not_finite_is_refused_and_nothing_is_stored(
    target, responses, tmp_path, format, part
):
    broken = type(target)(target.config).eval()
    broken.load_state_dict(target.state_dict())
    with torch.no_grad():
        (broken.model.norm if part == "norm" else broken.lm_head).weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite"):
        cached(broken, responses, tmp_path, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (SparseFormat(top_k=64), r"top_k=64 and num_samples=40 for 64 tokens"),
        (SparseFormat(top_k=4, num_samples=0), "num_samples=0"),
        (SparseFormat(top_k=4, dtype="int8"), r"dtype is 'int8', must be one of bfloat16, float16, float32"),
        (ExactFormat("float8"), r"dtype is 'float8'"),
    ],
)
def test_an_impossible_format_is_refused(target, responses, tmp_path, format, message):
    with pytest.raises(ValueError, match=message):
        cached(target, responses, tmp_path, format)


def test_an_exact_cache_requires_the_output_embedding_it_was_made_with(target, drafter, tmp_path):
    head, other = (model.get_output_embeddings() for model in (target, drafter))
    exact = {
        "settings": {"format": {"kind": "exact", "dtype": "bfloat16"}},
        "counts": {"output_embedding": embedding_checksum(head)},
    }
    for name, manifest in {
        "exact": exact,
        "unknown": exact | {"counts": {}},
        "sparse": {"settings": {"format": {"kind": "sparse", "top_k": 4}}, "counts": {}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"stage": "cache", **manifest}))
    require_output_embedding(str(tmp_path / "exact"), head)
    require_output_embedding(str(tmp_path / "sparse"), other)
    for name, found in (("exact", embedding_checksum(head)), ("unknown", "None")):
        with pytest.raises(ArtifactError, match=f"output embedding {found}, but .* is {embedding_checksum(other)}"):
            require_output_embedding(str(tmp_path / name), other)
