"""Prompts that are decoded side by side: which ones share a batch, what they give, and what is refused."""

from dataclasses import replace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from drafter.decoding.acceptance import RULES
from drafter.decoding.evaluation import Task, decode, decode_side_by_side
from drafter.decoding.options import Adaptive, DecodingOptions
from drafter.decoding.speculative import speculative_decode
from drafter.metrics import TIMES
from drafter.warping import Sampling
from experiments.evaluate import batches, check_batches
from experiments.running.turns import Work
from tests.conftest import VOCABULARY, small_model

GREEDY, SAMPLED = DecodingOptions(12, stop_ids=[5]), DecodingOptions(12, Sampling(1.0, 0.95), stop_ids=[5])


def tasks(*options):
    return [
        Task("task", f"task:{number}", "", [number + 1, 2, 3][: number % 3 + 1], how)
        for number, how in enumerate(options)
    ]


def test_prompts_of_equal_options_share_batches_in_their_order():
    every = tasks(*[GREEDY] * 5, *[SAMPLED] * 2, *[DecodingOptions(12, stop_ids=[5])] * 2)
    assert [len(batch) for batch in batches(every, 3)] == [3, 2, 2, 2]
    assert [task for batch in batches(every, 3) for task in batch] == every
    assert [len(batch) for batch in batches(every, 1)] == [1] * 9


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_gives_each_prompt_its_own_texts_and_counts_without_times(target, drafter, options):
    every, drafters, gammas = (
        tasks(*[options] * 4),
        {"runs/a": drafter, "runs/b": small_model(4)},
        {3: 3, "adaptive": Adaptive(5, 0.3)},
    )
    together = decode_side_by_side(every, target, drafters, gammas, 1)
    for task, found in zip(every, together, strict=True):
        alone = decode(task, target, drafters, gammas, 1)
        assert found.baseline.tokens == alone.baseline.tokens
        for path in drafters:
            for one, other in zip(found.by_drafter[path], alone.by_drafter[path], strict=True):
                assert one.decoded.tokens == other.decoded.tokens
                # The target's probabilities are rounded otherwise in a batch.
                approximate = {**dict.fromkeys(TIMES), "expected": pytest.approx(other.row["expected"], rel=1e-3)}
                assert one.row == other.row | approximate


def test_each_rule_is_decoded_above_temperature_zero_and_one_at_it(target, drafter):
    greedy, sampled = tasks(GREEDY, SAMPLED)
    for task, named in ((greedy, [None]), (sampled, [None, "argmax", "match"])):
        alone = decode(task, target, {"a": drafter}, {3: 3}, 1, RULES).by_drafter["a"]
        (together,) = decode_side_by_side([task], target, {"a": drafter}, {3: 3}, 1, RULES)
        assert [one.row.get("rule") for one in alone] == named
        for rule, one, other in zip(RULES, alone, together.by_drafter["a"], strict=False):
            options = replace(task.options, rule=rule)
            random = task.random(target.device, 1, "a 3")
            assert one.decoded.tokens == speculative_decode(target, drafter, task.prompt, 3, options, random).tokens
            assert other.decoded.tokens == one.decoded.tokens
            assert other.row.get("rule") == one.row.get("rule")
    assert decode(sampled, target, {"a": drafter}, {3: 3}, 1, ["match"]).by_drafter["a"][0].row["rule"] == "match"


def test_a_model_that_cannot_decode_side_by_side_is_refused_with_the_setting(target):
    torch.manual_seed(0)
    alibi = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)).eval()
    work = Work(tasks(GREEDY), {}, {})
    check_batches(work, [target], 128, 3)
    with pytest.raises(
        ValueError, match=r"BloomForCausalLM does not accept .* one at a time, with evaluate.batch_size=1"
    ):
        check_batches(work, [target, alibi], 128, 3)
