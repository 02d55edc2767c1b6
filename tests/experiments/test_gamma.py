"""The gamma report is about one acceptance rule, in what it decodes and in what it predicts."""

import pytest
import torch

from drafter.decoding.evaluation import Task
from drafter.decoding.options import DecodingOptions
from drafter.warping import Sampling
from experiments.gamma import block_efficiencies, by_rule, decode_prompt
from experiments.reporting.gamma_page import gamma_page
from experiments.running.turns import Work


def test_the_prediction_by_argmax_is_the_number_of_blocks_that_the_targets_text_has(target, drafter):
    work = Work([Task("task", "task:1", "", [1, 2, 3], DecodingOptions(40, Sampling(1.0)))], {}, {})
    (task,) = by_rule(work, "argmax").tasks
    found = decode_prompt(task, target, drafter, [2], 1)
    ids = torch.tensor([task.prompt + found.tokens])
    best = drafter(input_ids=ids).logits[0, len(task.prompt) - 1 : -1].argmax(-1).tolist()
    right = [one == token for one, token in zip(best, found.tokens, strict=True)]
    for gamma in (1, 2):
        position = blocks = 0
        while position < len(right):
            drafted = [*right[position : position + gamma], False]
            position, blocks = position + drafted.index(False) + 1, blocks + 1
        efficiencies = block_efficiencies([task], [found], target, drafter, 2)
        assert efficiencies[gamma - 1] == pytest.approx(len(right) / blocks)


def test_the_page_names_the_rule_unless_it_is_the_papers():
    class Timings:
        drafter, target, ratio = 0.001, [0.01], 0.1

    pages = [gamma_page([], Timings, "drafter", False, {}, rule) for rule in ("ratio", "argmax")]
    assert ["accepted by the rule `argmax`" in page for page in pages] == [False, True]
