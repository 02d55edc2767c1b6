"""What follows from a measurement: predictions, what would have to change, the verdict, the settings of engines."""

import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from drafter.decoding.timings import CallTimings
from drafter.metrics import Estimate
from experiments.exporting.engine_settings import add_settings, engine_settings
from experiments.exporting.serving import serving
from experiments.reporting.measure_page import as_json, inline, json_of, markdown, sections
from experiments.reporting.measurement import (
    BatchRow,
    Calls,
    ContextRow,
    MeasuredRow,
    Measurement,
    accuracy,
    against_rivals,
    verdict,
    what_would_change,
)
from experiments.running.contexts import context_seconds
from experiments.running.measuring import Conditions, Prediction, choose_gammas, find_requirement
from experiments.running.predictions import ExpectedCounts
from experiments.running.summarising import predicted_speedups
from experiments.running.timed_pair import expected_seconds, rough_seconds

LONG = Conditions(1e9, 0.05)  # answers so long that the first block does not count


def test_the_rate_and_the_c_that_are_needed_are_those_of_theory():
    accepts, timings = [torch.full((400,), 0.42)], CallTimings(0.33, [1.0, 1.1])
    found = find_requirement(accepts, timings, LONG, 1, factor=1.0)
    # At γ = 1, τ = 1 + α up to the sequence's end, and a block costs c + v.
    assert found.acceptance_rate == pytest.approx(0.33 + 1.1 - 1, abs=0.005)
    assert found.ratio == pytest.approx(1 + 0.42 - 1.1, abs=0.005)
    slower = find_requirement(accepts, timings, LONG, 1, factor=0.9)  # as measured, all takes a ninth longer
    assert slower.acceptance_rate == pytest.approx((0.33 + 1.1) / 0.9 - 1, abs=0.005)


def test_a_verification_that_takes_too_long_makes_nothing_enough():
    found = find_requirement([torch.full((50,), 0.5)], CallTimings(0.5, [1.0, 2.5]), LONG, 1, 1.0)
    assert found == (None, None)


def test_hard_tokens_stay_hard_when_the_needed_rate_is_found():
    accept = torch.tensor([1.0, 0.0] * 100)
    found = find_requirement([accept], CallTimings(0.5, [1.0, 1.2]), LONG, 1, 1.0)
    # The easy tokens are in every second place, where drafts do not save a block unless a hard one is accepted.
    assert 0.5 <= found.acceptance_rate < 1


def test_two_gammas_with_the_highest_prediction_are_decoded_unless_some_are_given():
    predictions = [Prediction(2, 1, speedup) for speedup in (1.0, 1.3, 1.1, 1.2)]
    assert choose_gammas(predictions, None) == [2, 4]
    assert choose_gammas(predictions, [3]) == [3]
    assert choose_gammas(predictions[:1], None) == [1]


def test_reading_prompts_brings_a_speed_up_nearer_to_one():
    alone, with_reading = Conditions(64, 0.05), Conditions(64, 0.05, 0.5, 0.05)
    assert alone.speedup(2.4, 1.6) > with_reading.speedup(2.4, 1.6) > 1
    assert alone.speedup(1.2, 1.6) < with_reading.speedup(1.2, 1.6) < 1


def test_the_interval_of_a_prediction_is_over_prompts():
    conditions = Conditions(0, 0.01, 0.2, 0.05)  # the lengths are those of the answers
    tokens_N, blocks_NG = np.array([20, 40, 30]), np.array([[10.0, 8.0], [20.0, 10.0], [15.0, 12.0]])
    expected = ExpectedCounts(tokens_N, blocks_NG, blocks_NG * [1.2, 1.5])
    same, differs = predicted_speedups(expected, conditions)
    for gamma, found in enumerate((same, differs)):
        ((efficiency, cost),) = expected.ratios()[gamma : gamma + 1]
        assert found.value == pytest.approx(conditions._replace(tokens=30).speedup(efficiency, cost))
    # The bounds are those of one prompt drawn three times: 1 of 27 draws, which is more than the 2.5% beyond a bound.
    lengths_and_blocks = zip(tokens_N.tolist(), blocks_NG[:, 1], strict=True)
    alone = [conditions._replace(tokens=tokens).speedup(tokens / blocks, 1.5) for tokens, blocks in lengths_and_blocks]
    assert (differs.low, differs.high) == pytest.approx((min(alone), max(alone)))
    one = ExpectedCounts(tokens_N[:1], blocks_NG[:1], blocks_NG[:1])
    assert all(found.low == found.value == found.high for found in predicted_speedups(one, conditions))


def measurement(speedup, **fields):
    rows = [
        MeasuredRow("kld", 2, 1.8, 1.7, 1.6, Estimate(1.05, 1.0, 1.1), Estimate(0.5, 0.4, 0.6)),
        MeasuredRow("kld", 3, 2.1, 2.0, 1.7, Estimate(1.04, 0.9, 1.2), Estimate(*speedup)),
        MeasuredRow("ngram", 5, 1.4, 1.1, 1.4, Estimate(1.2, 1.1, 1.3), Estimate(1.2, 1.1, 1.3)),
        MeasuredRow("ngram", 6, 1.4, 1.2, 1.4, Estimate(1.1, 1.0, 1.2), None),
    ]
    known = {
        "target": "org/chat", "drafter": "runs/kld", "label": "kld", "has_model": True,
        "compatibility": ["They fit."], "parameters": ["Small."], "size_ratio": 0.04, "prompts": "2 prompts",
        "lengths": (20.0, 60.0), "temperature": 0.6,
        "calls": Calls(0.0033, 0.01, [1.1, 1.2, 1.3, 1.4, 1.5, 1.6], [], {}, False),
        "acceptance_rates": {"greedy": 0.42, "ratio": 0.5}, "by_rule": {"greedy": [1.4] * 6, "ratio": [1.5] * 6},
        "rows": rows, "equal": (8, 8), "needed_rate": 0.7, "needed_ratio": 0.12,
        "rival": Estimate(0.3, 0.1, 0.5),
    }  # fmt: skip
    return Measurement(**(known | fields))


def test_the_verdict_has_its_reason_in_numbers():
    assert verdict(measurement((1.31, 1.22, 1.4))) == (
        "γ = 3 pays: 1.31 [1.22, 1.40] times the target's own token rate (a block costs 2.00 target calls and gives "
        "2.10 tokens)."
    )
    assert verdict(measurement((1.03, 0.97, 1.09))).startswith("No difference seen: γ = 3, the best of those decoded")
    assert verdict(measurement((0.8, 0.7, 0.9))) == (
        "No γ pays: a draft costs 0.33 target calls and needs an acceptance rate above 0.70; it has 0.42 (γ = 3, the "
        "best of those decoded, has 0.80 [0.70, 0.90] times the target's own token rate)."
    )
    assert "no acceptance rate is high enough; it has 0.42" in verdict(measurement((0.8, 0.7, 0.9), needed_rate=None))
    assert verdict(measurement((0.8, 0.7, 0.9), has_model=False)).startswith("No γ pays: a block costs 2.00")


def test_what_would_have_to_change_is_said_only_where_no_gamma_pays():
    assert what_would_change(measurement((1.31, 1.22, 1.4))) is None
    assert what_would_change(measurement((0.8, 0.7, 0.9))) == (
        "What would have to change: a cheaper drafter: c below 0.12, or a better one: an acceptance rate above 0.70. "
        "It has c = 0.33 and an acceptance rate of 0.42."
    )
    for fields, end in (
        ({"needed_ratio": None}, "verification alone takes longer than it saves."),
        ({"needed_rate": None}, "At this c no acceptance rate is high enough."),
    ):
        assert what_would_change(measurement((0.8, 0.7, 0.9), **fields)).endswith(end)
    neither = what_would_change(measurement((0.8, 0.7, 0.9), needed_ratio=None, needed_rate=None))
    assert neither.startswith("Neither a cheaper drafter nor a better one alone")


def test_a_rival_is_faster_only_if_the_interval_of_the_difference_says_so():
    assert "faster than `kld` (+0.30 [+0.10, +0.50])" in against_rivals(measurement((0.8, 0.7, 0.9)))
    assert "no difference seen" in against_rivals(measurement((0.8, 0.7, 0.9), rival=Estimate(0.1, -0.1, 0.3)))
    assert against_rivals(measurement((0.8, 0.7, 0.9), rival=None)) is None


def test_each_prediction_is_compared_with_what_was_measured():
    found = measurement((1.3, 1.2, 1.4))
    page = markdown(sections(found))
    assert "| kld | 3 | 2.10 | 2.00 | 1.70 | 1.04 [0.90, 1.20] | 1.30 [1.20, 1.40] | 0.80 |" in page
    assert "| ngram | 6 | 1.40 | 1.20 | 1.40 | 1.10 [1.00, 1.20] |  |  |" in page  # not decoded
    # 1.05 / 0.5, 1.04 / 1.3 and 1.2 / 1.2.
    assert "Predicted speed-ups are between 0.80 and 2.10 times the measured ones." in page
    ratios = [row["predicted_by_measured"] for row in json_of(found)["rows"]]
    assert ratios[:3] == pytest.approx([2.1, 0.8, 1.0])
    assert ratios[3] is None
    one = accuracy([row for row in found.rows if row.gamma == 5])
    assert one == "The predicted speed-up is 1.00 times the measured one."


SPEEDUPS = {"greedy": [1.0, 1.2, 1.1], "ratio": [1.0, 1.1, 1.3], "argmax": [1.2, 1.1, 0.9], "match": [1.0, 0.9, 0.8]}


def test_each_engine_gets_the_gamma_for_its_own_rule():
    found = {one.engine: one for one in engine_settings("org/chat", "runs/kld", SPEEDUPS)}
    assert (found["vLLM"].rule, found["vLLM"].gamma) == ("ratio", 3)  # 1.3 is above what `argmax` reaches
    assert (found["SGLang"].rule, found["SGLang"].gamma) == ("argmax", 2)
    assert (found["SGLang"].greedy, found["SGLang"].sampled) == (1.2, 1.1)
    assert "--speculative-num-steps 2" in found["SGLang"].lines
    other = {one.engine: one for one in engine_settings("t", "d", {**SPEEDUPS, "ratio": [0.9, 0.9, 0.9]})}
    assert other["vLLM"].rule == "argmax"
    assert "draft_sample_method" not in other["vLLM"].lines


def test_transformers_and_this_project_are_told_gamma_of_a_drafter_that_was_not_exported():
    lines, exported = (serving("hf", "t", "d", 3, sets_gamma=one) for one in (True, False))
    assert "drafter.generation_config.update(num_assistant_tokens=3, " in lines["transformers"]
    assert lines["this project"].endswith(" chat.num_speculative_tokens=3")
    assert "num_assistant_tokens" not in exported["transformers"]
    assert "num_speculative_tokens" not in exported["this project"]


def test_a_faster_prompt_lookup_and_an_export_are_among_the_settings():
    speedups = {"kld": SPEEDUPS, "ngram": SPEEDUPS}
    found = add_settings(measurement((0.8, 0.7, 0.9), differs=True, batches=[BatchRow(1, 0.3, 4, 1.2)]), speedups)
    names = [one.engine for one in found.engines]
    assert "vLLM, ngram" in names
    assert found.export.startswith("python -m experiments.export export.drafter=runs/kld")
    assert "exports/kld-hf" in next(one.lines for one in found.engines if one.engine == "vLLM")
    assert found.schedule == "[[1, 4096, 4]]"
    assert found.speculative_config["model"] == "exports/kld-hf"
    slower = add_settings(measurement((0.8, 0.7, 0.9), rival=Estimate(0.1, -0.1, 0.3)), speedups)
    assert "vLLM, ngram" not in [one.engine for one in slower.engines]
    page = markdown(sections(found))
    for text in ("export the drafter first", "γ by batch size", "serve the target without this drafter"):
        assert text in page


def test_the_gammas_by_batch_size_are_complete_options_of_engines():
    batches = [BatchRow(2, 0.3, 3, 1.3), BatchRow(8, 0.3, 5, 1.4), BatchRow(64, 0.3, 0, 0.9)]
    speedups = {"kld": SPEEDUPS, "ngram": SPEEDUPS}
    found = add_settings(measurement((1.3, 1.2, 1.4), batches=batches), speedups)
    assert found.speculative_config == {
        "model": "runs/kld",
        "num_speculative_tokens": 5,  # vLLM drafts no more than this for any batch size
        "method": "draft_model",
        "draft_sample_method": "probabilistic",
        "num_speculative_tokens_per_batch_size": [[1, 7, 3], [8, 63, 5], [64, 4096, 0]],
    }
    code = sections(found)[-1].code
    option, value = shlex.split(code["vLLM, γ by batch size"])
    assert (option, json.loads(value)) == ("--speculative-config", found.speculative_config)
    assert code["llama.cpp, one γ for all batch sizes: the best one at 2"] == "--spec-draft-n-max 3"
    assert json_of(found)["speculative_config"] == found.speculative_config


def test_no_option_is_printed_where_no_gamma_pays_or_no_engine_has_such_a_drafter():
    speedups = {"kld": SPEEDUPS, "ngram": SPEEDUPS, "layers2": SPEEDUPS}
    never = measurement((0.8, 0.7, 0.9), batches=[BatchRow(1, 0.3, 0, 0.9), BatchRow(8, 0.3, 0, 0.8)])
    pays = [BatchRow(1, 0.3, 2, 1.1)]
    lookup = {"drafter": "ngram", "label": "ngram", "has_model": False, "rival": None}
    for given, method in (
        (never, None),
        (measurement((1.3, 1.2, 1.4), drafter="layers2", rival=None, batches=pays), None),
        (measurement((1.3, 1.2, 1.4), **lookup, batches=pays), "ngram"),
    ):
        found = add_settings(given, speedups)
        assert (found.speculative_config or {}).get("method") == method
        assert ("vLLM, γ by batch size" in sections(found)[-1].code) == (method is not None)
        assert not [title for title in sections(found)[-1].code if "one γ for all" in title]


def test_the_best_gamma_of_a_context_is_none_where_no_gamma_pays():
    rows = [ContextRow(128, 0.1, [1.1, 1.2], [1.2, 1.3], None), ContextRow(8176, 0.4, [1.5, 1.9], [0.9, 0.8], None)]
    page = markdown(sections(measurement((1.3, 1.2, 1.4), contexts=rows)))
    assert "Best γ: 128 tokens: γ = 2 (1.30); 8,176 tokens: none pays (0.90)." in page
    assert "| 8,176 | 1 | 0.40 | 1.50 | 0.90 |" in page
    assert "## Contexts" not in markdown(sections(measurement((1.3, 1.2, 1.4))))


def test_the_time_that_contexts_take_grows_faster_than_they_do():
    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    target, tasks = LlamaForCausalLM(config), [SimpleNamespace(prompt=[1] * 10)]
    timings, conditions = {"d": CallTimings(0.1, [1.0, 1.0])}, {"d": Conditions(8, 1.0, 10.0, 0.0)}
    pair = SimpleNamespace(plain_target=target, alone=1, target=1, timings=timings, conditions=conditions)
    assert context_seconds(pair, tasks, []) == 0
    one, two = (context_seconds(pair, tasks, [context]) for context in (100, 200))
    # A token of the prompt takes a second, and 17 rounds of calls take 2.3 seconds each, without attention.
    assert one > 100 + 17 * 2.3
    assert two - 17 * 2.3 > 2 * (one - 17 * 2.3)


def test_the_expected_seconds_are_those_of_all_decodings_and_timed_calls():
    timings, conditions = {"d": CallTimings(0.1, [1.0, 1.2])}, {"d": Conditions(8, 1.0, 2.0, 0.5)}
    pair = SimpleNamespace(timings=timings, conditions=conditions)
    # A decoding reads for 2.5 seconds and generates for 8; each of 17 rounds has a draft and calls with 1 and 2 tokens.
    assert expected_seconds(pair, 3, 4, [1]) == pytest.approx(3 * 4 * 10.5)
    assert expected_seconds(pair, 3, 4, [1, 2, 3]) == pytest.approx(3 * 4 * 10.5 + 17 * 2.3 * (2 + 3))


def test_the_rough_seconds_follow_from_the_first_calls():
    tasks = [SimpleNamespace(prompt=[1] * 10), SimpleNamespace(prompt=[1] * 30)]
    given = {"batch_sizes": [1, 4], "contexts": [100], "pad": True, "largest": 3, "max_new_tokens": 20}
    settings = OmegaConf.create(given)
    # 5 decodings of 40 read and 2 * 20 generated tokens. Calls are timed, for padding too, with 4 rows and 100 tokens.
    expected = 5 * (40 * 0.01 + 40 * 0.1) + 17 * 4 * 0.1 * (1 + 1 + 4 + 1) + 100 * 0.01
    assert rough_seconds(0.1, 0.01, tasks, 5, settings) == pytest.approx(expected)
    settings.batch_sizes, settings.contexts, settings.pad = [1], None, False
    assert rough_seconds(0.1, 0.01, tasks, 5, settings) == pytest.approx(22 + 17 * 4 * 0.1)


def test_the_page_says_that_rounding_made_texts_differ():
    assert "own in 8 of 8 decodings. Measured" in markdown(sections(measurement((1.3, 1.2, 1.4))))
    assert "In the others, rounding decided" in markdown(sections(measurement((1.3, 1.2, 1.4), equal=(7, 8))))


def test_html_is_escaped_and_json_has_the_fields_of_records():
    assert inline("a < b & `x`") == "a &lt; b &amp; <code>x</code>"
    assert as_json(Estimate(1.0, 0.5, 1.5)) == {"value": 1.0, "low": 0.5, "high": 1.5}
    assert as_json({2: [np.float64(1.5)]}) == {"2": [1.5]}
