import math

import pytest

from benchmarks.engine_counts import ALL, Measurement, pairs, summarise, summary_record, table
from drafter.metrics import Estimate
from experiments.running.engine_answers import Answer


def alone(tokens, seconds):
    return Answer(tokens, len(tokens), seconds + 1, seconds, len(tokens) - 1)


def drafted(tokens, seconds, calls, drafts):
    accepted = len(tokens) - 1 - calls
    return Answer(tokens, len(tokens), seconds + 1, seconds, calls, drafts, accepted)


def measured(prompt, task, repeat, target, drafter, pair, gamma=2):
    found = [("target", 0, target), ("drafter", 0, drafter), ("pair", gamma, pair)]
    return [Measurement(prompt, task, repeat, name, number, answer) for name, number, answer in found]


TEXT = list(range(9))
# 8 tokens of decoding: 0.8 s alone, 0.08 s by the drafter alone, 0.6 s in 4 blocks of 2 drafts.
ONE = measured("1", "short", 0, alone(TEXT, 0.8), alone(TEXT, 0.08), drafted(TEXT, 0.6, 4, 8))
# The same prompt is slower in the second pass, with the drafter and without.
AGAIN = measured("1", "short", 1, alone(TEXT, 1.6), alone(TEXT, 0.16), drafted(TEXT, 1.2, 4, 8))
# Another prompt, whose text with the drafter differs, and which gains less.
OTHER = measured("2", "long", 0, alone(TEXT, 0.8), alone(TEXT, 0.08), drafted([*TEXT[:3], 7, 7], 0.4, 4, 8))


def test_a_ratio_is_tau_over_the_cost_of_a_block():
    (found,) = summarise(ONE)
    assert found.tau.value == 2.0
    assert found.rate_alone == pytest.approx(10)
    assert found.rate == pytest.approx(8 / 0.6)
    assert found.ratio.value == pytest.approx(0.8 / 0.6)
    assert found.request_ratio.value == pytest.approx(1.8 / 1.6)
    assert found.accepted == 0.5
    assert found.block_cost == pytest.approx(0.15 / 0.1)
    assert found.ratio.value == pytest.approx(found.tau.value / found.block_cost)
    assert found.c == pytest.approx(0.1)
    assert found.v == pytest.approx(1.5 - 2 * 0.1)
    assert (found.texts, found.differences) == (1, [])


def test_passes_are_paired_by_themselves_and_resampled_with_their_prompt():
    found = pairs([*AGAIN, *ONE], 2)
    assert [(one.drafted.decoding_seconds, one.alone.decoding_seconds) for one in found] == [(1.2, 1.6), (0.6, 0.8)]
    (summary,) = summarise([*ONE, *AGAIN])
    assert (summary.prompts, summary.texts) == (1, 2)
    assert summary.ratio == pytest.approx((2.4 / 1.8,) * 3)  # one prompt: its sums are resampled, not its passes


def test_each_task_has_its_row_and_all_prompts_one():
    found = summarise([*ONE, *OTHER])
    assert [(one.task, one.prompts) for one in found] == [("short", 1), ("long", 1), (ALL, 2)]
    pooled = found[-1]
    assert pooled.tau.value == (8 + 4) / (4 + 4)  # a ratio of sums, not a mean of ratios
    assert pooled.ratio.value == pytest.approx((12 / 1.0) / (16 / 1.6))
    assert (pooled.ratio.low, pooled.ratio.high) == pytest.approx((1.0, 0.8 / 0.6))
    assert summarise(ONE)[-1].task == "short"  # the only task is not repeated


def test_gammas_share_the_runs_of_the_target():
    more = measured("1", "short", 0, alone(TEXT, 0.8), alone(TEXT, 0.08), drafted(TEXT, 1.0, 4, 20), gamma=5)[-1:]
    two, five = summarise([*ONE, *more])
    assert (two.gamma, five.gamma) == (2, 5)
    assert five.ratio.value == pytest.approx(0.8)
    assert two.rate_alone == five.rate_alone


def test_differences_are_positions_of_first_tokens():
    found = summarise(OTHER)[0]
    assert found.differences == [3]
    assert found.row()[-1] == "0 of 1, first difference at token 3"
    assert summarise(ONE)[0].row()[-1] == "1 of 1"


def test_a_request_with_a_drafter_and_none_without_is_refused():
    with pytest.raises(KeyError):
        pairs(ONE[1:], 2)


def test_texts_of_one_token_give_no_rate():
    first = [0]
    rows = measured("1", "short", 0, alone(TEXT, 0.8), alone(first, 0.0), drafted(TEXT, 0.6, 4, 8))
    (found,) = summarise(rows)
    assert math.isnan(found.c)
    assert summary_record(found)["c"] is None
    assert summary_record(found)["ratio"].keys() == set(Estimate._fields)


def test_the_table_has_a_cell_for_each_column():
    found = table("llama-server", summarise([*ONE, *OTHER]))
    assert {len(row) for row in found.rows} == {len(found.columns)}
    assert "| short | 2 | 1 | 10.0 | 13.3 | 1.33 | 1.12 | 2.00 |" in found.markdown()


@pytest.mark.parametrize(("prompts", "cell"), [(4, "1.33"), (5, "1.33 [1.33, 1.33]")])
def test_a_row_of_fewer_than_five_prompts_has_no_interval(prompts, cell):
    rows = [one._replace(prompt=str(number)) for number in range(prompts) for one in ONE]
    (found,) = table("llama-server", summarise(rows)).rows
    assert found[2] == str(prompts)
    assert found[5] == cell
