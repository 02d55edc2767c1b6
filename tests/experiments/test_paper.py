"""The tables of the paper's questions, made from known counts, and the conversion of tables to LaTeX."""

import pytest

from experiments.reporting import paper
from experiments.reporting.results import read_evaluations
from experiments.reporting.tabular import Table, escaped, number
from tests.experiments.test_tables import evaluation

TASKS = {"open_ended": 6, "summary": 2, "code": 4}


def made(root, folder, drafters):
    """Return evaluations of each (loss, variant, accepted drafts in ten blocks) with two seeds; the second is better.

    The names of the directories do not contain the variants, so that the tables have to read the fields.
    """
    for index, (loss, variant, accepted) in enumerate(drafters):
        for seed in (1, 2):
            name = f"{folder}{index}" if variant else loss
            kinds = ["summary"] if variant == "only_summary" else None
            fields = {"loss": loss, "variant": variant, "kinds": kinds}
            evaluation(root / folder, f"{name}.{seed}", name, seed, TASKS, (3,), accepted + 2 * seed - 2, fields)
    return read_evaluations(root / folder / "evaluate")


@pytest.fixture
def whole(tmp_path):
    evaluation(tmp_path / "whole", "drafter", "pretrained", 0, TASKS, (3,), 6)
    return made(tmp_path, "whole", [("kld", None, 10), ("tvdpp", None, 12)])


def column(table, name):
    return {row[0]: row[table.columns.index(name)] for row in table.rows}


def test_losses_are_compared_with_the_pretrained_drafter_and_with_kld(whole):
    table = paper.losses(whole)
    assert column(table, "seeds") == {"pretrained": "", "kld": "2.09 2.29", "tvdpp": "2.29 2.49"}
    assert column(table, "τ − pretrained") == {
        "pretrained": "", "kld": "+0.50 [+0.50, +0.50]", "tvdpp": "+0.70 [+0.70, +0.70]"
    }  # fmt: skip
    assert column(table, "τ − kld")["tvdpp"] == "+0.20 [+0.20, +0.20]"
    assert column(table, "τ − kld")["kld"] == ""
    assert column(table, "τ, γ = 3")["kld"].startswith("2.19 [")


def test_each_task_outside_of_the_domain_has_a_column(whole, tmp_path):
    table = paper.out_of_domain(whole, 3)
    assert table.columns == ["drafter", "in domain: τ − pretrained", "code: τ − pretrained"]
    assert [row[0] for row in table.rows] == ["kld", "tvdpp"]
    assert column(table, "code: τ − pretrained")["kld"] == "+0.50 [+0.50, +0.50]"


def test_variants_of_the_data_are_compared_with_the_full_set_and_those_not_run_are_blank(whole, tmp_path):
    table = paper.data(whole, made(tmp_path, "variants", [("tvdpp", "greedy", 11), ("tvdpp", "text_50", 9)]))
    gains = {row[0]: row[3] for row in table.rows}
    assert len(gains) == len(paper.DATA)
    assert gains[paper.DATA["greedy"]] == "-0.10 [-0.10, -0.10]"
    assert gains[paper.DATA["text_50"]] == "-0.30 [-0.30, -0.30]"
    assert gains[paper.DATA[""]] == gains[paper.DATA["drafter"]] == ""
    assert all(len(row) == len(table.columns) == 7 for row in table.rows)
    assert [row[1] != "" for row in table.rows] == [key in ("", "greedy", "text_50") for key in paper.DATA]


def test_transfer_is_measured_against_as_many_responses_of_all_kinds(whole, tmp_path):
    variants = made(tmp_path, "variants", [("tvdpp", "only_summary", 9), ("tvdpp", "responses_33", 11)])
    table = paper.transfer(whole, variants)
    assert table.columns == ["trained on", "τ on open ended", "τ on summary", "τ on code"]
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["nothing (pretrained)", "summary alone", "as many of all kinds", "all responses"]
    assert rows["summary alone"][3].endswith("(-0.20 [-0.20, -0.20])")
    assert "(" not in "".join(rows["all responses"])


def test_the_line_along_finetuning_goes_from_the_pretrained_drafter_to_the_end(whole, tmp_path):
    steps = [
        one._replace(drafter=one.drafter._replace(step=50 * one.drafter.seed, seed=1))
        for one in made(tmp_path, "steps", [("kld", None, 7)])
    ]
    found = paper.efficiency_by_step(steps, whole, 150)
    assert list(found) == ["kld"]
    assert list(found["kld"]) == list(TASKS)
    values = {step: value.value for step, value in found["kld"]["code"]}
    # 1 + (accepted + a mean of 0.75) / 10; the end is the first seed's alone.
    assert values == pytest.approx({0: 1.675, 50: 1.775, 100: 1.975, 150: 2.075})


def test_architectures_have_a_row_for_each_model_at_hand_and_the_papers_own():
    configs = {"target": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 24}}
    parameters = {"target": 158_000, "drafter": 7900}
    table = paper.models(configs, parameters, parameters)
    assert table.rows[0] == ["target", "2", "32", "", "4", "24", "158k", ""]
    assert [row[0] for row in table.rows[1:]] == [row[0] for row in paper.PAPER_MODELS]
    configs["drafter"] = {"num_hidden_layers": 1, "hidden_size": 8}
    assert paper.models(configs, parameters, parameters).rows[1][-2:] == ["7.9k", "5.00%"]
    assert table.note == "c is drafter / target parameters."
    mixture = paper.models(configs, parameters, parameters | {"target": 79_000})
    assert [row[-2:] for row in mixture.rows[:2]] == [["158k (79k active)", ""], ["7.9k", "10.00%"]]
    assert "of a mixture of experts those that a token meets" in mixture.note


def test_latex_escapes_what_it_has_to_and_aligns_numbers_right():
    table = Table(
        "t", "50% of it?", ["trained_on", "τ − kld"], [["a & b", "**+0.10 [−0.1, 0.3]**"], ["c", ""]], "A note."
    )
    text = table.latex()
    assert r"\begin{tabular}{lr}" in text
    assert r"\caption{50\% of it? A note.}" in text
    assert r"trained\_on & $\tau$ $-$ kld \\" in text
    assert r"a \& b & \textbf{+0.10 [$-$0.1, 0.3]} \\" in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(("value", "text"), [(6.74e9, "6.74B"), (115e6, "115M"), (157_600, "158k"), (12, "12")])
def test_parameters_are_written_short(value, text):
    assert number(value) == text


def test_latex_has_no_character_that_it_cannot_typeset():
    assert not set(escaped("τ γ α − · × … – & % # _ ~ ^")) & set("τγα−·×…–")
