"""Recipes of starts take the same number of operations, and their table compares them by prompt."""

import re

import pytest
from hydra import compose, initialize_config_module

from drafter.artifacts.manifest import read_manifest
from drafter.metrics import Counts
from experiments import starts
from experiments.planning import equal_compute
from experiments.reporting.identity import DrafterIdentity
from experiments.reporting.results import Evaluation
from experiments.reporting.starts import Recipe, starts_table
from experiments.running.composing import gather_stage_overrides


def planned(*overrides):
    with initialize_config_module("conf", version_base="1.3"):
        settings = compose("starts", gather_stage_overrides("starts", list(overrides)))
        others = list(settings.stage_overrides)
        equal_compute.check_settings(settings)
        equal_compute.check_starts(settings, others)
        recipes = equal_compute.plan_recipes(settings, others)
        chosen = equal_compute.starts_of(settings)
        return recipes, {start: equal_compute.step_operations(settings, others, chosen[start]) for start in chosen}


def test_every_recipe_takes_the_operations_of_the_scale_in_the_shares_that_were_asked_for():
    found, per_step = planned("scale=tiny", "seeds=[1,7]", "shares=[0.8]", "starts.narrow=null")
    scale = found[0].pretraining.cfg.scale
    budget = scale.pretrain_steps * per_step["scratch"][0] + scale.finetune_steps * per_step["scratch"][1]
    assert [one.name for one in found[:4]] == ["scratch-80", "projected-80", "layers-80", "muon-80"]
    assert len(found) == 2 * 4
    for one in found:
        steps = one.pretraining.cfg.pretrain.max_steps, one.finetuning.cfg.finetune.max_steps
        spent = [number * operations for number, operations in zip(steps, per_step[one.start], strict=True)]
        assert spent[0] == pytest.approx(one.share * budget, abs=per_step[one.start][0] / 2)
        assert spent[1] == pytest.approx((1 - one.share) * budget, abs=per_step[one.start][1] / 2)
        assert one.finetuning.cfg.inputs.drafter == one.pretraining.cfg.out
        assert one.finetuning.cfg.series == one.name
        assert one.pretraining.cfg.seed == one.finetuning.cfg.seed
    assert len({one.finetuning.cfg.out for one in found} | {one.pretraining.cfg.out for one in found}) == 2 * len(found)
    assert {one.pretraining.cfg.init.kind for one in found} == {"scratch", "projected", "layers"}


def test_a_start_of_ones_own_is_added_and_one_is_left_out():
    given = '+starts.own=["init=scratch","optimizer=muon"]'
    (one,), _ = planned(
        *("scale=tiny", "starts.projected=null", "starts.narrow=null", "starts.layers=null", "starts.scratch=null"),
        *("starts.muon=null", given, "seeds=[1]", "shares=[0.25]", "base=own-25", "operations=1e12"),
    )
    assert one.name == "own-25"
    assert "muon" in one.pretraining.cfg.optimizer._target_
    assert "muon" in one.finetuning.cfg.optimizer._target_


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["shares=[0,1]"], "shares has 1, must have numbers from 0 to less than 1"),
        (["shares=[0.4,0.4]"], "which gives two recipes the name scratch-40"),
        (["shares=null"], "shares is None, must be a list of numbers"),
        (["seeds=[]"], "seeds is [], must be a list of whole numbers"),
        (["seeds=[a]"], "seeds has 'a', must have whole numbers"),
        (["seeds=[1,1]"], "one of them stands there twice"),
        (["operations=-1e12"], "must be a number above 0, or null"),
        (["num_speculative_tokens=adaptive"], "num_speculative_tokens is adaptive, must be a whole number"),
        (["+starts.x='init=layers'"], "starts.x is 'init=layers', must be a list of overrides"),
        (['+starts.x=["nonsense=1"]'], "starts.x has 'nonsense=1', but 'nonsense' is a setting of neither"),
        (['+starts.x=["respond.top_p=0.5"]'], "'respond' is a setting of neither pretrain nor finetune"),
        (['+starts.x=["seed=3"]'], "starts.x has 'seed=3', which every recipe sets itself"),
        (["finetune.max_steps=7"], "the command line has 'finetune.max_steps=7', which every recipe sets itself"),
        (['+starts.x=["pretrain.kept_tokens=9"]'], "give pretrain.kept_tokens and finetune.kept_tokens the same value"),
        (
            ['+starts.x=["pretrain.sampled_tokens=9"]'],
            "give pretrain.sampled_tokens and finetune.sampled_tokens the same",
        ),
        (["base=scratch-81"], "base is 'scratch-81', must be one of the recipes: scratch-0"),
        (["operations=1000"], "operations is 1e+03, less than a step of scratch-0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(overrides, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        planned("scale=tiny", *overrides)


def evaluation(series, ratio, calls, seed=1):
    counts = {
        (task, 3, f"{task}:{n}"): Counts(12, calls + n % 2, 3, 6, 1.0, 12, 1.0)
        for task in ("asked", "code")
        for n in range(4)
    }
    return Evaluation(DrafterIdentity(series, "kld", seed=seed), ratio, ("asked",), counts, [], None)


def test_the_table_has_steps_seconds_and_paired_differences():
    recipes = {
        "scratch-80": [Recipe("scratch", 0.8, 100, 20, 50.0), Recipe("scratch", 0.8, 100, 20, 70.0)],
        "layers-0": [Recipe("layers", 0.0, 0, 9, 30.0)],
    }
    evaluations = [
        evaluation("scratch-80", 0.05, 8),
        evaluation("scratch-80", 0.05, 8, 2),
        evaluation("layers-0", 0.5, 6),
    ]
    table = starts_table(recipes, evaluations, "scratch-80", 3)
    rows = table.rows
    assert [len(row) for row in rows] == [len(table.columns)] * 2
    assert rows[0][:5] == ["scratch", "80%", "100 + 20", "60", "0.050"]
    assert rows[1][:5] == ["layers", "0%", "0 + 9", "30", "0.500"]
    assert rows[0][5].startswith("1.41")  # 48 tokens in 34 calls
    assert rows[1][5].startswith("1.85")  # 48 tokens in 26 calls
    assert rows[0][7] == ""
    # Each seed counts the same prompts again, so tau of the two seeds is 96 / 68.
    assert rows[1][7].startswith("+0.43")
    assert rows[1][-2].startswith("0.74")  # 1.85 / 2.5
    assert rows[1][-1].startswith("-0.49")  # 1.85 / 2.5 - 1.41 / 1.15


@pytest.mark.end_to_end
def test_the_command_runs_what_is_missing_and_writes_the_table(world, tmp_path):
    overrides, _ = world
    command = [*overrides, f"publish={tmp_path}", "seeds=[1]", "shares=[0,0.5]", "starts.narrow=null"]
    command += ["starts.layers=null", "base=scratch-50", "starts.projected=null", "starts.muon=null"]
    starts.main(command)
    root = next(part.partition("=")[2] for part in overrides if part.startswith("root="))
    rows = (tmp_path / "starts" / "starts.md").read_text().splitlines()
    assert [row.split(" | ")[:2] for row in rows if row.startswith("| scratch")] == [
        ["| scratch", "0%"],
        ["| scratch", "50%"],
    ]
    found = read_manifest(f"{root}/starts/finetune/scratch-0-seed1", "finetune")
    assert found["inputs"]["drafter"]
    assert read_manifest(f"{root}/starts/drafter/scratch-0-seed1", "pretrain")["counts"]["steps"] == 0
    before = (tmp_path / "starts" / "starts.md").read_text()
    starts.main(command)
    assert (tmp_path / "starts" / "starts.md").read_text() == before
