"""The two LightningModules: their losses, gradients, optimizers and logged measures."""

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drafter.data.batches import Sequence, collate
from drafter.decoding.expected_efficiency import acceptance_of_written, expected_blocks
from drafter.losses.distributions import Drawn
from drafter.losses.divergences import kld, tvd, tvdpp
from drafter.models.inspection import hidden_states
from drafter.training.datamodules import SequenceData
from drafter.training.modules import Distillation, Pretraining, check_precision
from drafter.training.next_token import next_token_loss
from drafter.training.samples import InMemory
from drafter.training.yardsticks import Yardsticks
from drafter.warping import Sampling
from tests.conftest import answered, capped, small_model

RESPONSES = [answered([1, 2, 3], [n % 60 + 1, 5, (7 * n) % 50]) for n in range(12)]
TEXT = [Sequence(np.arange(n, n + 20), 1, True) for n in range(4)]


def trainable(seed=2, hidden=16):
    return small_model(seed, hidden).requires_grad_(True).train()


def fit(module, samples=None, steps=8, validation=None):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    lightning.seed_everything(0, verbose=False)
    trainer.fit(
        module, SequenceData(InMemory(samples or RESPONSES + TEXT), InMemory(validation or RESPONSES), 4, seed=0)
    )
    return trainer


def test_next_token_loss_is_the_cross_entropy_of_the_next_tokens():
    model, batch = small_model(), collate(TEXT)
    logits = model(input_ids=batch.input_ids_BT).logits[:, :-1]
    reference = F.cross_entropy(logits.flatten(0, 1), batch.input_ids_BT[:, 1:].flatten())
    torch.testing.assert_close(next_token_loss(model, batch), reference)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "16", 16])
def test_float16_is_refused(precision):
    with pytest.raises(ValueError, match=f"trainer.precision is {precision}: .* Give bf16-mixed"):
        check_precision(precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", 32])
def test_other_precisions_pass(precision):
    check_precision(precision)


def test_pretraining_lowers_its_loss():
    model, batch = trainable(), collate(TEXT)
    before = next_token_loss(model, batch).item()
    fit(Pretraining(model, 1e-2), TEXT * 4, steps=30)
    assert next_token_loss(model, batch).item() < 0.8 * before


@pytest.mark.parametrize("loss", [kld, tvd, tvdpp])
def test_distillation_raises_acceptance_and_does_not_change_the_target(loss):
    target, drafter = small_model(1, 32, sharpness=60.0), trainable()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    module = Distillation(target, drafter, loss, 0.1, 1e-2)
    first = fit(module, steps=4).callback_metrics["val/acceptance_rate"].item()
    trainer = fit(module, steps=60)
    assert trainer.callback_metrics["val/acceptance_rate"] > first + 0.1
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_the_target_is_in_no_checkpoint_and_no_optimizer(target):
    module = Distillation(target, trainable(), kld, 0.1, 1e-3)
    assert all(name.startswith("drafter.") for name in module.state_dict())
    assert {id(p) for p in module.parameters()} == {id(p) for p in module.drafter.parameters()}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_loss_weights_responses_and_text_by_the_share(target, share):
    module = Distillation(target, trainable(), tvd, share, 1e-3)
    batch = collate(RESPONSES[:3] + TEXT[:1])
    trainer = fit(module, steps=1)
    module.trainer = trainer
    module.log = lambda *_, **__: None
    total = module.training_step(batch, 0)
    responses, text = collate(RESPONSES[:3]), collate(TEXT[:1])
    p = module.drafter(input_ids=responses.input_ids_BT).logits[responses.target_mask_BT]
    q = target(input_ids=responses.input_ids_BT).logits[responses.target_mask_BT]
    reference = (1 - share) * tvd(p, q).mean() + share * next_token_loss(module.drafter, text)
    torch.testing.assert_close(total, reference)


def test_validation_measures_are_means_over_tokens_not_batches(target):
    uneven = [answered([1], list(range(2, 2 + n))) for n in (1, 9, 2, 3, 8)]
    module = Distillation(target, trainable(), kld, 0.0, 1e-9)
    metrics = fit(module, RESPONSES, steps=3, validation=uneven).callback_metrics
    batch = collate(uneven)
    with torch.no_grad():
        p = module.drafter(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        q = target(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    p, q = p[batch.target_mask_BT], q[batch.target_mask_BT]
    for name, reference in {
        "val/kld": kld(p, q).mean(),
        "val/tvd": tvd(p, q).mean(),
        "val/acceptance_rate": 1 - tvd(p, q).mean(),
        "val/argmax_agreement": (p.argmax(-1) == q.argmax(-1)).float().mean(),
    }.items():
        # Three steps at a learning rate of 1e-9 leave the drafter unchanged to 6 digits.
        torch.testing.assert_close(metrics[name].double(), reference.double(), rtol=1e-4, atol=1e-6)


def test_a_live_target_that_caps_its_logits_is_distilled_with_its_capped_logits(target):
    batch, module = collate(RESPONSES), Distillation(capped(target), trainable(), kld, 0.0, 1e-3)
    module.on_fit_start()
    hidden_BTH = hidden_states(module.drafter, batch.input_ids_BT, batch.attention_mask_BT)
    predicted = module._predicted(batch, hidden_BTH[batch.target_mask_BT], None)
    expected = capped(target)(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    torch.testing.assert_close(predicted.target(slice(3, 9)), expected[batch.target_mask_BT][3:9])
    assert expected.abs().max() <= 2


def test_a_drafter_that_caps_its_logits_is_refused(target):
    drafter = capped(small_model(2, sharpness=60.0)).requires_grad_(True).train()
    for module in (lambda: Distillation(target, drafter, kld, 0.0, 1e-3), lambda: Pretraining(drafter, 1e-3)):
        with pytest.raises(ValueError, match="Capped changes its logits after the output embedding"):
            module()


def test_a_batch_of_text_alone_trains_on_its_text(target):
    for model in (target, capped(target)):
        module = Distillation(model, trainable(), kld, 0.5, 1e-3)
        module.trainer = fit(module, TEXT, steps=1)
        module.log = lambda *_, **__: None
        reference = 0.5 * next_token_loss(module.drafter, collate(TEXT))
        torch.testing.assert_close(module.training_step(collate(TEXT), 0), reference)


@pytest.mark.parametrize("rules", [("ratio",), ("match", "ratio", "argmax")])
def test_block_efficiency_is_logged_for_greedy_and_for_sampled_responses_by_each_rule(target, rules):
    module = Distillation(
        target,
        trainable(),
        kld,
        0.0,
        1e-9,
        num_speculative_tokens=2,
        response_top_p=0.9,
        acceptance_rules=rules,
    )
    rows = [(0.0, [7, 8, 9, 10, 11]), (1.0, [3, 4, 5]), (0.7, [20, 21, 22, 23]), (0.0, [5])]
    samples = [answered([1, 2], tokens, temperature) for temperature, tokens in rows]
    metrics = fit(module, steps=1, validation=samples).callback_metrics
    for rule in rules:
        sums = {True: [0, 0.0], False: [0, 0.0]}
        for temperature, tokens in rows:
            ids = torch.tensor([[1, 2, *tokens]])
            with torch.no_grad():
                p, q = (model(input_ids=ids).logits[0, 1:-1] for model in (module.drafter, target))
            accept = acceptance_of_written(p, q, torch.tensor(tokens), Sampling(temperature, 0.9), rule)
            total = sums[temperature == 0]
            total[0] += len(tokens)
            total[1] += expected_blocks(accept[None], torch.tensor([len(tokens)]), 2).item()
        sampled = "sampled" if rule == "ratio" else f"sampled_{rule}"
        for name, (tokens, blocks) in (("greedy", sums[True]), (sampled, sums[False])):
            assert metrics[f"val/block_efficiency_{name}"].item() == pytest.approx(tokens / blocks, rel=1e-4)
    assert len([name for name in metrics if name.startswith("val/block_efficiency")]) == 1 + len(rules)


def test_with_a_sparse_target_the_rules_that_need_its_distribution_are_not_logged_above_temperature_0(target):
    module = Distillation(target, trainable(), kld, 0.0, 1e-9, acceptance_rules=["ratio", "argmax", "match"])
    logged = {}
    for kind in ("dense", "sparse"):
        samples = []
        for temperature, tokens in [(0.0, [7, 8, 9]), (1.0, [3, 4, 5]), (0.7, [20, 21, 22, 23])]:
            logits = target(input_ids=torch.tensor([[1, 2, *tokens]])).logits[0, 1:-1]
            drawn = Drawn.from_logits(logits, torch.tensor(tokens), top_k=4, num_samples=8)
            samples.append(answered([1, 2], tokens, temperature, drawn if kind == "sparse" else None))
        metrics = fit(module, steps=1, validation=samples).callback_metrics
        logged[kind] = {
            name.removeprefix("val/block_efficiency_"): value.item()
            for name, value in metrics.items()
            if name.startswith("val/block_efficiency_")
        }
    assert set(logged["dense"]) == {"greedy", "sampled", "sampled_argmax", "sampled_match"}
    del logged["dense"]["sampled"]
    # Two steps at a learning rate of 1e-9 leave the drafter unchanged to 6 digits.
    assert logged["sparse"] == pytest.approx(logged["dense"], rel=1e-5)


def test_wrong_acceptance_rules_are_refused():
    for rules in ([], ["ratio", "ratio"], "ratio"):
        with pytest.raises(ValueError, match="must be at least one, each once"):
            Yardsticks(3, rules=rules)
    with pytest.raises(ValueError, match="the acceptance rule is 'typical', must be ratio, argmax or match"):
        Yardsticks(3, rules=["ratio", "typical"])
