"""Training a trimmed drafter, and pretraining against a target: losses, gradients and logged measures."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drafter.artifacts import rows
from drafter.artifacts.storage import Folder
from drafter.data.batches import Sequence, States, collate, next_tokens
from drafter.data.target_cache import ExactFormat, normalise, write_cache
from drafter.decoding.expected_efficiency import acceptance_of_written, expected_blocks
from drafter.losses.chunked import Head
from drafter.losses.divergences import acceptance_rate, ce, kld, tvd, tvdpp
from drafter.losses.trimmed import Kept, SampledTokens
from drafter.models.loading import OutputEmbedding
from drafter.models.trimming import trim
from drafter.training import adaspec, dpace, frozen
from drafter.training.frozen import FrozenTarget
from drafter.training.modules import Distillation, Pretraining, Teacher
from drafter.training.samples import Responses
from drafter.warping import Sampling
from tests.conftest import VOCABULARY, answered, finished_rows, small_model
from tests.training.test_modules import RESPONSES, TEXT, fit
from tests.training.test_samples import write_rows

IDS = [*range(0, VOCABULARY, 2), 5]
KEPT = Kept.from_ids(IDS, VOCABULARY)


def trainable(tied=False, seed=2):
    model = small_model(seed)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True).train()


def logits_of(model, batch):
    logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    return logits[batch.target_mask_BT]


def trimmed_logits(model, batch):
    """Return the model's logits at the predicted positions, minus infinity at the other tokens."""
    others = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, KEPT.ids_K, False)
    return logits_of(model, batch).masked_fill(others, -torch.inf)


def next_token_reference(model, batch):
    tokens = next_tokens(batch)[batch.target_mask_BT]
    kept = torch.isin(tokens, torch.tensor(IDS))
    assert 0 < kept.sum() < len(kept)
    return F.cross_entropy(trimmed_logits(model, batch)[kept], tokens[kept])


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


def attached(module, samples):
    """Return a module after a step of a tiny learning rate, so that it has a trainer, and logs nothing more."""
    module.trainer = fit(module, samples, steps=1, validation=samples)
    module.log = lambda *_, **__: None
    return module


@pytest.mark.parametrize("tied", [False, True])
def test_distillation_has_the_loss_and_gradient_of_logits_of_minus_infinity(target, tied):
    drafter = trainable(tied)
    module = attached(Distillation(target, drafter, tvd, 0.25, 1e-9, kept=KEPT), RESPONSES + TEXT)
    total = module.training_step(collate(RESPONSES[:3] + TEXT[:1]), 0)
    responses, text = collate(RESPONSES[:3]), collate(TEXT[:1])
    distilled = tvd(trimmed_logits(drafter, responses), logits_of(target, responses)).mean()
    reference = 0.75 * distilled + 0.25 * next_token_reference(drafter, text)
    torch.testing.assert_close(total, reference)
    ours, theirs = gradients(drafter, total), gradients(drafter, reference)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
    if not tied:
        others = [token for token in range(VOCABULARY) if token not in IDS]
        assert ours["lm_head.weight"][others].abs().max() == 0


def test_validation_measures_the_drafter_as_it_is_served_against_the_full_target(target):
    drafter = trainable()
    with torch.no_grad():
        drafter.lm_head.weight.mul_(30)
    given = [(0.0, [7, 8, 9, 10, 11]), (1.0, [3, 4, 5]), (0.7, [20, 21, 22, 24])]
    samples = [answered([1, 2], tokens, temperature) for temperature, tokens in given]
    module = Distillation(target, drafter, kld, 0.0, 1e-9, num_speculative_tokens=2, response_top_p=0.9, kept=KEPT)
    metrics = fit(module, RESPONSES, steps=1, validation=samples).callback_metrics
    served, batch = trim(copy.deepcopy(drafter).requires_grad_(False), IDS).eval(), collate(samples)
    p, q = logits_of(served, batch), logits_of(target, batch)
    covered = q.softmax(-1)[:, sorted(set(IDS))].sum(-1)
    expected = {
        "val/acceptance_rate": acceptance_rate(p, q).mean(),
        "val/tvd": tvd(p, q).mean(),
        "val/argmax_agreement": (p.argmax(-1) == q.argmax(-1)).float().mean(),
        "val/kept_mass": covered.mean(),
    }
    for name, value in expected.items():
        # A step at a learning rate of 1e-9 leaves the drafter unchanged to 6 digits.
        torch.testing.assert_close(metrics[name].double(), value.double(), rtol=1e-4, atol=1e-6)
    assert metrics["val/acceptance_rate"] < metrics["val/kept_mass"] < 1
    assert kld(p, q).isinf().all()
    assert "val/kld" not in metrics
    assert metrics["val/kld_kept"] > 0
    sums = {True: [0, 0.0], False: [0, 0.0]}
    for temperature, tokens in given:
        ids = torch.tensor([[1, 2, *tokens]])
        p, q = (model(input_ids=ids).logits[0, 1:-1] for model in (served, target))
        accept = acceptance_of_written(p, q, torch.tensor(tokens), Sampling(temperature, 0.9))
        sums[temperature == 0][0] += len(tokens)
        sums[temperature == 0][1] += expected_blocks(accept[None], torch.tensor([len(tokens)]), 2).item()
    for name, (count, blocks) in (("greedy", sums[True]), ("sampled", sums[False])):
        assert metrics[f"val/block_efficiency_{name}"].item() == pytest.approx(count / blocks, rel=1e-4)


@pytest.mark.parametrize("weighting", ["dpace", "adaspec"])
def test_weightings_see_the_trimmed_drafter(target, weighting):
    drafter, batch = trainable(), collate(RESPONSES[:4])
    module = attached(Distillation(target, drafter, kld, 0.0, 1e-9, kept=KEPT), RESPONSES)
    with torch.no_grad():
        hidden = drafter.model(batch.input_ids_BT).last_hidden_state[batch.target_mask_BT]
        predicted = module._predicted(batch, hidden, KEPT)
    if weighting == "dpace":
        full = predicted._replace(
            head=predicted.head._replace(weight_VH=drafter.lm_head.weight),
            target=lambda rows: logits_of(target, batch)[rows],
            kept=None,
        )
        tokens = predicted.positions.tokens_N
        weights, whole = dpace(predicted, batch), dpace(full, batch)
        assert not torch.allclose(weights, whole)
        confidence = trimmed_logits(drafter, batch).softmax(-1).gather(-1, tokens[:, None])[:, 0]
        assert (confidence[~KEPT.mask(tokens)] == 0).all()
        ends = predicted.positions.following_N == 0
        # The last position of a response ends every block that contains it: of one token, its weight is its confidence.
        single = dpace(predicted, batch, num_speculative_tokens=1)
        torch.testing.assert_close(single[ends], (0.5 * confidence + 0.5)[ends])
    else:
        weights = adaspec(predicted, batch, reference=trainable(seed=7), share=0.5)
        assert weights.sum() == round(0.5 * len(weights))
        same = adaspec(predicted, batch, reference=drafter, share=1.0)
        assert (same == 1).all()


@pytest.fixture(scope="module")
def samples(target, tmp_path_factory):
    """Return the samples of an exact cache."""
    place = tmp_path_factory.mktemp("cached")
    responses, folder = write_rows(place / "responses", {str(n): (3, 5 + n) for n in range(8)}), Folder(place / "cache")
    count, columns = write_cache(target, responses, folder, ExactFormat(), batch_tokens=40, shard_size=8, seed=0)
    return Responses(finished_rows(folder, rows.finish(folder, count, columns)[0], "cache"), "train").__getitems__(
        list(range(8))
    )


def older(samples):
    """Return the same from a cache of an earlier version, without log Z."""
    return [one._replace(cached_N=States(one.cached_N.hidden_NH)) for one in samples]


@pytest.mark.parametrize("loss", [kld, tvdpp, ce])
@pytest.mark.parametrize(
    "tokens", [{"kept": KEPT}, {"sampled": SampledTokens(KEPT, 5, seed=1)}], ids=["kept", "sampled"]
)
def test_finetuning_from_a_cache_with_log_z_has_the_losses_and_measures_of_one_without(target, samples, loss, tokens):
    found = []
    for given in (samples, older(samples)):
        module = Distillation(OutputEmbedding(target.lm_head), trainable(), loss, 0.0, 1e-2, **tokens)
        found.append(fit(module, given, steps=4, validation=given).callback_metrics)
    assert found[0].keys() >= {"train/loss", "val/acceptance_rate"} | ({"val/kept_mass"} if "kept" in tokens else set())
    for name, value in found[0].items():
        # AdamW divides by a gradient's own size, which enlarges float32's rounding of 1e-7 in four steps.
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("loss", "computes"), [(kld, False), (tvdpp, False), (partial(kld, temperature=0.5), True)])
def test_a_step_with_log_z_computes_full_logits_at_another_temperature_alone(
    target, samples, monkeypatch, loss, computes
):
    module = attached(Distillation(OutputEmbedding(target.lm_head), trainable(), loss, 0.0, 1e-9, kept=KEPT), samples)
    computed, plain = [], frozen.target_at

    def counted(*given):
        logits = plain(*given)
        return lambda rows: computed.append(rows) or logits(rows)

    monkeypatch.setattr(frozen, "target_at", counted)
    for given, expected in ((samples, computes), (older(samples), True)):
        computed.clear()
        module.training_step(collate(given[:3]), 0)
        assert bool(computed) == expected


def test_log_z_belongs_to_a_target_of_any_dtype(target, samples):
    """A cache of a target in bfloat16 may be used with the same weights in float32, and the other way round."""
    batch, precise = collate(samples), Head(torch.zeros(len(KEPT.ids_K), 4))
    heads = [copy.deepcopy(target.lm_head).bfloat16()]
    heads.append(copy.deepcopy(heads[0]).float())
    states, found = batch.cached_N, []
    for lm_head in heads:
        columns = normalise(states.hidden_NH, Head.from_module(lm_head).precise())
        given = batch._replace(cached_N=States(states.hidden_NH, torch.tensor(columns["log_z"]), states.top_N))
        predicted = FrozenTarget(OutputEmbedding(lm_head)).predicted(given, states.hidden_NH, precise, KEPT)
        found.append(predicted.target(slice(None)).log_q())
    torch.testing.assert_close(found[0], found[1])


def test_log_z_is_not_used_after_training_in_bfloat16_has_rounded_it(target, samples):
    batch, embedding = collate(samples), FrozenTarget(OutputEmbedding(target.lm_head))
    hidden_NH, log_z_N, top_N = batch.cached_N
    rounded = batch._replace(cached_N=States(hidden_NH, log_z_N.bfloat16(), top_N))
    head, hidden = Head(torch.zeros(len(KEPT.ids_K), 4)), torch.zeros(len(top_N), 4)
    assert embedding.predicted(rounded, hidden, head, KEPT).target(slice(None)).log_q is None
    log_q = embedding.predicted(batch, hidden, head, KEPT).target(slice(None)).log_q()
    with torch.autocast("cpu", torch.bfloat16):  # whose rounding would be that of neither logits nor log Z
        assert torch.equal(embedding.predicted(batch, hidden, head, KEPT).target(slice(None)).log_q(), log_q)


@pytest.mark.parametrize("tied", [False, True])
def test_pretraining_learns_the_kept_next_tokens(tied):
    model, batch = trainable(tied), collate(TEXT)
    module = attached(Pretraining(model, 1e-9, kept=KEPT), TEXT)
    loss = module.training_step(batch, 0)
    reference = next_token_reference(model, batch)
    torch.testing.assert_close(loss, reference)
    ours, theirs = gradients(model, loss), gradients(model, reference)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_pretraining_logs_the_loss_over_kept_tokens_under_another_name():
    model = trainable()
    metrics = fit(Pretraining(model, 1e-9, kept=KEPT), TEXT, steps=1, validation=TEXT).callback_metrics
    batch = collate(TEXT)
    assert "val/loss" not in metrics
    assert metrics["val/loss_kept"].item() == pytest.approx(next_token_reference(model, batch).item(), rel=1e-4)
    tokens = next_tokens(batch)[batch.target_mask_BT]
    assert metrics["val/kept_share"].item() == pytest.approx(KEPT.mask(tokens).float().mean().item(), rel=1e-5)


@pytest.mark.parametrize("kept", [None, KEPT])
def test_pretraining_mixes_the_targets_distribution_with_the_next_tokens(target, kept):
    model, batch = trainable(), collate(TEXT)
    module = attached(Pretraining(model, 1e-9, kept=kept, teacher=Teacher(FrozenTarget(target), tvd, 0.3)), TEXT)
    loss = module.training_step(batch, 0)
    p = logits_of(model, batch) if kept is None else trimmed_logits(model, batch)
    tokens = next_tokens(batch)[batch.target_mask_BT]
    text = F.cross_entropy(p, tokens) if kept is None else next_token_reference(model, batch)
    torch.testing.assert_close(loss, 0.7 * text + 0.3 * tvd(p, logits_of(target, batch)).mean())


@pytest.mark.parametrize("loss", [kld, tvdpp])
def test_pretraining_against_a_target_raises_acceptance_and_logs_it(loss):
    texts = [Sequence(np.arange(n, n + 20) % VOCABULARY, 1, True) for n in range(16)]
    target, model = small_model(1, 32, sharpness=60.0), trainable()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    module = Pretraining(model, 1e-2, teacher=Teacher(FrozenTarget(target), loss, 1.0))
    first = fit(module, texts, steps=2, validation=texts).callback_metrics["val/acceptance_rate"].item()
    metrics = fit(module, texts, steps=60, validation=texts).callback_metrics
    assert metrics["val/acceptance_rate"].item() > first + 0.1
    batch = collate(texts)
    p, q = logits_of(model.eval(), batch), logits_of(target, batch)
    assert metrics["val/acceptance_rate"].item() == pytest.approx(acceptance_rate(p, q).mean().item(), rel=1e-3)
    assert metrics["val/kld"].item() == pytest.approx(kld(p, q).mean().item(), rel=1e-3)
    assert metrics["val/loss"] > 0
    assert not [name for name in metrics if name.startswith("val/block")]  # the target did not write the text
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
