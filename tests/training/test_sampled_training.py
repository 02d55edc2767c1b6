"""Training with a sample of the tokens that are not kept: losses, gradients, draws and measures."""

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drafter.data.batches import Sequence, collate, next_tokens
from drafter.losses.divergences import kld, tvd, tvdpp
from drafter.losses.trimmed import SampledTokens
from drafter.training import adaspec, dpace
from drafter.training.datamodules import SequenceData
from drafter.training.frozen import FrozenTarget
from drafter.training.modules import Distillation, Pretraining, Teacher
from drafter.training.samples import InMemory
from tests.conftest import VOCABULARY, small_model
from tests.training.test_modules import RESPONSES, TEXT, fit
from tests.training.test_trimmed_training import KEPT, attached, gradients, logits_of, samples, trainable

__all__ = ["samples"]  # a fixture
OTHERS = [token for token in range(VOCABULARY) if not KEPT.mask(torch.tensor(token))]
ALL, FIVE = (SampledTokens(KEPT, number, seed=1) for number in (len(OTHERS), 5))


def merged(logits):
    """Return log-probabilities of the kept tokens, and of any other token."""
    log_probs = logits.log_softmax(-1)
    return torch.cat([log_probs[:, KEPT.ids_K], log_probs[:, OTHERS].logsumexp(-1, keepdim=True)], -1)


def next_token_reference(model, batch):
    places = KEPT.place_V[next_tokens(batch)[batch.target_mask_BT]]
    assert (places == len(KEPT.ids_K)).any()
    return F.nll_loss(merged(logits_of(model, batch)), places)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", [kld, tvdpp])
def test_with_every_other_token_drawn_distillation_is_that_of_the_merged_vocabulary(target, loss, tied):
    drafter = trainable(tied)
    module = attached(Distillation(target, drafter, loss, 0.25, 1e-9, sampled=ALL), RESPONSES + TEXT)
    total = module.training_step(collate(RESPONSES[:3] + TEXT[:1]), 0)
    responses, text = collate(RESPONSES[:3]), collate(TEXT[:1])
    distilled = loss(merged(logits_of(drafter, responses)), merged(logits_of(target, responses))).mean()
    reference = 0.75 * distilled + 0.25 * next_token_reference(drafter, text)
    torch.testing.assert_close(total, reference)
    ours, theirs = gradients(drafter, total), gradients(drafter, reference)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_with_every_other_token_drawn_pretraining_is_that_of_the_merged_vocabulary(target):
    model, batch = trainable(), collate(TEXT)
    teacher = Teacher(FrozenTarget(target), tvd, 0.3)
    loss = attached(Pretraining(model, 1e-9, teacher=teacher, sampled=ALL), TEXT).training_step(batch, 0)
    distilled = tvd(merged(logits_of(model, batch)), merged(logits_of(target, batch))).mean()
    torch.testing.assert_close(loss, 0.7 * next_token_reference(model, batch) + 0.3 * distilled)


def test_a_step_trains_the_kept_and_the_drawn_rows_alone(target):
    drafter = trainable()
    module = attached(Distillation(target, drafter, kld, 0.25, 1e-9, sampled=FIVE), RESPONSES + TEXT)
    assert module.global_step == 1
    gradient = gradients(drafter, module.training_step(collate(RESPONSES + TEXT), 0))["lm_head.weight"]
    used = FIVE.of_step(1).rows
    assert gradient.abs().amax(-1).nonzero()[:, 0].tolist() == sorted(used.tolist())


@pytest.mark.parametrize("kind", [Distillation, Pretraining])
def test_accumulated_batches_have_the_draw_of_their_step(target, monkeypatch, kind):
    drawn, plain = [], SampledTokens.of_step

    def noted(self, step):
        drawn.append((step, plain(self, step).sampled_S.tolist()))
        return plain(self, step)

    monkeypatch.setattr(SampledTokens, "of_step", noted)
    given = (target, trainable(), kld, 0.0, 1e-3) if kind is Distillation else (trainable(), 1e-3)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, accumulate_grad_batches=2, num_sanity_val_steps=1, logger=False, **quiet
    )
    data = InMemory(RESPONSES if kind is Distillation else TEXT)
    trainer.fit(kind(*given, sampled=FIVE), SequenceData(data, data, 2, seed=0))
    assert [step for step, _ in drawn] == [0, 0, 1, 1, 2, 2]  # and none in validation
    assert drawn[::2] == drawn[1::2] == [(step, plain(FIVE, step).sampled_S.tolist()) for step in range(3)]


def test_validation_measures_the_whole_drafter(target):
    drafter = trainable()
    metrics = fit(Distillation(target, drafter, kld, 0.0, 1e-9, sampled=FIVE), steps=1).callback_metrics
    batch = collate(RESPONSES)
    p, q = logits_of(drafter, batch), logits_of(target, batch)
    # A step at a learning rate of 1e-9 leaves the drafter unchanged to 6 digits.
    torch.testing.assert_close(metrics["val/kld"], kld(p, q).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["val/tvd"], tvd(p, q).mean(), rtol=1e-4, atol=1e-6)
    assert not [name for name in metrics if "kept" in name]
    model = trainable()
    metrics = fit(Pretraining(model, 1e-9, sampled=FIVE), TEXT, steps=1, validation=TEXT).callback_metrics
    tokens = next_tokens(collate(TEXT))[collate(TEXT).target_mask_BT]
    expected = F.cross_entropy(logits_of(model, collate(TEXT)), tokens)
    torch.testing.assert_close(metrics["val/loss"], expected, rtol=1e-4, atol=1e-6)
    assert not [name for name in metrics if "kept" in name]


def test_weightings_see_the_outcomes(target):
    drafter, batch = trainable(), collate(RESPONSES[:4])
    module = attached(Distillation(target, drafter, kld, 0.0, 1e-9, sampled=ALL), RESPONSES)
    kept = ALL.of_step(0)
    with torch.no_grad():
        hidden = drafter.model(batch.input_ids_BT).last_hidden_state[batch.target_mask_BT]
        predicted = module._predicted(batch, hidden, kept)
    tokens, ends = predicted.positions.tokens_N, predicted.positions.following_N == 0
    assert not KEPT.mask(tokens[ends]).all()
    confidence = merged(logits_of(drafter, batch)).exp().gather(-1, KEPT.place_V[tokens][:, None])[:, 0]
    single = dpace(predicted, batch, num_speculative_tokens=1)
    torch.testing.assert_close(single[ends], (0.5 * confidence + 0.5)[ends])
    reference = trainable(seed=7)
    q = merged(logits_of(target, batch))
    excess = kld(merged(logits_of(drafter, batch)), q) - kld(merged(logits_of(reference, batch)), q)
    weights = adaspec(predicted, batch, reference=reference, share=0.5)
    expected = excess.topk(round(0.5 * len(excess))).indices
    assert weights.nonzero()[:, 0].tolist() == sorted(expected.tolist())


def test_training_with_a_sample_lowers_the_mass_of_tokens_that_the_target_never_uses():
    """The rows of all other tokens are trained, each when it is drawn, so that none is proposed wrongly."""
    texts = [Sequence(np.arange(n, n + 20) % VOCABULARY, 1, True) for n in range(16)]
    target, model = small_model(1, 32, sharpness=60.0), trainable()
    with torch.no_grad():
        target.lm_head.weight[OTHERS] = 0
    before = logits_of(model, collate(texts)).softmax(-1)[:, OTHERS].sum(-1).mean()
    teacher = Teacher(FrozenTarget(target), kld, 1.0)
    metrics = fit(Pretraining(model, 1e-2, teacher=teacher, sampled=FIVE), texts, 60, texts).callback_metrics
    after = logits_of(model.eval(), collate(texts)).softmax(-1)[:, OTHERS].sum(-1).mean()
    assert after < 0.5 * before
    assert metrics["val/kld"].isfinite()
