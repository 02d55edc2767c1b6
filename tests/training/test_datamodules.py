"""Packed text, responses by split, their mixture, and the order of samples on several ranks and loader processes."""

import numpy as np
import pytest
import torch

from drafter.artifacts import rows
from drafter.artifacts.storage import Folder
from drafter.data.batches import Sequence
from drafter.data.responses import schema
from drafter.data.target_cache import ExactFormat, SparseFormat, write_cache
from drafter.losses.distributions import Sparse
from drafter.training.datamodules import Order, SequenceData
from drafter.training.samples import InMemory, Mixture, PackedText, Responses
from tests.conftest import finished_rows

ROWS = [
    {
        "id": str(number),
        "kind": f"k{number % 3}",
        "split": "validation" if number % 10 == 0 else "train",
        "temperature": 1.0,
        "prompt_ids": [1, 2],
        "response_ids": [number % 60 + 3] * (number % 7 + 1),
        "turns": [2, number % 7 + 1],
        "truncated": False,
    }
    for number in range(100)
]


@pytest.fixture
def text(tmp_path):
    np.save(tmp_path / "text.npy", np.arange(1005, dtype=np.uint16))
    return PackedText(tmp_path / "text.npy", 100)


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("responses"))
    for number in range(4):
        rows.write_shard(folder, number, ROWS[25 * number : 25 * number + 25], schema(0.95), {})
    return finished_rows(folder, rows.finish(folder, 4, schema(0.95))[0], "respond")


def numbered(lengths):
    """Return samples that are identified by their first token."""
    return InMemory([Sequence(np.array([i] + [0] * (n - 1)), 1, True) for i, n in enumerate(lengths)])


def test_packed_text_is_divided_into_sequences(text):
    assert len(text) == 10
    assert text.__getitems__([3])[0].ids_T.tolist() == list(range(300, 400))
    assert text.lengths.tolist() == [100] * 10


def test_too_little_text_is_refused(tmp_path):
    np.save(tmp_path / "text.npy", np.arange(5, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"has 5 tokens, less than one sequence of 100"):
        PackedText(tmp_path / "text.npy", 100)


@pytest.mark.parametrize("checked", [10**9, 0])
def test_ids_without_a_row_in_the_embeddings_are_refused_at_the_start_or_when_read(tmp_path, monkeypatch, checked):
    monkeypatch.setattr("drafter.training.samples.CHECKED", checked)
    path = tmp_path / "text.npy"
    np.save(path, np.array([1] * 20 + [70] + [1] * 9, dtype=np.uint16))
    assert len(PackedText(path, 10, 71).__getitems__([2])) == 1
    with pytest.raises(ValueError, match=r"text.npy has the token id 70, and the models' embeddings have 70 rows"):
        PackedText(path, 10, 70).__getitems__([2])
    if checked:
        with pytest.raises(ValueError, match="token id 70"):
            PackedText(path, 10, 70)
    else:
        assert len(PackedText(path, 10, 70).__getitems__([0, 1])) == 2


def test_a_response_with_ids_without_a_row_is_refused_by_name(responses):
    assert len(Responses(responses, "validation", vocabulary=34).__getitems__([3])) == 1
    with pytest.raises(ValueError, match=r"the row '30' of .* has the token id 33, and .* have 33 rows"):
        Responses(responses, "validation", vocabulary=33).__getitems__([3])


def test_responses_are_split(responses):
    validation = Responses(responses, "validation")
    assert len(validation) == 10
    samples = validation.__getitems__([3, 0])
    assert [sample.ids_T.tolist() for sample in samples] == [[1, 2, 33, 33, 33], [1, 2, 3]]
    assert validation.lengths[[3, 0]].tolist() == [5, 3]
    assert samples[0].cached_N is None


@pytest.mark.parametrize("format", [ExactFormat("float32"), SparseFormat(5, 3)])
def test_a_cached_response_has_its_targets_distributions(target, responses, tmp_path, format):
    count, schema = write_cache(target, responses, Folder(tmp_path), format, batch_tokens=50, shard_size=30, seed=0)
    found = finished_rows(Folder(tmp_path), rows.finish(Folder(tmp_path), count, schema)[0], "cache")
    mixed = Mixture(Responses(found, "train"), numbered([6, 6]), 0.02, seed=0)
    batch = next(iter(SequenceData(mixed, mixed, len(mixed), seed=0).train_dataloader()))
    positions = (batch.target_mask_BT & ~batch.is_text_B[:, None]).nonzero()
    assert batch.is_text_B.sum() == 2
    for position in (0, 17, len(positions) - 1):
        row, column = positions[position].tolist()
        logits = target(input_ids=batch.input_ids_BT[row : row + 1, : column + 1]).logits[0, -1]
        if isinstance(batch.cached_N, Sparse):
            log_q = logits.log_softmax(-1)[batch.input_ids_BT[row, column + 1]]
            assert batch.cached_N.log_q_NK[position, -1].item() == pytest.approx(log_q.item(), rel=1e-3)
        else:
            torch.testing.assert_close(target.lm_head(batch.cached_N.hidden_NH[position]), logits, rtol=1e-4, atol=1e-4)


def test_a_share_of_the_responses_has_the_same_ones_each_time(responses):
    part = Responses(responses, "train", share=0.3)
    assert len(part) == 27
    assert len(set(part.indices)) == 27
    assert set(part.indices) < set(Responses(responses, "train").indices)
    assert part.indices.tolist() == Responses(responses, "train", share=0.3).indices.tolist()
    assert max(part.indices) > 60  # from the full set, which is ordered by temperature and length
    assert Responses(responses, "train", share=1.0).indices.tolist() == [i for i in range(100) if i % 10]


@pytest.mark.parametrize("share", [0, -1, 1.5, 0.001])
def test_a_share_that_takes_nothing_or_too_much_is_refused(responses, share):
    with pytest.raises(ValueError, match=f"finetune.responses_share is {share}"):
        Responses(responses, "train", share)


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_of_the_validation_responses_has_the_same_limits(responses, share):
    with pytest.raises(ValueError, match=f"finetune.validation_share is {share}"):
        Responses(responses, "validation", share)


def test_a_small_share_of_the_validation_responses_takes_one(responses):
    assert len(Responses(responses, "validation", share=0.001)) == 1


def test_responses_to_some_kinds_of_instruction_are_selected(responses):
    assert Responses(responses, "train", kinds=["k2"]).indices.tolist() == [i for i in range(2, 100, 3) if i % 10]
    with pytest.raises(ValueError, match=r"finetune.kinds is \['other'\], but the responses have \['k0', 'k1', 'k2'\]"):
        Responses(responses, "train", kinds=["other"])


def test_an_empty_split_is_refused(responses):
    with pytest.raises(ValueError, match="no responses of the split 'test'"):
        Responses(responses, "test")


@pytest.mark.parametrize(("share", "texts"), [(0.1, 10), (0.5, 90), (0.0, 0)])
def test_the_mixture_has_the_given_share_of_text(responses, text, share, texts):
    mixed = Mixture(Responses(responses, "train"), text, share, seed=0)
    samples = mixed.__getitems__(list(range(len(mixed))))
    assert [sample.is_text for sample in samples].count(True) == texts
    assert len(mixed) == len(mixed.lengths) == 90 + texts
    assert [len(sample.ids_T) for sample in samples] == mixed.lengths.tolist()


def test_a_share_outside_its_range_is_refused(responses, text):
    with pytest.raises(ValueError, match=r"text_share is 1\.0"):
        Mixture(Responses(responses, "train"), text, 1.0, seed=0)


def batches_of_ranks(count, batch_size, world_size, epochs=2):
    """Return the batches of each rank, and the number of batches per epoch."""
    lengths = np.random.default_rng(0).integers(1, 50, count)
    ranks = [Order(lengths, batch_size, 3, rank, world_size) for rank in range(world_size)]
    for order in ranks:
        order.end = epochs * order.batches_per_epoch
    return [list(order) for order in ranks], ranks[0].batches_per_epoch


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (7, 20), (41, 20), (100, 8), (1009, 16)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_each_sample_occurs_once_per_epoch_on_one_rank_and_all_ranks_have_equally_many_batches(
    count, batch_size, world_size
):
    if count < world_size:
        with pytest.raises(ValueError, match="less than one for each of"):
            batches_of_ranks(count, batch_size, world_size)
        return
    ranks, per_epoch = batches_of_ranks(count, batch_size, world_size)
    assert {len(batches) for batches in ranks} == {2 * per_epoch}
    assert all(batch for batches in ranks for batch in batches)
    for epoch in (0, 1):
        seen = [i for batches in ranks for batch in batches[epoch * per_epoch :][:per_epoch] for i in batch]
        assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_batch_holds_the_same_samples_on_any_number_of_ranks(world_size):
    one, several = batches_of_ranks(100, 8, 1)[0][0], batches_of_ranks(100, 8, world_size)[0]
    for batch, parts in zip(one, zip(*several, strict=True), strict=True):
        assert sorted(batch) == sorted(index for part in parts for index in part)


def test_a_batch_has_samples_of_similar_length():
    lengths = np.random.default_rng(0).integers(1, 500, 640)
    batches = Order(lengths, 20, 0).epoch(0)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.1 * lengths.sum()
    assert {len(batch) for batch in batches} == {20}


def test_the_order_can_start_at_any_batch():
    lengths = np.random.default_rng(0).integers(1, 50, 41)
    full, rest = Order(lengths, 10, 1), Order(lengths, 10, 1)
    full.end = rest.end = 11
    rest.start = 6
    assert list(full)[6:] == list(rest)
    assert len(rest) == 11


def first_tokens(loader):
    return [batch.input_ids_BT[:, 0].tolist() for batch in loader]


def test_training_order_is_fixed_by_the_seed_and_new_each_epoch():
    data = numbered([5] * 30)

    def orders(seed):
        order = Order(data.lengths, 4, seed)
        return [[batch.tolist() for batch in order.epoch(number)] for number in (0, 1)]

    first, second = orders(1)
    assert first != second
    assert orders(1) == [first, second]
    assert orders(2) != [first, second]
    assert first_tokens(SequenceData(data, data, 4, 1).train_dataloader()) == first


def test_loader_processes_change_nothing():
    data = numbered(list(range(1, 40)))
    alone, several = (SequenceData(data, data, 4, 1, num_workers) for num_workers in (0, 2))
    assert first_tokens(alone.train_dataloader()) == first_tokens(several.train_dataloader())
    assert first_tokens(alone.val_dataloader()) == first_tokens(several.val_dataloader())


class FakeTrainer:
    global_step, accumulate_grad_batches, max_steps = 3, 2, 10

    def __init__(self, rank, world_size):
        self.global_rank, self.world_size = rank, world_size


@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (10, 2), (10, 3), (3, 3), (41, 4)])
def test_each_validation_sample_is_on_one_rank_and_all_ranks_have_equally_many_batches(count, world_size):
    seen, batches = [], set()
    for rank in range(world_size):
        data = SequenceData(numbered([4] * count), numbered(range(1, count + 1)), 5, 0)
        data.trainer = FakeTrainer(rank, world_size)
        of_rank = first_tokens(data.val_dataloader())
        assert all(of_rank)
        batches.add(len(of_rank))
        seen += [token for batch in of_rank for token in batch]
    assert sorted(seen) == list(range(count))
    assert len(batches) == 1


def test_fewer_validation_samples_than_ranks_are_refused():
    data = SequenceData(numbered([4] * 9), numbered([4]), 5, 0)
    data.trainer = FakeTrainer(0, 2)
    with pytest.raises(ValueError, match="1 validation samples are too few for 2 ranks"):
        data.val_dataloader()


def test_the_loader_starts_at_the_trainers_step_and_ends_with_its_last():
    samples = numbered([4] * 9)
    data = SequenceData(samples, samples, 4, 0)
    data.trainer = FakeTrainer(0, 1)
    order = Order(samples.lengths, 4, 0)
    order.start, order.end = 6, 20  # at step 3 of 10, with two batches per step
    assert len(data.train_dataloader()) == 20
    assert first_tokens(data.train_dataloader()) == list(order)
    assert order.batches_per_epoch == 2
