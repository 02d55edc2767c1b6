"""The gamma report is about one acceptance rule, in what it decodes and in what it predicts."""

import pytest
import torch

from drafter.artifacts.manifest import read_manifest
from drafter.decoding.drafting import Combined
from drafter.decoding.evaluation import Task
from drafter.decoding.ngrams import Lookup, NgramSizes
from drafter.decoding.options import DecodingOptions
from drafter.decoding.timings import CallTimings
from drafter.warping import Sampling
from experiments.gamma import by_rule
from experiments.reporting.gamma_page import gamma_page
from experiments.running.predictions import acceptance_of_answer, block_efficiencies, expected_counts
from experiments.running.speedups import decode_prompt
from experiments.running.turns import Work
from tests.experiments.test_pipeline import stage


def test_the_prediction_by_argmax_is_the_number_of_blocks_that_the_targets_text_has(target, drafter):
    work = Work([Task("task", "task:1", "", [1, 2, 3], DecodingOptions(40, Sampling(1.0)))], {}, {})
    (task,) = by_rule(work, "argmax").tasks
    tokens = decode_prompt(task, target, {"it": drafter}, {"it": [2]}, 1).baseline.tokens
    ids = torch.tensor([task.prompt + tokens])
    best = drafter(input_ids=ids).logits[0, len(task.prompt) - 1 : -1].argmax(-1).tolist()
    right = [one == token for one, token in zip(best, tokens, strict=True)]
    for gamma in (1, 2):
        position = blocks = 0
        while position < len(right):
            drafted = [*right[position : position + gamma], False]
            position, blocks = position + drafted.index(False) + 1, blocks + 1
        efficiencies = block_efficiencies([acceptance_of_answer(task, tokens, target, drafter)], 2)
        assert efficiencies[gamma - 1] == pytest.approx(len(right) / blocks)


def test_the_page_names_the_rule_unless_it_is_the_papers():
    timings = CallTimings(0.1, [1.0, 1.1])
    pages = [gamma_page([], timings, "drafter", False, {}, rule) for rule in ("ratio", "argmax")]
    assert ["accepted by the rule `argmax`" in page for page in pages] == [False, True]


def test_the_page_says_what_was_compiled():
    timings = CallTimings(0.1, [1.0, 1.1])
    assert "(the target compiled)" in gamma_page([], timings, "ngram", True, {}, without_model="alone")
    assert "(both models compiled)" in gamma_page([], timings, "ngram+x", True, {}, without_model="beside a model")


def test_the_page_counts_the_greedy_texts_that_are_the_targets_own():
    timings = CallTimings(0.1, [1.0, 1.1])
    page = gamma_page([], timings, "drafter", False, {}, greedy=(7, 8))
    assert "Greedy text is the target's own in 7 of 8 decodings." in page
    assert "Greedy text" not in gamma_page([], timings, "drafter", False, {})


@pytest.mark.parametrize("rule", ["argmax", "ratio"])
@pytest.mark.parametrize("combined", [False, True])
def test_a_drafter_without_a_model_costs_what_its_blocks_verify(target, drafter, combined, rule):
    timings = CallTimings(0.25, [1 + gamma / 10 for gamma in range(4)])
    work = Work([Task("task", "task:1", "", [1, 2, 1, 2], DecodingOptions(60, Sampling(1.0)))], {}, {})
    (task,) = by_rule(work, rule).tasks
    chosen = Combined(Lookup(), drafter) if combined else Lookup()
    answer = decode_prompt(task, target, {}, {}, 1).baseline.tokens
    predicted = expected_counts([task], [answer], target, chosen, timings, 3).ratios()
    plain = block_efficiencies([acceptance_of_answer(task, answer, target, drafter)], 3)
    for gamma, (efficiency, cost) in enumerate(predicted, start=1):
        assert 1 <= efficiency <= gamma + 1
        assert 1 < cost <= 1 + gamma / 10 + (0.25 * gamma if combined else 0.25)
        assert cost != pytest.approx(1 + gamma / 10 + 0.25 * gamma)  # some blocks are not drafted by the model
        finds_nothing = Combined(Lookup(NgramSizes(60, 60)), drafter)
        never = expected_counts([task], [answer], target, finds_nothing, timings, 3).ratios()
        assert never[gamma - 1] == pytest.approx((plain[gamma - 1], 1 + gamma / 10 + 0.25 * gamma))


def test_states_cost_a_replay_in_the_blocks_in_which_a_model_has_any(target, drafter):
    task = Task("task", "task:1", "", [1, 2, 1, 2], DecodingOptions(40))
    answer = decode_prompt(task, target, {}, {}, 1).baseline.tokens
    never = Combined(Lookup(NgramSizes(40, 40)), drafter)
    for chosen in (never, Lookup()):
        for of_drafter, of_target in ((True, False), (False, True), (True, True)):
            timings = CallTimings(0.25, [1 + gamma / 10 for gamma in range(4)], of_drafter, of_target)
            without = timings._replace(drafter_replays=False, target_replays=False)
            found = [expected_counts([task], [answer], target, chosen, one, 3).ratios() for one in (timings, without)]
            for gamma, ((_, cost), (_, cheaper)) in enumerate(zip(*found, strict=True), start=1):
                if chosen is never:
                    assert cost == pytest.approx(timings.block(gamma))
                elif of_target:  # of the blocks that have drafts, and these read at most gamma tokens again
                    assert 0 < cost - cheaper < timings.verification(gamma - 1)
                else:
                    assert cost == cheaper  # there is no draft model


def test_the_page_says_that_states_cost_a_second_reading():
    for of_drafter, of_target, subject in (
        (False, False, None),
        (True, False, "The drafter has"),
        (False, True, "The target has"),
        (True, True, "The target and the drafter have"),
    ):
        page = gamma_page([], CallTimings(0.1, [1.0, 1.1], of_drafter, of_target), "drafter", False, {})
        assert ("states" in page) == (subject is not None)
        assert subject is None or f"{subject} states, so that after a rejected draft" in page


@pytest.mark.parametrize("name", ["ngram", "ngram2-4+{root}/drafter"])
def test_the_report_of_a_drafter_without_a_model(world, tmp_path, capsys, name):
    overrides, root = world
    given = [
        *overrides,
        f"gamma.drafter={name.format(root=root)}",
        "gamma.largest=3",
        f"out={tmp_path}",
        "gamma.pad=false",
    ]
    stage("gamma", [*given, "gamma.decode=[2]", "gamma.prompts_per_task=2"])
    page = capsys.readouterr().out
    assert f"# Which γ for {name.format(root=root)}" in page
    assert ("proposing the drafts of a block takes" in page) == (name == "ngram")
    (folder,) = tmp_path.iterdir()
    counts = read_manifest(folder, "gamma")["counts"]
    assert counts["greedy_outputs"] > 0
    assert counts["greedy_outputs_unlike_the_target"] == 0
    assert f"Greedy text is the target's own in {counts['greedy_outputs']} of {counts['greedy_outputs']}" in page
    assert folder.name == ("ngram" if name == "ngram" else "ngram2-4+drafter")
