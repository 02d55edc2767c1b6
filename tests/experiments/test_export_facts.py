"""What an export says of its drafter: in its card, in its manifest, and in an export of the export."""

import json
import shutil
import sys

import pytest
import torch
import yaml

from drafter.artifacts.manifest import MANIFEST, Stage, read_manifest, write_json, write_jsonl
from drafter.metrics import Estimate
from drafter.models.compatibility import load_drafter
from drafter.models.fingerprints import model_fingerprint
from experiments.exporting.facts import gather
from experiments.exporting.gammas import COMPILED, GammaReport
from experiments.exporting.recipe import absolute_paths, describe_data, describe_target, describe_training, portable
from experiments.reporting.gamma_page import GammaRow
from tests.experiments.test_export import exported  # noqa: F401 (a fixture)
from tests.experiments.test_pipeline import stage


def gamma_rows(*measured):
    """Return rows of two tasks, of which gamma = 3 is predicted to be best, and those with an estimate as given."""
    predicted = {1: 1.1, 2: 1.2, 3: 1.3}
    rates = [None if one is None else [one, one - 0.1, one + 0.1] for one in (*measured, *[None] * (3 - len(measured)))]
    return [
        GammaRow(task, gamma, 1.5, 1.2, value + shift, rates[gamma - 1])._asdict()
        for task, shift in (("inside", 0.0), ("inside too", 0.01), ("outside", 0.0))
        for gamma, value in predicted.items()
    ]


def write_gamma(root, drafter, name, compiled, rows, **more):
    """Write a report of `experiments.gamma`, with more settings if they are given."""
    tasks = {task: {"in_domain": task != "outside"} for task in ("inside", "inside too", "outside")}
    settings = {"compile": compiled, "tasks": tasks, **more}
    made = Stage(root / name / drafter.name, "gamma", settings, {"drafter": model_fingerprint(drafter)})
    write_jsonl(made.directory / "gamma.jsonl", rows)
    made.finish()


@pytest.fixture
def moved(exported, tmp_path):  # noqa: F811
    """Return the directory of a finetuned drafter whose root is tmp_path, and the overrides that export it."""
    command, drafter, _ = exported
    copied = tmp_path / "finetune" / drafter.name
    shutil.copytree(drafter, copied)
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["config"]["root"] = str(tmp_path)
    write_json(copied / MANIFEST, manifest)
    return copied, [f"export.drafter={copied}", *command[1:], f"out={tmp_path}/out"]


def test_the_card_tells_how_the_drafter_was_made_and_how_long_it_took(exported):  # noqa: F811
    _, drafter, out = exported
    card, manifest = (out / "README.md").read_text(), read_manifest(drafter, "finetune")
    cache = read_manifest(manifest["config"]["inputs"]["cache"], "cache")
    assert f"of {cache['counts']['tokens']:,} tokens in all, written by: target" in card
    for part in (
        "| pretraining | 10 steps,",
        "| instructions | …/asked.jsonl |",
        "| pretraining text | …/text.jsonl |",
    ):
        assert part in card, part
    (times,) = (line for line in card.splitlines() if line.startswith("| time |"))
    order = ["data ", "pretraining ", "responses ", "cache ", "finetuning ", " together, on "]
    assert [times.index(name) for name in order] == sorted(times.index(name) for name in order)
    training = card[card.index("## How it was made") : card.index("## Compatibility")]
    assert str(drafter.parent.parent) not in training
    assert "root=…/run" in training


def test_the_time_leaves_out_a_start_without_a_record(exported):  # noqa: F811
    _, drafter, _ = exported
    manifest = read_manifest(drafter, "finetune")
    assert "without the time" not in describe_training(manifest)["time"]
    manifest["config"]["inputs"]["drafter"] = "runs/elsewhere"
    assert describe_training(manifest)["time"].endswith("; without the time that its start took, runs/elsewhere")


def test_paths_of_this_machine_are_shortened_in_recorded_texts():
    command = "python -m experiments.respond root=/home/me/runs/mine 'a.path=\"/data/x.jsonl\"' inputs.cache=s3://b/c"
    assert portable(command) == "python -m experiments.respond root=…/mine 'a.path=\"…/x.jsonl\"' inputs.cache=s3://b/c"
    for text in ("runs/tiny/finetune", "org/name (main)", "1/2 of https://a.b/c/d", "`a/b`"):
        assert portable(text) == text


def test_the_command_names_the_paths_of_this_machine_that_an_export_has(tmp_path):
    (tmp_path / "README.md").write_text("vllm serve `/home/me/target` runs/tiny")
    write_json(tmp_path / MANIFEST, {"command": "python -m experiments.export out=/tmp/out"})
    assert absolute_paths(tmp_path / "README.md", tmp_path / MANIFEST) == ["/home/me/target", "/tmp/out"]


def test_the_card_says_where_the_target_is_from(tmp_path):
    write_json(tmp_path / "origin.json", {"origin": "package", "from": "a.gguf of the package b, dequantised"})
    target = {"path": str(tmp_path), "revision": None, "dtype": "float32"}
    assert describe_target(target)["target"].endswith(": a.gguf of the package b, dequantised, in float32")
    assert describe_target({"path": "org/name", "revision": "abc"}) == {"target": "org/name, revision abc, in float32"}


def test_the_card_names_the_data_by_their_kind():
    assert describe_data({"kind": "docstrings", "packages": ["numpy", "torch"]}) == {
        "data": "docstrings and code of the installed Python packages numpy, torch"
    }
    text, asked = {"path": "org/text", "revision": "abc"}, {"mine": {"path": "mine.jsonl", "revision": None}}
    found = describe_data({"kind": "files", "pretraining": text, "instructions": asked})
    assert found == {"instructions": "mine.jsonl", "pretraining text": "org/text (abc)"}
    itself = {"kind": "self", "weight": 3.0}
    text = {"docs": {"kind": "docstrings", "packages": ["numpy"], "weight": 1.0}, "own": itself}
    found = describe_data({"kind": "files", "pretraining": text, "instructions": {"a": itself, "b": itself}})
    assert found == {
        "instructions": "instructions that the target wrote itself",
        "pretraining text": "docstrings of the open-source Python packages numpy (25%); "
        "text that the target wrote itself (75%)",
    }


def test_the_best_gamma_is_the_measured_one_if_several_were_decoded():
    def report(*measured):
        rows = [{**row, "measured": row["measured"] and Estimate(*row["measured"])} for row in gamma_rows(*measured)]
        return GammaReport("an engine", [GammaRow(**row) for row in rows])

    assert report().gamma == 3
    alone = report(None, 1.4)  # which cannot be compared with another one
    assert (alone.gamma, alone.speedup, alone.is_measured) == (3, pytest.approx(1.3, abs=0.01), False)
    decoded = report(None, None, 1.05)
    assert (decoded.gamma, decoded.speedup, decoded.is_measured) == (3, pytest.approx(1.05), True)
    assert all(row.measured and row.measured.value == 1.05 for row in decoded.best())
    assert report(1.4, 1.2, 1.1).gamma == 1
    assert [(row.task, row.gamma) for row in report(1.0, 1.6, 1.1).best()] == [
        ("inside", 2), ("inside too", 2), ("outside", 2),
    ]  # fmt: skip


def test_an_export_gets_the_gamma_that_was_measured_as_the_fastest(moved, tmp_path):
    drafter, command = moved
    write_gamma(tmp_path, drafter, "gamma", False, gamma_rows(1.0, 1.5, 1.2))
    write_gamma(tmp_path, drafter, "gamma-compiled", True, gamma_rows(1.7, 1.5, 1.2))
    stage("export", command)
    out, card = tmp_path / "out", (tmp_path / "out" / "README.md").read_text()
    assert json.loads((out / "generation_config.json").read_text())["num_assistant_tokens"] == 2
    assert "**Draft γ = 2 tokens per block**: of the γ that were compared, it makes decoding fastest in" in card
    assert "| this project's loop | inside | 2 | 1.50 | 1.20 | 1.50 [1.40, 1.60] |" in card
    assert f"| {COMPILED} | inside too | 1 | 1.50 | 1.20 | 1.70 [1.60, 1.80] |" in card
    assert "| outside |" not in card
    assert "1.50 times\nthe token rate of the target alone, as a mean over the tasks (measured; see " in card
    assert '"num_speculative_tokens": 2' in card


def test_a_gamma_report_has_the_prompts_that_were_decoded_and_the_dtypes(moved, tmp_path):
    drafter, _ = moved
    rows = gamma_rows(None, 0.8, 0.7)
    write_gamma(tmp_path, drafter, "gamma", False, rows, target_dtype="float32")
    decoded = [row for row in rows if row["measured"]]
    counts = [{"task": row["task"], "gamma": row["gamma"], "prompt": str(n)} for row in decoded for n in (1, 1, 2)]
    write_jsonl(tmp_path / "gamma" / drafter.name / "counts.jsonl", counts)
    (report,) = gather(str(drafter)).reports
    assert [row.prompts for row in report.rows if row.task == "inside"] == [None, 2, 2]
    assert report.precision == "float32, float32"


def test_the_card_says_that_a_drafter_does_not_pay(moved, tmp_path):
    drafter, command = moved
    write_gamma(tmp_path, drafter, "gamma", False, gamma_rows(0.9, 0.8, 0.7))
    stage("export", command)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Draft γ = 1 token per block**" in card
    assert "Decoding with this drafter is thus slower there than without it." in card


def test_each_format_gets_the_gamma_of_its_engine(moved, tmp_path):
    drafter, _ = moved
    ratio, tau = {"value": 1.2, "low": 1.1, "high": 1.3}, {"value": 1.9, "low": 1.8, "high": 2.0}
    rows = [
        {
            "task": task,
            "gamma": gamma,
            "prompts": 8,
            "tau": tau,
            "block_cost": 1.4,
            "ratio": {**ratio, "value": 1.0 + gamma / 10},
        }
        for task in ("a", "b", "all")
        for gamma in (3, 5)
    ]
    write_json(tmp_path / "engines.json", {"arguments": {"engine": "llama-server"}, "summaries": rows})
    facts = gather(str(drafter), [str(tmp_path / "engines.json")])
    assert facts.gamma("gguf") == 5
    assert facts.gamma("hf") == facts.gamma("openvino") == 3  # nothing was measured there
    assert {row.task for row in facts.reports[0].rows} == {"a", "b"}
    assert {row.prompts for row in facts.reports[0].rows} == {8}
    named = gather(
        str(drafter), [f"float32, 8 bits={tmp_path}/engines.json", f"8 bits, 8 bits={tmp_path}/engines.json"]
    )
    assert [one.precision for one in named.reports] == ["float32, 8 bits", "8 bits, 8 bits"]
    with pytest.raises(ValueError, match=r"export\.engines has .*nowhere\.json, must be a file that"):
        gather(str(drafter), [str(tmp_path / "nowhere.json")])


def test_an_export_of_an_export_keeps_its_facts(exported, tmp_path):  # noqa: F811
    command, _, _ = exported
    shipped, given = tmp_path / "shipped", ["export.license=apache-2.0", "export.base_model=org/chat"]
    notes = ["export.notes='It took a night.'", "export.dtype=bfloat16"]
    stage("export", [*command, f"out={shipped}", *given, *notes])
    (tmp_path / "llama.cpp" / "conversion").mkdir(parents=True)
    (tmp_path / "llama.cpp" / "conversion" / "base.py").write_text("class TextModel:\n    get_vocab_base_pre = None\n")
    converter = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    converter.write_text("import pathlib, sys\npathlib.Path(sys.argv[3]).write_text(sys.argv[1])\n")
    how = ["export.format=gguf", f"gguf.converter={converter}", f"gguf.python={sys.executable}"]
    stage("export", [command[1], f"export.drafter={shipped}", f"out={tmp_path}/gguf", *how])
    assert (tmp_path / "gguf" / "shipped.gguf").read_text().endswith("/shipped")  # llama.cpp names the model by it
    first, second = ((tmp_path / name / "README.md").read_text() for name in ("shipped", "gguf"))
    for title in ("## Results", "## How it was made"):
        assert first.split(title)[1].split("\n## ")[0] == second.split(title)[1].split("\n## ")[0]
    assert "It took a night." in second
    assert "They were exported from weights in bfloat16." in second
    header = yaml.safe_load(second.split("---\n")[1])
    assert (header["license"], header["base_model"]) == ("apache-2.0", "org/chat")
    assert "# A draft model for org/chat\n" in second
    records = [read_manifest(tmp_path / name, "export") for name in ("shipped", "gguf")]
    assert records[0]["facts"] == records[1]["facts"]
    assert records[0]["counts"] == records[1]["counts"]


def test_a_drafter_in_bfloat16_computes_in_float32(exported, world, tmp_path):  # noqa: F811
    command, _, _ = exported
    stage("export", [*command, f"out={tmp_path}/out", "export.dtype=bfloat16"])
    target = next(one.split("=", 1)[1] for one in world[0] if one.startswith("target.path"))
    loaded = load_drafter(str(tmp_path / "out"), target)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
