"""What a model card says of acceptance rules and temperatures: for each engine, and in the table of results."""

import json
import shutil

import pytest

from drafter.artifacts.manifest import MANIFEST, read_jsonl, write_json, write_jsonl
from drafter.metrics import Estimate
from experiments.exporting.card import describe_rule, gamma_table, results_table
from experiments.exporting.facts import Facts, gather, read_facts
from experiments.exporting.gammas import LOOP, GammaReport, newest
from experiments.reporting.gamma_page import GammaRow
from experiments.reporting.results import POOLED, ResultRow
from experiments.reporting.tabular import with_interval
from tests.experiments.test_export import exported  # noqa: F401 (a fixture)
from tests.experiments.test_export_facts import moved  # noqa: F401 (a fixture)


def results(tau, timed=True):
    """Return rows of two tasks and of both together, at γ = 3."""
    one = Estimate(tau, tau - 0.1, tau + 0.1)
    return [
        ResultRow("kld", task, 3, 1, 8, one, one, None, one, one if timed else None, one)
        for task in ("open_ended", "summary", POOLED)
    ]


def facts_of(by_rule, loss="kld", temperatures=(0, 0.6)):
    """Return facts with these results, whose tasks were decoded at these temperatures."""
    single = dict(zip(("open_ended", "summary"), ([value] for value in temperatures), strict=True))
    return Facts({}, {}, by_rule, 0.1, [], loss, {**single, POOLED: sorted(set(temperatures))})


def test_a_column_has_the_temperature_only_where_it_differs():
    table = results_table(facts_of({"ratio": results(1.5)}))
    assert table.columns == ["task", "temperature", "γ", "prompts", "τ", "MBSU", "acceptance rate", "token rate"]
    assert [line[:2] for line in table.rows] == [
        ["open ended", "0"],
        ["summary", "0.6"],
        ["in domain, all", "0 and 0.6"],
    ]
    assert "temperature" not in results_table(facts_of({"ratio": results(1.5)}, temperatures=(0.6, 0.6))).columns
    unknown = facts_of({"ratio": results(1.5)})._replace(temperatures={})
    assert "temperature" not in results_table(unknown).columns


def test_each_rule_that_was_measured_has_a_column():
    table = results_table(facts_of({"ratio": results(1.5), "argmax": results(1.2)[:1]}))
    assert table.columns[4:7] == ["τ, `ratio`", "τ, `argmax`", "MBSU"]
    assert [line[4:7] for line in table.rows] == [
        ["1.50 [1.40, 1.60]", "1.20 [1.10, 1.30]", "1.50 [1.40, 1.60]"],
        *[["1.50 [1.40, 1.60]", "not measured", "1.50 [1.40, 1.60]"]] * 2,
    ]
    assert results_table(facts_of({"argmax": results(1.2)})).columns[4] == "τ, `argmax`"
    by_hit = results_table(facts_of({"argmax": results(1.2), "ratio": results(1.5)}, "hit"))
    assert by_hit.rows[0][6] == "1.20 [1.10, 1.30]"  # MBSU is by the rule that the loss is for


def test_the_results_have_no_token_rate_where_it_was_not_measured():
    table = results_table(facts_of({"ratio": results(1.5, timed=False)}))
    assert table.columns[-1] == "acceptance rate"
    assert {len(line) for line in table.rows} == {len(table.columns)}


def test_each_engine_has_its_rule_and_the_block_efficiency_by_it(exported):  # noqa: F811
    card, facts = (exported[2] / "README.md").read_text(), gather(str(exported[1]))
    tau = with_interval(facts.best.block_efficiency)
    found = f"`ratio`, for which τ = {tau} was measured (in domain, all; γ = {facts.best.gamma}; temperature 0 and 0.6)"
    for engine in ("vLLM", "transformers", "this project"):
        assert f"{engine}:\n\nAbove temperature 0 the acceptance rule is {found}" in card
    assert "SGLang:\n\nAbove temperature 0 the acceptance rule is `argmax`, for which τ was not measured." in card
    both = facts_of({"ratio": results(1.5), "argmax": results(1.2)}, "hit")
    assert "`argmax`, for which τ = 1.20 [1.10, 1.30]" in describe_rule("vLLM", both, 2)
    assert "`ratio`, for which τ = 1.50 [1.40, 1.60]" in describe_rule("transformers", both, 2)
    assert "does not keep the target's distribution" in describe_rule("OpenVINO GenAI, greedy", both, 2)
    assert both.rows == both.by_rule["argmax"]


def test_a_greedy_evaluation_holds_for_every_rule():
    greedy = facts_of({"ratio": results(1.5)}, temperatures=(0, 0))
    for engine, rule in (("vLLM", "ratio"), ("SGLang", "argmax")):
        assert describe_rule(engine, greedy, 3) == (
            f"Above temperature 0 the acceptance rule is `{rule}`. At temperature 0, where all rules are the same, "
            f"τ = 1.50 [1.40, 1.60] was measured (in domain, all; γ = 3)."
        )
    both = greedy._replace(by_rule={"ratio": results(1.5), "argmax": results(1.5)})
    for one in (greedy, both, greedy._replace(by_rule={"argmax": results(1.5)})):
        assert results_table(one).columns[:4] == ["task", "γ", "prompts", "τ"]


def test_the_manifest_of_an_export_has_rules_loss_and_temperatures():
    reports = [GammaReport(LOOP, [GammaRow("a", 2, 1.5, 1.2, 1.25, None, 16)], "argmax", "float32, 8 bits")]
    facts = facts_of({"argmax": results(1.2), "ratio": results(1.5)}, "hit")._replace(reports=reports)
    manifest = {"stage": "export", "config": {"root": "x"}, "facts": json.loads(json.dumps(facts.record()))}
    assert read_facts(manifest, []) == facts._replace(manifest=manifest)
    assert list(read_facts(manifest, []).by_rule) == ["argmax", "ratio"]
    del manifest["facts"]["loss"], manifest["facts"]["temperatures"]  # an export of an earlier version
    assert read_facts(manifest, []).temperatures == {}


def test_the_gamma_of_a_drafter_is_that_by_its_rule():
    by_gamma = {1: "ratio", 2: "argmax"}
    reports = [GammaReport(LOOP, [GammaRow("a", g, 1.5, 1.2, 1.25, None)], rule) for g, rule in by_gamma.items()]
    assert facts_of({}, "hit")._replace(reports=reports).gamma("hf") == 2
    assert facts_of({}, "kld")._replace(reports=reports).gamma("hf") == 1
    assert [line[0] for line in gamma_table(reports).rows] == [LOOP, f"{LOOP}, by `argmax`"]


def test_the_table_of_gamma_has_the_prompts_and_the_precision_of_each_line():
    measured = Estimate(0.77, 0.73, 0.86)
    row = GammaRow("a", 2, 1.5, 1.9, 0.77, measured, 4)
    reports = [
        GammaReport("llama-server", [row._replace(prompts=8)], precision="float32, 8 bits"),
        GammaReport("llama-server", [row], precision="8 bits, 8 bits"),
    ]
    assert newest([*reports, *reports]) == reports
    table = gamma_table(reports)
    assert table.columns[:5] == ["engine", "target, drafter in", "task", "prompts", "best γ"]
    assert [line[1] for line in table.rows] == ["float32, 8 bits", "8 bits, 8 bits"]
    assert [line[3] for line in table.rows] == ["8", "4"]
    assert [line[-1] for line in table.rows] == ["0.77 [0.73, 0.86]", "0.77"]  # of four prompts there is no interval
    assert gamma_table([GammaReport(LOOP, [row._replace(prompts=None)])]).columns[:3] == ["engine", "task", "best γ"]


@pytest.mark.parametrize(("sampling", "rules"), [({}, ["ratio", "argmax"]), ({"temperature": 1.0}, ["ratio"])])
def test_evaluations_with_another_sampling_do_not_share_the_table(moved, world, sampling, rules):  # noqa: F811
    drafter, root = moved[0], moved[0].parent.parent
    theirs = world[1] / "evaluate" / drafter.name
    shutil.copytree(theirs, root / "evaluate" / drafter.name)
    other = shutil.copytree(theirs, root / "evaluate-argmax" / drafter.name)
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["settings"] |= {"acceptance_rules": ["argmax"], "sampling": sampling}
    write_json(other / MANIFEST, manifest)
    write_jsonl(other / "counts.jsonl", [row | {"rule": "argmax"} for row in read_jsonl(other / "counts.jsonl")])
    facts = gather(str(drafter))
    assert list(facts.by_rule) == rules
    assert facts.size_ratio is not None
    assert facts.temperatures["sampled"] == [0.6]
