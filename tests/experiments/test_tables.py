import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet
import pytest
from matplotlib.patches import Patch
from omegaconf import OmegaConf

from drafter.artifacts.manifest import ArtifactError, Stage, read_jsonl, write_jsonl
from drafter.metrics import TIMES, Estimate
from experiments import curves, tables
from experiments.reporting.by_rule import rule_table
from experiments.reporting.counts import write_counts
from experiments.reporting.cut_answers import describe_cut_answers
from experiments.reporting.figures import KNOWN, add_legend, colours, draw_curves, draw_efficiency
from experiments.reporting.identity import DrafterIdentity
from experiments.reporting.page import group_by_task, write_html
from experiments.reporting.results import (
    POOLED,
    check_evaluations,
    measured_rules,
    read_curves,
    read_evaluations,
    sorted_gammas,
    summarise,
)
from experiments.reporting.tabular import Table, with_interval
from experiments.tables import task_table

TASKS = {"open_ended": 6, "code": 4}  # prompts of each
GAMMAS = (3, 5)
ACCEPTED = {"pretrained": 6, "kld": 12, "tvd": 10}  # of 10 blocks: block efficiency is 1 + accepted / 10
NASTY = "Is 1 < 2 & <script>alert('x')</script>?"


def evaluation(root, name, loss, seed, tasks=TASKS, gammas=GAMMAS, accepted=None, fields=()):
    """A finished evaluation directory, as experiments.evaluate writes it."""
    accepted = ACCEPTED[loss] if accepted is None else accepted
    about = {task: {"in_domain": task != "code"} for task in tasks}
    stage = Stage(root / "evaluate" / name, "evaluate", {"seed": 0, "tasks": about}, {"drafter": name})
    counts, samples = [], []
    for gamma in gammas:
        for task, size in tasks.items():
            for i in range(size):
                kept = accepted + i % 3  # prompts differ, so that intervals have a width
                row = {"tokens": 10 + kept, "target_calls": 10, "accepted": kept, "tested": 30, "seconds": 1.0}
                baseline = {"baseline_tokens": 20, "baseline_seconds": 2.0}
                more = {"drafted": 30, "expected": 10.0 + kept, "drafting_seconds": 0.3, "verifying_seconds": 0.6}
                places = {"by_position": [[kept, 0, 0], [10, 10, 10]]}
                counts.append(
                    {"task": task, "gamma": gamma, "prompt": f"{task}:{i}", **row, **baseline, **more, **places}
                )
            blocks = [
                {"accepted": ["drafted ", "<b>bold</b>"], "rejected": ["refused"], "bonus": [" added"]},
                {"accepted": [], "rejected": [], "bonus": ["<|im_end|>"]},
            ]
            key = {"task": task, "gamma": gamma, "prompt": f"{task}:0"}
            samples.append({**key, "message": f"{NASTY} {task}", "blocks": blocks})
    write_jsonl(stage.directory / "counts.jsonl", counts)
    write_jsonl(stage.directory / "samples.jsonl", samples)
    drafter = DrafterIdentity(loss, loss=None if loss == "pretrained" else loss, seed=seed)._replace(**dict(fields))
    summary = {**drafter._asdict(), "drafter_parameters": 4, "target_parameters": 100}
    stage.finish(counts={**summary, "greedy_outputs": 8, "greedy_outputs_unlike_the_target": seed == 2})
    return stage.directory


def finetuning(root, loss, seed, rows=4):
    """A finished finetuning's manifest and its CSV log, in which training and validation rows alternate."""
    settings = DrafterIdentity(loss, loss, seed=seed)._asdict()
    stage = Stage(root / "finetune" / f"{loss}-seed{seed}", "finetune", settings, {})
    (stage.directory / "logs").mkdir()
    fields = ["epoch", "step", "train/loss", "val/acceptance_rate", "val/argmax_agreement", "val/kld", "val/tvd"]
    with (stage.directory / "logs" / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for i in range(rows):
            writer.writerow([0, 5 * i, 3.0, "", "", "", ""])
            writer.writerow([0, 5 * i, "", 0.4 + 0.01 * i + 0.01 * seed, 0.5, 2.0 - 0.1 * i, 0.6])
    stage.finish()


def pipeline_root(path):
    """Four evaluations and three finetunings under one root, made in no particular order."""
    evaluation(path, "tvd-seed1", "tvd", 1)
    evaluation(path, "kld-seed2", "kld", 2)
    evaluation(path, "drafter", "pretrained", 0)
    evaluation(path, "kld-seed1", "kld", 1)
    for loss, seed in (("kld", 1), ("kld", 2), ("tvd", 1)):
        finetuning(path, loss, seed)
    return path


@pytest.fixture
def root(tmp_path):
    return pipeline_root(tmp_path)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The text of one report that several tests read."""
    return (run_tables(pipeline_root(tmp_path_factory.mktemp("root"))) / "report.html").read_text()


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def run_tables(root):
    tables.main(OmegaConf.create(settings(root, root / "report")))
    return root / "report"


def settings(root, out, **more):
    models = {name: str(root / name) for name in ("target", "drafter")}
    return {
        "root": str(root),
        "out": str(out),
        "base": "pretrained",
        "acceptance_rule": "ratio",
        "dry_run": False,
        "publish": None,
        "models": models,
        "logger": {"wandb": False},
        **more,
    }


class Page(HTMLParser):
    """A parsed page: its tags, the addresses in its attributes, and the text of each span by class."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.spans, self.open = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attributes if name in {"src", "href", "xlink:href", "srcset", "data"}
        ]
        self.open = dict(attributes).get("class") if tag == "span" else None
        if self.open:
            self.spans.append((self.open, ""))

    def handle_data(self, data):
        if self.open:
            self.spans[-1] = (self.open, self.spans[-1][1] + data)

    def handle_endtag(self, tag):
        self.open = None


def test_evaluations_are_read_with_the_pretrained_drafter_first_then_by_loss_and_seed(root):
    found = read_evaluations(root / "evaluate")
    assert [(row.series, row.drafter.seed) for row in found] == [("pretrained", 0), ("kld", 1), ("kld", 2), ("tvd", 1)]
    assert found[0].size_ratio == 0.04
    assert len(found[0].counts) == len(GAMMAS) * sum(TASKS.values())
    assert found[0].counts["code", 3, "code:1"].tokens == 17


def test_the_size_ratio_of_a_mixture_is_of_the_parameters_that_a_token_meets(root):
    path = root / "evaluate" / "drafter" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert "mixture" not in tables.describe_prompts(read_evaluations(root / "evaluate"))
    manifest["counts"] |= {"drafter_active_parameters": 3, "target_active_parameters": 10}
    path.write_text(json.dumps(manifest))
    found = read_evaluations(root / "evaluate")
    assert [one.size_ratio for one in found] == [0.3, 0.04, 0.04, 0.04]
    speedups = {(row.series, row.task, row.gamma): row for row in summarise(found)}
    row = speedups["pretrained", "code", 3]
    assert row.speedup.value == pytest.approx(row.block_efficiency.value / (1 + 3 * 0.3))
    assert "c = 0.3000. Of a mixture of experts, c counts the parameters that a token meets." in (
        tables.describe_prompts(found)
    )


def test_an_unfinished_evaluation_is_left_out(root):
    (root / "evaluate" / "tvd-seed1" / "manifest.json").unlink()
    assert {row.series for row in read_evaluations(root / "evaluate")} == {"pretrained", "kld"}


@pytest.mark.parametrize("made", [False, True], ids=["no-folder", "empty-folder"])
def test_no_evaluation_names_the_command_that_makes_one(tmp_path, made):
    if made:
        (tmp_path / "evaluate").mkdir()
    with pytest.raises(ArtifactError, match=r"python -m experiments\.evaluate"):
        run_tables(tmp_path)
    assert not (tmp_path / "report").exists()


def test_the_summary_has_a_row_for_each_loss_task_and_gamma_over_all_its_seeds(root):
    rows = summarise(read_evaluations(root / "evaluate"))
    assert len(rows) == 3 * len(TASKS) * len(GAMMAS)
    assert list(dict.fromkeys(row.series for row in rows)) == ["pretrained", "kld", "tvd"]
    assert {(row.series, row.seeds) for row in rows} == {("pretrained", 1), ("kld", 2), ("tvd", 1)}
    assert {(row.task, row.prompts) for row in rows} == set(TASKS.items())


def test_the_summarys_values_are_the_ones_computed_by_hand(root):
    rows = summarise(read_evaluations(root / "evaluate"))
    (row,) = (row for row in rows if (row.series, row.task, row.gamma) == ("kld", "open_ended", 5))
    efficiency = 1 + (12 + 1) / 10  # six prompts with 0, 1, 2, 0, 1, 2 tokens more: one on average
    assert row.block_efficiency.value == pytest.approx(efficiency)
    assert row.acceptance_rate.value == pytest.approx(13 / 30)
    assert row.token_rate_ratio.value == pytest.approx((23 / 1.0) / (20 / 2.0))
    assert row.speedup.value == pytest.approx(efficiency / (0.04 * 5 + 1))
    assert row.speedup.low == pytest.approx(row.block_efficiency.low / (0.04 * 5 + 1))
    assert row.block_efficiency.low < efficiency < row.block_efficiency.high


def test_the_gain_is_paired_so_that_the_prompts_own_spread_cancels(root):
    rows = summarise(read_evaluations(root / "evaluate"))
    gains = {row.series: row.gain for row in rows if (row.task, row.gamma) == ("code", 3)}
    assert gains["pretrained"] is None
    for loss in ("kld", "tvd"):
        # Every prompt gains the same number of tokens a block: no width but float64 rounding.
        assert gains[loss] == pytest.approx([(ACCEPTED[loss] - 6) / 10] * 3, abs=1e-12)


def test_other_prompts_than_the_pretrained_drafters_leave_the_gain_blank(tmp_path):
    evaluation(tmp_path, "drafter", "pretrained", 0)
    evaluation(tmp_path, "kld-seed1", "kld", 1, tasks={"open_ended": 5, "code": 4})
    gains = {row.task: row.gain for row in summarise(read_evaluations(tmp_path / "evaluate")) if row.series == "kld"}
    assert gains["open_ended"] is None
    assert gains["code"] is not None


def test_without_a_pretrained_drafter_every_gain_is_blank(tmp_path):
    evaluation(tmp_path, "kld-seed1", "kld", 1)
    assert {row.gain for row in summarise(read_evaluations(tmp_path / "evaluate"))} == {None}


def test_the_markdown_table_has_a_line_for_each_task_and_loss_and_no_gain_for_the_pretrained(root):
    rows = [row for row in summarise(read_evaluations(root / "evaluate")) if row.gamma == 3]
    header, rule, *lines = [cells(line) for line in task_table(rows, "n", "t").markdown().splitlines()]
    assert header == ["task", "drafter", "τ", "expected τ", "τ − pretrained", "MBSU", "token rate", "acceptance rate"]
    assert rule == ["---"] * len(header)
    named = [task.replace("_", " ") for task in TASKS]
    assert [line[:2] for line in lines] == [[task, loss] for task in named for loss in ("pretrained", "kld", "tvd")]
    assert [line[4] for line in lines if line[1] == "pretrained"] == ["", ""]
    assert [line[4] for line in lines if line[1] == "kld"] == ["+0.60 [+0.60, +0.60]"] * 2
    assert all(len(line) == len(header) for line in lines)
    assert lines[0][2].startswith("1.70 [")
    assert [line[1] for line in lines if line[2].startswith("**")] == ["kld", "kld"]  # the best of each task


def without_times(folder):
    """Make an evaluation one of prompts that were decoded side by side."""
    rows = [row | dict.fromkeys(TIMES) for row in read_jsonl(folder / "counts.jsonl")]
    write_jsonl(folder / "counts.jsonl", rows)


def test_times_are_not_measured_where_one_seed_was_decoded_side_by_side(root):
    timed = summarise(read_evaluations(root / "evaluate"))
    without_times(root / "evaluate" / "kld-seed2")
    found = read_evaluations(root / "evaluate")
    rows = summarise(found)
    for before, row in zip(timed, rows, strict=True):
        assert row == before._replace(token_rate_ratio=None if row.series == "kld" else before.token_rate_ratio)
    lines = [cells(line) for line in task_table(rows, "n", "t").markdown().splitlines()]
    assert {line[6] for line in lines if line[1] == "kld"} == {"not measured"}
    assert "not measured" not in {line[6] for line in lines if line[1] != "kld"}
    note = tables.describe_time(found)
    assert note.startswith("Decoding's time: at γ = 3 30% drafting")
    assert note.endswith("not measured where prompts were decoded side by side: kld.")


def test_a_report_without_times_has_no_token_rates(tmp_path):
    without_times(evaluation(tmp_path, "drafter", "pretrained", 0))
    found = read_evaluations(tmp_path / "evaluate")
    text = task_table(summarise(found), "n", "t").markdown() + tables.describe_time(found)
    assert "| MBSU | acceptance rate |" in text
    assert "nan" not in text
    assert text.endswith(
        "|Times and token rates were not measured where prompts were decoded side by side: pretrained."
    )
    write_counts(tmp_path / "counts.parquet", found)
    rows = pyarrow.parquet.read_table(tmp_path / "counts.parquet").to_pylist()
    assert {row[name] for row in rows for name in TIMES} == {None}


def by_argmax_too(folder, tasks):
    """Make an evaluation one by two rules, of which `argmax` accepts two drafts less in these tasks."""
    rows = read_jsonl(folder / "counts.jsonl")
    greedy = [row | {"greedy": row["task"] not in tasks} for row in rows]
    more = [
        row | {"rule": "argmax", "tokens": row["tokens"] - 2, "accepted": row["accepted"] - 2, "greedy": False}
        for row in rows
        if row["task"] in tasks
    ]
    write_jsonl(folder / "counts.jsonl", greedy + more)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["acceptance_rules"] = ["ratio", "argmax"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_report_is_about_one_acceptance_rule_and_a_table_has_all(root):
    before = summarise(read_evaluations(root / "evaluate"))
    for name in ("drafter", "kld-seed1"):
        by_argmax_too(root / "evaluate" / name, ["open_ended"])
    assert summarise(read_evaluations(root / "evaluate")) == before
    found = read_evaluations(root / "evaluate", rule="argmax")
    assert {(one.series, one.drafter.seed, one.rule) for one in found} == {
        ("pretrained", 0, "argmax"),
        ("kld", 1, "argmax"),
    }
    rows = {(row.series, row.task): row for row in summarise(found) if row.gamma == 3}
    assert rows["kld", "open_ended"].block_efficiency.value == pytest.approx(1 + (12 + 1 - 2) / 10)
    assert rows["kld", "code"].block_efficiency.value == pytest.approx(1 + (12 + 0.75) / 10)  # at temperature 0
    assert rows["kld", "open_ended"].gain.value == pytest.approx(0.6)  # over the pretrained drafter, by the same rule
    rules = measured_rules(root / "evaluate")
    (table,) = rule_table({rule: read_evaluations(root / "evaluate", rule=rule) for rule in rules})
    assert table.columns == ["task", "drafter", "ratio", "argmax"]
    assert table.rows[1][:2] == ["open ended", "kld"]
    assert [cell.split()[0] for cell in table.rows[1][2:]] == ["2.30", "2.10"]
    assert table.rows[2][3] == ""  # tvd was not evaluated by argmax
    assert rule_table({"ratio": read_evaluations(root / "evaluate")}) == []


def test_a_rule_that_was_not_evaluated_is_refused(root):
    found = read_evaluations(root / "evaluate", rule="argmax")
    with pytest.raises(ArtifactError, match=r"'argmax', but the rules evaluated under .* are \['ratio'\]: give one"):
        check_evaluations(found, root / "evaluate", "pretrained", "argmax")


def test_gammas_are_in_the_order_of_numbers_and_adaptive_comes_last():
    assert sorted_gammas(["adaptive", 10, 3, 10]) == [3, 10, "adaptive"]


def test_an_interval_is_written_with_two_decimals_and_a_sign_on_demand():
    assert with_interval(Estimate(2.312, 2.2, 2.44)) == "2.31 [2.20, 2.44]"
    assert with_interval(Estimate(0.1, -0.05, 0.2), signed=True) == "+0.10 [-0.05, +0.20]"


def test_curves_are_the_validation_rows_by_loss_and_seed(root):
    curves = read_curves(root / "finetune")
    assert {loss: sorted(seeds) for loss, seeds in curves.items()} == {"kld": [1, 2], "tvd": [1]}
    assert [row["step"] for row in curves["kld"][2]] == [0, 5, 10, 15]
    assert curves["kld"][2][1]["val/acceptance_rate"] == pytest.approx(0.43)
    assert "train/loss" not in curves["kld"][1][0]


def test_the_curves_of_a_finetuning_that_is_still_running_are_drawn_too(root):
    folder = root / "finetune" / "kld-seed1"
    (folder / "manifest.json").rename(folder / "started.json")
    assert sorted(read_curves(root / "finetune")["kld"]) == [1, 2]
    cfg = {
        "folders": [str(root / "finetune"), str(root / "variants")],
        "only": ["kld"],
        "out": str(root / "new" / "curves"),
    }
    curves.main(OmegaConf.create(cfg))
    assert ">kld</text>" in (root / "new" / "curves.svg").read_text()
    assert ">tvd</text>" not in (root / "new" / "curves.svg").read_text()
    with pytest.raises(ValueError, match=r"has logged \['nla'\]: \['kld', 'tvd'\]"):
        curves.main(OmegaConf.create({**cfg, "only": ["nla"]}))


def test_the_command_writes_results_figures_and_report(root, capsys):
    report = run_tables(root)
    written = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.{kind}" for name in ("block_efficiency", "curves") for kind in ("png", "svg")}
    names = ("models", "losses", "ood", "gamma_3", "gamma_5", "positions")
    made = {f"tables/{name}.{kind}" for name in names for kind in ("md", "tex")}
    assert written == {"results.md", "report.html", "runs.json", "counts.parquet"} | figures | made
    results = (report / "results.md").read_text()
    titles = ["Architectures", "Which loss?", "Out of the domain, γ = 3", "γ = 3", "γ = 5"]
    assert re.findall(r"### (.*)", results)[:5] == titles
    assert "| drafter | draft 1 | draft 2 | draft 3 | draft 4 | draft 5 |" in results
    assert "10 prompts, 2 seeds per loss, c = 0.0400" in results
    assert "in 31 of 32 decodings" in results  # four evaluations of 8, one of which differs once
    assert str(report / "report.html") in capsys.readouterr().out


def test_everything_but_the_large_files_is_published(root):
    tables.main(OmegaConf.create(settings(root, root / "report", publish=str(root / "results" / "here"))))
    published = {str(path.relative_to(root / "results" / "here")) for path in (root / "results").rglob("*.*")}
    made = {str(path.relative_to(root / "report")) for path in (root / "report").rglob("*.*")}
    assert published == {name for name in made if not name.endswith((".svg", ".html", ".parquet"))}
    assert (root / "results" / "here" / "results.md").read_text() == (root / "report" / "results.md").read_text()


def test_the_values_of_the_tables_follow_from_the_file_of_counts(root):
    counts = pyarrow.parquet.read_table(run_tables(root) / "counts.parquet")
    assert counts.num_rows == 4 * len(GAMMAS) * sum(TASKS.values())  # four evaluations
    sums = counts.group_by(["series", "task", "gamma"]).aggregate([("tokens", "sum"), ("target_calls", "sum")])
    found = {
        (row["series"], row["task"], row["gamma"]): row["tokens_sum"] / row["target_calls_sum"]
        for row in sums.to_pylist()
    }
    rows = summarise(read_evaluations(root / "evaluate"))
    expected = {(row.series, row.task, str(row.gamma)): row.block_efficiency.value for row in rows}
    assert found == pytest.approx(expected)
    (first, *_) = (row for row in counts.to_pylist() if (row["series"], row["seed"], row["task"]) == ("kld", 2, "code"))
    identity = {"loss": "kld", "variant": None, "weighting": None, "step": None, "size_ratio": 0.04, "in_domain": False}
    assert identity.items() <= first.items()
    assert (first["gamma"], first["prompt"], first["accepted"], first["seconds"]) == ("3", "code:0", 12, 1.0)


def test_each_run_behind_the_numbers_is_traced(root):
    found = json.loads((run_tables(root) / "runs.json").read_text())
    assert set(found) == {str(path.parent) for path in root.rglob("manifest.json")}
    run = found[str(root / "evaluate" / "kld-seed1")]
    assert run["stage"] == "evaluate"
    assert {"argv", "commit", "versions", "cpus", "finished"} <= set(run["environment"])
    assert {"settings", "inputs", "fingerprint"} <= set(run)


def test_the_pretrained_drafter_alone_makes_a_report_as_well(tmp_path):
    evaluation(tmp_path, "drafter", "pretrained", 0)
    report = run_tables(tmp_path)
    assert "pretrained" in (report / "results.md").read_text()
    assert (report / "report.html").stat().st_size > 0


SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    """Return the texts of a figure."""
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def count_paths(svg, style):
    """Return how many paths of a figure have this in their style, such as "fill: #0072b2"."""
    return sum(
        style.lower() in path.get("style", "").lower() for path in ElementTree.fromstring(svg).iter(f"{SVG}path")
    )


def test_figures_are_written_as_png_and_svg_and_name_every_series(root):
    rows, curves = summarise(read_evaluations(root / "evaluate")), read_curves(root / "finetune")
    for name, svg in (("bars", draw_efficiency(rows, root / "bars")), ("lines", draw_curves(curves, root / "lines"))):
        png = (root / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 5000  # an empty panel of this size takes about 3 kB
        for text in (svg, (root / f"{name}.svg").read_text()):
            assert {"kld", "tvd"} <= set(texts(text))


def test_the_curves_have_a_line_per_series_in_each_panel_and_one_in_the_legend(root):
    svg = draw_curves(read_curves(root / "finetune"), root / "lines")
    panels = 3  # the logs have an acceptance rate, KLD and argmax agreement
    for loss in ("kld", "tvd"):
        assert count_paths(svg, f"stroke: {colours(['kld', 'tvd'])[loss]}; stroke-width: 1.8") == panels + 1


def test_the_figure_of_efficiency_has_a_panel_for_each_gamma_and_names_every_task(root):
    found = texts(draw_efficiency(summarise(read_evaluations(root / "evaluate")), root / "bars"))
    assert [text for text in found if text.startswith("γ")] == [f"γ = {gamma}" for gamma in GAMMAS]
    assert found.count("open ended") == found.count("code") == len(GAMMAS)


@pytest.mark.parametrize("gammas", [(3,), (5,)], ids=["last-panel", "first-panel"])
def test_a_cell_that_was_not_run_is_left_blank_in_the_figure(tmp_path, gammas):
    evaluation(tmp_path, "drafter", "pretrained", 0, gammas=(3, 5))
    evaluation(tmp_path, "kld-seed1", "kld", 1, gammas=gammas)
    svg = draw_efficiency(summarise(read_evaluations(tmp_path / "evaluate")), tmp_path / "bars")
    bars = {series: count_paths(svg, f"fill: {colour}") - 1 for series, colour in colours(["kld"]).items()}  # 1: legend
    assert (bars["pretrained"], bars["kld"]) == (2 * len(TASKS), len(TASKS))


def test_each_loss_has_one_colour_whatever_the_order_and_the_pretrained_is_grey():
    assert colours(["kld", "pretrained", "tvd"]) == colours(["tvd", "kld"])
    assert colours(["tvd", "mine"])["tvd"] == colours(["kld", "tvd"])["tvd"]
    for losses in (["kld", "tvd", "tvdpp"], ["kld", "mine", "another", "nla"]):
        assert len({colours(losses)[loss] for loss in [*losses, "pretrained"]}) == len(losses) + 1
    many = [*KNOWN, "ngram", "hit-draft_temperature_factor_0.1", "hit-draft_temperature_factor_1.0", "pretrained"]
    assert len({colours(many)[one] for one in many}) == len(many)
    assert colours([])["pretrained"] == "#999999"


def test_a_legend_of_many_series_stays_within_the_figure():
    figure = plt.figure(figsize=(11.5, 3.6))
    names = [*KNOWN, "ngram", "hit-draft_temperature_factor_0.1", "hit-draft_temperature_factor_1.0", "pretrained"]
    add_legend(figure, [Patch(label=name) for name in names])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    plt.close(figure)
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_figures_leave_no_open_figures(root):
    before = plt.get_fignums()
    draw_efficiency(summarise(read_evaluations(root / "evaluate")), root / "bars")
    draw_curves(read_curves(root / "finetune"), root / "lines")
    assert plt.get_fignums() == before


def test_the_report_leads_nowhere_outside_itself(html):
    page = Page(html)
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert page.tags.count("svg") == 1


def test_the_report_colours_tokens_by_who_wrote_them(html):
    page = Page(html)
    assert {name for name, _ in page.spans} == {"accepted", "rejected", "bonus"}
    for span in (("accepted", "drafted "), ("rejected", "refused"), ("bonus", " added"), ("bonus", "<|im_end|>")):
        assert span in page.spans


def test_the_report_escapes_the_texts(html):
    assert "<script>alert" not in html
    assert "<b>bold" not in html
    assert "Is 1 &lt; 2 &amp; &lt;script&gt;" in html
    assert ("accepted", "<b>bold</b>") in Page(html).spans


def test_the_report_has_a_table_for_each_gamma_with_the_best_drafter_of_each_task_in_bold(html):
    assert re.findall(r'<table id="gamma_(\d)">', html) == ["3", "5"]
    best = re.findall(r"<td>(?:[^<]*)</td><td>(\w+)</td><td><b>", html)
    assert best == ["kld"] * len(TASKS) * len(GAMMAS)


def test_a_report_without_curves_has_no_plots(tmp_path):
    table = Table("t", "Title", ["a", "b"], [["x", "**2.0**"], ["y", ""]])
    write_html(tmp_path / "page.html", [table], {}, {"block_efficiency": "<svg></svg>"}, {}, ["note"])
    text = (tmp_path / "page.html").read_text()
    assert "<td>x</td><td><b>2.0</b></td>" in text
    assert "Plotly" not in text
    assert len(text) < 20_000


def test_the_report_shows_one_text_a_task_at_the_smallest_gamma_decoded_by_every_drafter():
    def text(gamma, prompt, accepted):
        blocks = [{"accepted": ["x"] * accepted, "rejected": [], "bonus": ["y"]}] * 2
        return {"task": "code", "gamma": gamma, "prompt": prompt, "message": prompt, "blocks": blocks}

    (row,) = group_by_task({"one": [text(5, "p", 4), text(3, "p", 2), text(3, "q", 1)], "two": [text(3, "p", 3)]})
    assert (row["task"], row["gamma"], row["prompt"]) == ("code", 3, "p")
    efficiencies = {drafter: decoding["efficiency"] for drafter, decoding in row["decodings"].items()}
    assert efficiencies == {"one": 3.0, "two": 4.0}


def test_only_the_first_seed_of_a_loss_is_shown_in_the_report(html):
    assert "kld-seed1: τ = 2.50" not in html  # two blocks of 3 and 1 tokens
    assert "kld-seed1: τ = 2.00" in html
    assert "kld-seed2" not in html


def test_the_tables_run_without_torch(root):
    code = (
        "import sys; from omegaconf import OmegaConf; from experiments import tables\n"
        f"tables.main(OmegaConf.create({settings(root, root / 'out')!r}))\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'transformers', 'lightning', 'datasets'}, sorted(loaded)"
    )
    here = Path(tables.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (root / "out" / "results.md").exists()


def test_more_seeds_add_up_to_a_ratio_of_sums(tmp_path):
    evaluation(tmp_path, "drafter", "pretrained", 0)
    evaluation(tmp_path, "kld-seed1", "kld", 1, accepted=4)
    evaluation(tmp_path, "kld-seed2", "kld", 2, accepted=8)
    rows = summarise(read_evaluations(tmp_path / "evaluate"))
    (row,) = (row for row in rows if (row.series, row.task, row.gamma) == ("kld", "open_ended", 3))
    assert row.block_efficiency.value == pytest.approx(np.mean([1 + 5 / 10, 1 + 9 / 10]))
    assert row.prompts == TASKS["open_ended"]


def test_tasks_in_the_domain_are_pooled_as_sums_and_the_others_left_out(tmp_path):
    tasks = {"open_ended": 6, "summary": 2, "code": 4}
    evaluation(tmp_path, "drafter", "pretrained", 0, tasks)
    evaluation(tmp_path, "kld-seed1", "kld", 1, tasks)
    rows = summarise(read_evaluations(tmp_path / "evaluate"))
    pooled = {(row.series, row.gamma): row for row in rows if row.task == POOLED}
    assert set(pooled) == {(loss, gamma) for loss in ("pretrained", "kld") for gamma in GAMMAS}
    assert pooled["kld", 3].prompts == 8
    kept = [i % 3 for size in (6, 2) for i in range(size)]
    assert pooled["kld", 3].block_efficiency.value == pytest.approx(np.mean([1 + (12 + i) / 10 for i in kept]))
    assert pooled["kld", 3].gain.value == pytest.approx(0.6)


def test_one_task_in_the_domain_is_not_pooled(root):
    assert POOLED not in {row.task for row in summarise(read_evaluations(root / "evaluate"))}


def test_the_base_of_the_comparison_is_chosen_by_name(root):
    rows = summarise(read_evaluations(root / "evaluate", "kld"), "kld")
    assert rows[0].series == "kld"
    gains = {row.series: row.gain and row.gain.value for row in rows if (row.task, row.gamma) == ("code", 3)}
    assert gains == {"kld": None, "pretrained": pytest.approx(-0.6), "tvd": pytest.approx(-0.2)}
    assert "τ − kld" in task_table(rows, "n", "t", "kld").columns
    found = read_evaluations(root / "evaluate", "kl")
    with pytest.raises(
        ArtifactError, match=r"base is 'kl', but the series evaluated .* are \['kld', 'pretrained', 'tvd'\]"
    ):
        check_evaluations(found, root, "kl")


def test_the_commits_and_machines_named_are_those_of_the_evaluations(root):
    machines = {"cores": 64, "processor": "EPYC", "gpu": "NVIDIA A100"}, {"cores": 8, "processor": "M3", "gpu": None}
    for name, commit, machine in zip(("drafter", "kld-seed1"), ("abc", "def"), machines, strict=True):
        path = root / "evaluate" / name / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["environment"] |= {"commit": commit, "machine": machine}
        path.write_text(json.dumps(manifest))
    for name in ("kld-seed2", "tvd-seed1"):
        shutil.rmtree(root / "evaluate" / name)
    page = (run_tables(root) / "results.md").read_text()
    assert "Measured on 8 CPU cores (M3); NVIDIA A100, 64 CPU cores (EPYC), commit abc, def." in page


def test_files_of_an_earlier_run_are_removed_and_other_files_stay(root, tmp_path):
    for folder in (root / "report", tmp_path / "published"):
        for name in ("tables/old.md", "tables/old.tex", "figures/old.png", "figures/old.svg", "tables/mine.ods"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
    tables.main(OmegaConf.create(settings(root, root / "report", publish=str(tmp_path / "published"))))
    for folder in (root / "report", tmp_path / "published"):
        assert not list(folder.rglob("old.*"))
        assert (folder / "tables" / "mine.ods").exists()
        assert (folder / "tables" / "losses.md").exists()


def test_two_drafters_of_one_loss_and_seed_are_separate_series(root):
    evaluation(root, "b-kld-seed1", "kld", 1)
    assert [one.series for one in read_evaluations(root / "evaluate")] == [
        "pretrained",
        "kld",
        "kld (b-kld-seed1)",
        "kld (kld-seed1)",
        "tvd",
    ]


def test_tasks_whose_answers_often_reach_their_limit_are_named(tmp_path):
    folder = evaluation(tmp_path, "drafter", "pretrained", 0)
    assert describe_cut_answers(read_evaluations(tmp_path / "evaluate")) == []
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["tasks"]["open_ended"]["max_new_tokens"] = 17  # of 16, 17 and 18 tokens
    manifest["settings"]["tasks"]["code"]["max_new_tokens"] = 64
    path.write_text(json.dumps(manifest))
    (note,) = describe_cut_answers(read_evaluations(tmp_path / "evaluate"))
    assert note.startswith("Answers that reached max_new_tokens: 67% of open ended (17). ")


def test_nothing_drafted_has_no_acceptance_rate(tmp_path):
    """A drafter without a model may find nothing on a task."""
    folder = evaluation(tmp_path, "ngram", "ngram", None, accepted=0, fields={"loss": None})
    rows = read_jsonl(folder / "counts.jsonl")
    for row in rows:
        row |= {"tokens": 10, "accepted": 0, "tested": 0, "drafted": 0, "by_position": [[], []]}
    write_jsonl(folder / "counts.jsonl", rows)
    evaluation(tmp_path, "drafter", "pretrained", 0)
    found = read_evaluations(tmp_path / "evaluate")
    lines = [cells(line) for line in task_table(summarise(found), "n", "t").markdown().splitlines()]
    assert [(line[2], line[-1]) for line in lines if line[1] == "ngram"] == [("1.00 [1.00, 1.00]", "")] * 4
