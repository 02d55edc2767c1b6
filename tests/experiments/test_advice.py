"""The plan's advice: what drafts of each size cost and need, and what a budget buys."""

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from drafter.models.initialization import build_drafter
from experiments import plan as plan_command
from experiments.planning.advice import (
    Candidate,
    advice,
    advise,
    best_speedup,
    break_even,
    candidates,
    check_hours,
    choose,
    llama_shape,
    size_overrides,
    verification_costs,
)
from experiments.planning.roofline import Shape
from experiments.planning.world import World
from experiments.running.composing import configured

TARGET = Shape(6_700_000_000, 6_600_000_000, 32, 4096, 4096, 32_000, 262_144)


@pytest.fixture(scope="module")
def plan():
    with initialize_config_module("conf", version_base="1.3"):
        hardware = compose("plan", ["hardware=h100"]).hardware
        cfg = configured("pretrain", ["scale=llama2"])
    return cfg, World(hardware, 8, TARGET, TARGET, prompt=200, response=200, block_efficiency=2.0, finetunings=1)


def sizes(plan, seconds):
    cfg, world = plan
    return candidates(cfg, world, seconds)


def test_the_shape_of_a_candidate_is_that_of_the_model_that_would_be_built():
    shape = llama_shape(2, 64, 320)
    with initialize_config_module("conf", version_base="1.3"):
        drafter = configured("pretrain", ["scale=smoke", *size_overrides(shape).split()]).drafter
    assert Shape.of(build_drafter(OmegaConf.to_container(drafter), 320, {})) == shape


def test_depth_costs_a_draft_more_than_width_and_twice_the_time_buys_twice_the_tokens(plan):
    found = {(one.shape.layers, one.shape.hidden): one for one in sizes(plan, 3600.0)}
    assert set(found) == {(layers, hidden) for layers in (1, 2, 4) for hidden in (256, 512, 1024)}
    assert found[4, 512].cost > 1.5 * found[2, 512].cost
    assert found[2, 1024].cost < 1.5 * found[2, 512].cost
    assert found[2, 512].tokens_per_parameter > found[2, 1024].tokens_per_parameter
    for key, twice in {(one.shape.layers, one.shape.hidden): one for one in sizes(plan, 7200.0)}.items():
        assert twice.tokens_per_parameter == pytest.approx(2 * found[key].tokens_per_parameter)


def test_a_speedup_at_a_rate_is_that_of_independent_drafts():
    assert best_speedup(0.8, 0.1, {3: 1.0}) == (pytest.approx((1 + 0.8 + 0.64 + 0.512) / 1.3), 3)
    assert best_speedup(0.0, 0.1, {1: 1.0, 2: 1.0}) == (pytest.approx(1 / 1.1), 1)
    free = best_speedup(0.8, 0.0, dict.fromkeys(range(1, 9), 1.0))
    assert free[1] == 8


def test_the_rate_that_pays_is_where_the_speedup_passes_one(plan):
    verification = verification_costs(*plan)
    assert all(cost >= 1 for cost in verification.values())
    for cost in (0.05, 0.3):
        rate = break_even(cost, verification)
        assert best_speedup(rate, cost, verification)[0] > 1 >= best_speedup(rate - 0.01, cost, verification)[0]
    assert break_even(1.5, verification) == 1.0  # a draft costs more than the token that it may save


def test_the_size_advised_is_near_a_200th_of_the_target(plan):
    chosen = choose(sizes(plan, 3600.0), TARGET)
    assert (chosen.shape.layers, chosen.shape.hidden) == (1, 1024)  # 46M is nearer to 33.5M than 23M is


@pytest.mark.parametrize(("bought", "start"), [(3.0, "init.steps=0"), (300.0, "more than the 8")])
def test_a_small_budget_is_advised_to_leave_out_pretraining(bought, start):
    text = advice(Candidate(llama_shape(2, 512, 32_000), 0.02, bought), TARGET, 5400.0)
    assert start in text
    assert "all of 90 min would buy" in text
    assert "drafter.hidden_size=512" in text
    assert "with 1/289" in text


def test_the_section_has_a_line_for_each_size_and_the_hours_that_were_given(plan):
    cfg, world = plan
    text = advise(cfg, world, [], hours=2)
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + 9
    assert "tokens / parameter in 2.0 h" in text
    assert "`drafter.num_hidden_layers=1 drafter.hidden_size=1024" in text


@pytest.mark.parametrize("hours", [0, -1, "abc"])
def test_hours_that_are_no_time_are_refused(hours):
    with pytest.raises(ValueError, match=f"plan.hours is {hours}, must be a number above 0"):
        check_hours(hours)


def test_a_start_without_training_is_planned(capsys):
    plan_command.main(["scale=tiny", "hardware=cpu", "plan.gpus=1", "init=layers", "losses=[]"])
    page = capsys.readouterr().out
    assert "| pretrain | 1 | 0 |" in page
    assert "Size: `drafter.num_hidden_layers=" in page
    assert "Start:" not in page  # there is no time to divide
