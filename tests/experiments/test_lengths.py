"""What a context or a limit costs is said before training, with numbers."""

import logging

import pytest
from hydra import compose, initialize_config_module

from drafter.training.samples import Beyond
from experiments.running.lengths import check_lengths, warn_of_context
from experiments.running.responding import warn_of_cut_answers


def config(*overrides):
    with initialize_config_module("conf", version_base=None):
        return compose("finetune", overrides=["scale=smoke", "logger=csv", *overrides])


def test_a_response_that_may_exceed_the_drafters_context_is_refused_in_evaluation_and_said_before_training(caplog):
    cfg, limits = config("drafter.max_position_embeddings=256"), {"respond.max_new_tokens": 200}
    with pytest.raises(ValueError, match=r"respond.max_new_tokens is 200, .* the context of the drafter .* 256 tokens"):
        check_lengths(cfg, 100, limits)
    check_lengths(cfg, 100, limits, training=True)
    assert "exceed the context of the drafter" in caplog.text
    assert "Finetuning cuts the responses there" in caplog.text
    with pytest.raises(ValueError, match="the context of the target assets/tiny-target, 512 tokens"):
        check_lengths(cfg, 400, limits, training=True)


@pytest.mark.parametrize(
    ("context", "of_target", "beyond", "said"),
    [
        (512, 512, Beyond(0, 0, 9, 0.0), []),
        (512, 4096, Beyond(0, 0, 9, 0.0), ["context is 512 tokens, the target's 4096", "0 of 9 responses are cut"]),
        (512, 512, Beyond(3, 1, 9, 0.25), ["3 of 9 responses are cut there, 1 are left out", "up to 25.0% of the"]),
        (128, 512, Beyond(0, 0, 9, 0.0), ["Text is cut to 128 tokens (finetune.sequence_length=256)"]),
    ],
)
def test_finetuning_says_what_the_drafters_context_costs(caplog, context, of_target, beyond, said):
    warn_of_context(config(), context, of_target, beyond, beyond)
    assert all(part in caplog.text for part in said)
    assert len(caplog.records) == bool(said)


@pytest.mark.parametrize(
    ("cut", "in_thinking", "said"), [(1, 0, ""), (3, 0, "3 of 10 answers (30%)"), (3, 2, ", 2 of")]
)
def test_answers_that_were_cut_off_give_a_warning_above_a_tenth(caplog, cut, in_thinking, said):
    warn_of_cut_answers({"truncated": cut, "cut_in_thinking": in_thinking, "answers": 10}, 64)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * bool(said)
    assert said in caplog.text
    assert ("enable_thinking: false" in caplog.text) == (in_thinking > 0)
