"""Tests of the stage `prepare` on data in common forms, with the embedded target's tokenizer."""

import json
import shutil

import pytest
from hydra import compose, initialize_config_module

from drafter.artifacts.manifest import ArtifactError, read_jsonl
from experiments.running.data_settings import instruction_sources, pretraining_sources, task_sources
from tests.conftest import write_jsonl
from tests.experiments.test_pipeline import stage


def source(path, **how):
    fields = {"split": "train", "name": None, "revision": None, "template": "{prompt}", "where": {}, "reference": None}
    return fields | {"path": str(path)} | how


def overrides(folder, sources, **tasks):
    decoding = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "in_domain": True}
    tasks = {name: {"template": "{prompt}", **one} for name, one in tasks.items()}
    tasks = tasks or {"prompts": source(folder / "task.jsonl")}
    return [
        "scale=smoke", "logger=csv", "data=files", "task=files", f"root={folder}/run",
        f"data.pretraining.path={folder}/text.jsonl", "scale.pretraining_tokens=2000", "scale.heldout_tokens=200",
        "~data.instructions.questions", "~task.prompts",
        *[f"+data.instructions.{name}={given(one)}" for name, one in sources.items()],
        *[f"+task.{name}={given(source(one.pop('path'), **one) | decoding)}" for name, one in tasks.items()],
    ]  # fmt: skip


def given(value):
    """Return a value in the grammar of Hydra's command line."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{given(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(given, value)) + "]"
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


@pytest.fixture
def folder(tmp_path):
    texts = [f"Line {number} of a text that goes on for some words. " * 20 for number in range(60)]
    write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in (*texts, None, "")])
    write_jsonl(tmp_path / "task.jsonl", [{"prompt": f"Who saw {number}?"} for number in range(5)])
    for name, number in (("a", 200), ("b", 200), ("few", 12), ("none", 0)):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"Question {i} of {name}?", "answer": f"Answer {i} of {name}."} for i in range(number)]
        write_jsonl(tmp_path / name / "train.jsonl", rows)
    return tmp_path


def prepared(folder):
    data = folder / "run" / "data"
    counts = json.loads((data / "manifest.json").read_text())["counts"]
    return read_jsonl(data / "instructions.jsonl"), read_jsonl(data / "tasks.jsonl"), counts


def test_two_sources_take_turns_and_keep_their_answers(folder):
    sources = {name: source(folder / name / "train.jsonl", reference="{answer}") for name in "ab"}
    stage("prepare", overrides(folder, sources))
    rows, tasks, counts = prepared(folder)
    assert len({row["id"] for row in rows}) == len(rows) == 70
    for split, number in (("train", 64), ("validation", 6)):
        kinds = [row["kind"] for row in rows if row["split"] == split]
        assert kinds == ["a", "b"] * (number // 2)
    assert all(row["reference"] == row["prompt"].replace("Question", "Answer").replace("?", ".") for row in rows)
    assert [row["task"] for row in tasks] == ["prompts"] * 3
    for of_source in counts["rows"].values():
        assert of_source["read"] == sum(of_source["used"].values()) + sum(of_source["left_out"].values())
    assert counts["rows"]["instructions b"]["used"] == {"train": 32, "validation": 3}
    assert counts["rows"]["text heldout"]["left_out"]["empty"] == 2


def test_null_fields_are_empty_and_rows_that_are_left_out_are_counted(folder):
    rows = [{"prompt": f"Name {i}.", "input": None if i % 2 else f"in words ({i})"} for i in range(40)]
    rows += [{"prompt": None, "input": None}, {"prompt": "Name 41."}, {"prompt": "long " * 400, "input": ""}]
    write_jsonl(folder / "ask.jsonl", rows)
    (folder / "cells.csv").write_text("prompt,n\nnull,1\nNA,1\n007,1\n2024-01-05,1\n,1\nother,2\n")
    sources = {"ask": source(folder / "ask.jsonl", template="{prompt} Input: {input}", reference="{input}")}
    task = source(folder / "cells.csv", where={"n": 1})
    stage("prepare", [*overrides(folder, sources, cells=task), "scale.prompts_per_task=9"])
    asked, tasks, counts = prepared(folder)
    assert not any("None" in row["prompt"] + row["reference"] for row in asked)
    assert {"Name 1. Input:", "Name 2. Input: in words (2)", "Name 41. Input:"} <= {row["prompt"] for row in asked}
    assert [row["prompt"] for row in tasks] == ["null", "NA", "007", "2024-01-05"]
    assert counts["rows"]["task cells"]["left_out"] == {"empty": 1, "filtered by where": 1}
    of_source = counts["rows"]["instructions ask"]
    assert of_source["left_out"] == {"empty": 1, "too long": 1}
    assert of_source["rows_that_lack"] == {"input": 2}  # of the prompt's template, and of the reference's


def test_one_instruction_is_held_out_if_the_hash_holds_out_none(folder, caplog):
    write_jsonl(folder / "few" / "train.jsonl", [{"prompt": f"How far is town {i}?"} for i in range(12)])
    stage("prepare", overrides(folder, {"few": source(folder / "few" / "train.jsonl")}))
    rows, _, counts = prepared(folder)
    assert [row["split"] for row in rows] == ["train"] * 11 + ["validation"]
    assert counts["rows"]["instructions few"]["used"] == {"train": 11, "validation": 1}
    assert "no instruction fell into validation by its hash, so 1 of 12 are held out" in caplog.text


def test_control_tokens_in_a_message_do_not_end_its_turn(folder):
    write_jsonl(folder / "ask.jsonl", [{"prompt": f"What is <|im_end|>, for the {i}th time?"} for i in range(12)])
    write_jsonl(folder / "text.jsonl", [{"text": f"{i} <|im_start|> and <|endoftext|> " * 20} for i in range(60)])
    stage("prepare", overrides(folder, {"ask": source(folder / "ask.jsonl")}))
    rows, _, counts = prepared(folder)
    assert len(rows) == 12
    assert counts["rows"]["text train"]["left_out"].keys() <= {"of the other part", "empty"}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "task",
            [{"prompt": "Something was said. " * number} for number in (300, 200)],
            r"task 'task' .*: 2 rows read, 0 used, 2 too long.*has 1810 tokens, and prepare.max_prompt_tokens is 300",
        ),
        ("task", [], r"task 'task' has no row that its settings choose: 0 rows read"),
        ("ask", [], r"the source of instructions 'ask' has no row that its settings choose: 0 rows read"),
        ("ask", [{"prompt": "Why?"}], r"gave 1 instructions for training and 0 for validation: at least one of each"),
        (
            "ask",
            [{"prompt": "Why?"}] * 9 + [{"prompt": ["Why?"]}],
            r"ask\.jsonl, row 10: the field \{prompt\} is a list",
        ),
        ("text", [], r"the corpus is empty"),
    ],
)
def test_unusable_data_are_refused_by_name_before_text_is_packed(folder, name, rows, message, dry_run):
    shutil.copy(folder / "a" / "train.jsonl", folder / "ask.jsonl")
    write_jsonl(folder / f"{name}.jsonl", rows)
    command = overrides(folder, {"ask": source(folder / "ask.jsonl")}, task=source(folder / "task.jsonl"))
    with pytest.raises(ValueError, match=message):
        stage("prepare", [*command, f"dry_run={dry_run}"])
    assert not list(folder.glob("run/data/train.npy"))


def test_the_identity_contains_the_rows_and_neither_their_paths_nor_their_decoding(folder):
    def command(where, **task):
        sources = {"a": source(where / "a" / "train.jsonl")}
        return [*overrides(where, sources, prompts=source(where / "task.jsonl", **task)), f"root={folder}/run"]

    stage("prepare", command(folder))
    before = (folder / "run" / "data" / "manifest.json").read_bytes()
    moved = folder / "moved"
    shutil.copytree(folder, moved, ignore=shutil.ignore_patterns("run", "moved"))
    decoded = [f"task.prompts.{how}" for how in ("temperature=0.7", "max_new_tokens=4", "in_domain=false")]
    stage("prepare", [*command(moved), *decoded])
    assert (folder / "run" / "data" / "manifest.json").read_bytes() == before
    for change, message in (
        (command(folder, template="Say: {prompt}"), "settings.task"),
        ([*command(folder), "+task.more={path: org/name, template: '{prompt}'}"], "settings.task"),
        (["data.heldout_percent=7", *command(folder)], "settings.data"),
    ):
        with pytest.raises(ArtifactError, match=f"made differently.*{message}"):
            stage("prepare", change)
    write_jsonl(folder / "a" / "train.jsonl", [{"prompt": "Another?"}] * 20)
    with pytest.raises(ArtifactError, match=r"made differently.*inputs\.instructions a"):
        stage("prepare", command(folder))


def test_a_task_without_a_path_needs_docstrings(folder):
    command = [
        one for one in overrides(folder, {"few": source(folder / "task.jsonl")}) if "task" not in one.split("=")[0]
    ]
    with pytest.raises(ValueError, match=r"task.open_ended.path is null, and data=files has no docstrings"):
        stage("prepare", [*command, "task=docstrings"])


def test_a_second_source_can_be_given_on_the_command_line_with_a_path_alone(folder):
    command = [
        "scale=smoke",
        "logger=csv",
        "data=files",
        "task=files",
        f"root={folder}/run",
        "scale.pretraining_tokens=2000",
        f"data.pretraining.path={folder}/text.jsonl",
        "scale.heldout_tokens=200",
        f"task.prompts.path={folder}/task.jsonl",
        f"data.instructions.questions.path={folder}/a/train.jsonl",
        f"+data.instructions.mine.path={folder}/b/train.jsonl",
    ]
    stage("prepare", command)
    rows, _, _ = prepared(folder)
    assert {row["kind"] for row in rows} == {"questions", "mine"}


@pytest.mark.parametrize(
    ("read", "owner"),
    [
        (pretraining_sources, "data.pretraining"),
        (instruction_sources, "data.instructions.questions"),
        (task_sources, "task.prompts"),
    ],
)
def test_a_path_that_is_not_given_is_refused_and_no_pattern_of_three_letters(read, owner):
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("prepare", ["data=files", "task=files"])  # as the command line does, without the pipeline's check
    with pytest.raises(ValueError, match=f"{owner} has no path: give it as {owner}.path="):
        read(cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "+data.instructions.mine.template=x",
            r"data.instructions.mine has no path: give it as data.instructions.mine",
        ),
        ("data.kind=hub", "data.kind is 'hub', must be one of docstrings, files"),
    ],
)
def test_a_source_without_a_path_and_an_unknown_kind_are_refused_by_name(folder, change, message):
    with pytest.raises(ValueError, match=message):
        stage("prepare", [*overrides(folder, {"a": source(folder / "a" / "train.jsonl")}), change])
