"""Tests of the stage `prepare` with instructions and text that the target writes itself."""

import json
import re
import shutil
import sys
import types
from typing import ClassVar

import numpy as np
import pytest

from drafter.artifacts.manifest import ArtifactError, read_jsonl
from experiments.pipeline import main
from tests.chat_target import VOCABULARY, chat_tokenizer, save_chat_target
from tests.conftest import save_target, write_jsonl
from tests.experiments.test_pipeline import snapshot, stage

CHANGES = re.compile(r" (?=\+)")  # between two overrides


def overrides(folder, target):
    return [
        "scale=smoke", "data=self", "logger=csv", f"root={folder}/run", f"target.path={target}",
        "scale.instructions=24", "scale.pretraining_tokens=300", "scale.heldout_tokens=40",
        "scale.max_prompt_tokens=40",
        "scale.max_new_tokens=8", "scale.sequence_length=16", "scale.prompts_per_task=2", "data.heldout_percent=40",
        "drafter.max_position_embeddings=64", "data.pretraining.max_new_tokens=30",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare what the target writes. Return the folder and the overrides."""
    folder = tmp_path_factory.mktemp("self")
    save_chat_target(folder / "target")
    command = overrides(folder, folder / "target")
    stage("prepare", command)
    return folder, command


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_the_target_writes_instructions_and_text_and_each_message_is_accounted_for(prepared):
    root = prepared[0] / "run"
    written = read_jsonl(root / "instructions" / "self" / "instructions.jsonl")
    counts = manifest(root / "instructions" / "self")["counts"]
    assert len(written) == counts["written"] == 44  # 1.1 * 24 / (1 - 0.4)
    assert counts["generated"] == counts["written"] + sum(counts["left_out"].values())
    assert counts["begins_with"] == "<|user|>"
    assert len({row["prompt"] for row in written}) == len(written)
    assert all(set(row["prompt"].split()) <= set(VOCABULARY[2:-3]) for row in written)
    texts = read_jsonl(root / "text" / "pretraining" / "text.jsonl")
    assert all(len(row["text"].split("\n\n")) == 2 for row in texts)
    assert manifest(root / "text" / "pretraining")["counts"]["tokens"] >= 330


def test_prompts_of_tasks_are_in_no_other_split(prepared):
    data = prepared[0] / "run" / "data"
    asked, tasks = read_jsonl(data / "instructions.jsonl"), read_jsonl(data / "tasks.jsonl")
    splits = {split: {row["prompt"] for row in asked if row["split"] == split} for split in ("train", "validation")}
    prompts = {row["prompt"] for row in tasks}
    assert [len(splits["validation"]), len(prompts)] == [2, 2]
    assert 20 <= len(splits["train"]) <= 24  # a hash divides 44 messages; 26 are expected to be for training
    assert not prompts & (splits["train"] | splits["validation"])
    assert [row["task"] for row in tasks] == ["prompts"] * 2 + ["sampled"] * 2
    rows = manifest(data)["counts"]["rows"]
    for tally in rows.values():
        assert tally["read"] == sum(tally["used"].values()) + sum(tally["left_out"].values())
    assert rows["instructions self"]["left_out"]["held out for tasks"]


def test_text_that_begins_with_a_held_out_prompt_is_left_out(prepared, tmp_path):
    folder, command = prepared
    texts = [row["text"].split("\n\n")[0] for row in read_jsonl(folder / "run" / "text" / "pretraining" / "text.jsonl")]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": texts[0] + " !"}])
    change = ["task=files", f"task.prompts.path={tmp_path}/prompts.jsonl", "prepare.prompts_per_task=1"]
    stage("prepare", [*command, *change, f"out={tmp_path}/data"])
    rows = manifest(tmp_path / "data")["counts"]["rows"]
    reason = "with a held-out prompt, or a similar one"
    assert sum(rows[f"text {part}"]["left_out"].get(reason, 0) for part in ("train", "heldout")) >= 1
    tokenizer = chat_tokenizer()
    packed = " ".join(tokenizer.decode(np.load(tmp_path / "data" / f"{part}.npy")) for part in ("train", "heldout"))
    assert texts[0] not in packed


def test_a_second_run_writes_nothing_and_the_weight_does_not_matter_to_what_is_written(prepared):
    folder, command = prepared
    before = snapshot(folder / "run")
    stage("prepare", command)
    assert snapshot(folder / "run") == before
    with pytest.raises(ArtifactError, match=r"run/data was made differently.*settings\.data"):
        stage("prepare", [*command, "data.instructions.self.weight=2"])


def test_a_template_makes_the_instructions_of_the_messages_that_are_written_already(prepared, tmp_path):
    folder, command = prepared
    shutil.copytree(folder / "run" / "instructions", tmp_path / "run" / "instructions")
    before = snapshot(tmp_path / "run" / "instructions")
    change = [f"root={tmp_path}/run", "+data.instructions.self.template='who saw : {prompt}'"]
    stage("prepare", [*command, *change])
    assert snapshot(tmp_path / "run" / "instructions") == before
    messages = {row["prompt"] for row in read_jsonl(tmp_path / "run" / "instructions" / "self" / "instructions.jsonl")}
    data = tmp_path / "run" / "data"
    prompts = [row["prompt"] for name in ("instructions", "tasks") for row in read_jsonl(data / f"{name}.jsonl")]
    assert prompts
    assert all(prompt.removeprefix("who saw : ") in messages - {prompt} for prompt in prompts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.instructions.self.temperature=0.7", r"instructions/self was made differently.*settings\.temperature"),
        ("data.instructions.self.examples=[who ran ?]", r"instructions/self was made differently.*settings\.examples"),
        ("data.instructions.self.number=50", r"instructions/self was made differently.*settings\.number"),
        ("+data.instructions.self.requests=[why ?]", r"instructions/self was made differently.*settings\.requests"),
        ("data.pretraining.top_p=0.5", r"text/pretraining was made differently.*settings\.top_p"),
        ("seed=5", r"instructions/self was made differently.*settings\.seed"),
    ],
)
def test_what_determines_the_messages_belongs_to_their_identity(prepared, change, message):
    folder, command = prepared
    before = snapshot(folder / "run")
    with pytest.raises(ArtifactError, match=message):
        stage("prepare", [*command, change])
    assert snapshot(folder / "run") == before


def test_the_prepared_data_depend_on_the_written_messages(prepared, tmp_path):
    folder, command = prepared
    shutil.copytree(folder / "run", tmp_path / "run")
    changed = json.loads((tmp_path / "run" / "instructions" / "self" / "manifest.json").read_text())
    changed["files"]["instructions.jsonl"] = "0" * 64
    (tmp_path / "run" / "instructions" / "self" / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ArtifactError, match=r"made differently.*inputs\.instructions self"):
        stage("prepare", [*command, f"root={tmp_path}/run"])


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(prepared, tmp_path, capsys):
    _, command = prepared
    stage("prepare", [*command, f"root={tmp_path}/run", "dry_run=true"])
    printed = capsys.readouterr().out
    assert "instructions self: the target writes 44 instructions itself" in printed
    assert "after '<|user|>' (1 tokens)" in printed
    assert "text pretraining: the target writes 550 tokens" in printed
    assert "task prompts: held-out instructions of self" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.instructions.self.temperature=0", "data.instructions.self.temperature is 0, must be above 0"),
        ("data.instructions.self.top_p=1.5", "data.instructions.self.top_p is 1.5"),
        ("+data.instructions.self.steer=x", r"data.instructions.self has \['steer'\]; a source of kind self has"),
        ("+data.instructions.self.template='Answer!'", "template 'Answer!' has no field"),
        ("+data.instructions.self.template='{{text}}'", "template is '{text}', must be a text with {prompt} in it"),
        ("+data.pretraining.template='Q: {{prompt}}'", "data.pretraining.template is 'Q: {prompt}', must be left out"),
        ("data.instructions.self.number=0", "data.instructions.self.number is 0, must be at least 1"),
        ("data.instructions.self.system=[1]", "data.instructions.self.system is"),
        ("data.instructions.self.examples=[1]", "data.instructions.self.examples is .*must be a list of texts or"),
        ("data.instructions.self.examples=nowhere", "examples is 'nowhere', which is neither"),
        ("+data.instructions.self.requests=[1]", "requests is .1., must be a list of texts, or null"),
        ("+data.instructions.self.requests=[]", "requests is .., must be a list of texts, or null"),
        ("+data.instructions.self={{requests: [why], examples: [who]}}", "must be null beside examples"),
        ("+data.pretraining.requests=[why]", "data.pretraining.requests is .*must be left out"),
        ("+data.instructions.self.requests=[cat,'{long}']", "up to 123 tokens precede a message, and it may have 40"),
        ("data.instructions.self.max_new_tokens=300", "together they exceed the target's context of 128"),
        ("data.instructions.self.system=[cat,{long}]", "up to 121 tokens precede a message, and it may have 40"),
        ("data.instructions.self.examples=[cat,dog,man,{long}]", "up to 13. tokens precede a message, and it may"),
        ("data.instructions.self.system=[cat,'the <end> cat']", "no other way to write .*'the <end> cat'"),
        ("data.pretraining.max_answer_tokens=300", "may exceed the target's context of 128"),
        ("data.heldout_percent=0", "data.heldout_percent is 0"),
        ("scale.pretraining_tokens=null", "prepare.pretraining_tokens is null"),
        ("scale.instructions=null", "data.instructions.self.number and prepare.instructions are null"),
        ("generation.engine=vllm", "vllm writes instructions alone, and data.pretraining is of kind self"),
        ("generation.engine=magic", "generation.engine is 'magic', must be transformers or vllm"),
        ("task=docstrings", "task.open_ended.path is null, and data=self has no docstrings to ask about: task=self"),
        ("task.prompts.source=mine", "task.prompts.source is 'mine', must be a source .*: self"),
        ("data.instructions.self.kind=other", "must be files, conversations or self"),
        ("target.path={base} +data.instructions.self.requests=[why]", "has no chat template"),
        ("target.path={base}", "has no chat template: a base model cannot write a user's messages"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_the_target_is_loaded(prepared, tmp_path, change, message, dry_run):
    _, command = prepared
    save_target(tmp_path / "base")
    change = change.format(base=tmp_path / "base", long="cat " * 120)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stage("prepare", [*command, f"root={tmp_path}/run", *CHANGES.split(change), f"dry_run={dry_run}"])
    assert not (tmp_path / "run").exists()


class Sampling:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class FakeLLM:
    """Write a question of three nouns that the seed of the request chooses, and stop."""

    made: ClassVar = []

    def __init__(self, **fields):
        FakeLLM.made.append(fields)

    def generate(self, prompts, params, use_tqdm):
        nouns = VOCABULARY[2:18]
        texts = [[nouns[how.seed // 16**i % 16] for i in range(3)] for how in params]
        assert all(prompt["prompt_token_ids"] == [VOCABULARY.index("<|user|>")] for prompt in prompts)
        assert all((how.temperature, how.top_p, how.max_tokens) == (1.0, 0.95, 40) for how in params)
        ids = [[VOCABULARY.index(word) for word in ["who", *words, "<|stop|>"]] for words in texts]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(one))]) for one in ids]


def test_vllm_writes_instructions(prepared, tmp_path, monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, Sampling  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    command = [one for one in prepared[1] if not one.startswith("data.pretraining")]
    change = ["~data.pretraining", "+data.pretraining={kind: docstrings, packages: [fsspec]}"]
    change += ["generation.engine=vllm", "+generation.vllm.max_model_len=64", f"root={tmp_path}/run"]
    stage("prepare", [*command, *change])
    made = manifest(tmp_path / "run" / "instructions" / "self")
    written = read_jsonl(tmp_path / "run" / "instructions" / "self" / "instructions.jsonl")
    assert made["counts"]["written"] == len(written) == len({row["prompt"] for row in written}) == 44
    assert all(row["prompt"].startswith("who ") and len(row["prompt"].split()) == 4 for row in written)
    assert made["settings"]["engine"] == "vllm"
    assert [one["max_model_len"] for one in FakeLLM.made] == [64]


def test_a_message_that_repeats_an_example_is_a_duplicate(prepared, tmp_path):
    folder, command = prepared
    written = read_jsonl(folder / "run" / "instructions" / "self" / "instructions.jsonl")
    write_jsonl(tmp_path / "examples.jsonl", written)
    change = [f"data.instructions.self.examples={tmp_path}/examples.jsonl", "data.instructions.self.examples_shown=1"]
    stage("prepare", [*command, *change, f"root={tmp_path}/run"])
    rows = read_jsonl(tmp_path / "run" / "instructions" / "self" / "instructions.jsonl")
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in written}
    assert manifest(tmp_path / "run" / "instructions" / "self")["counts"]["left_out"]["duplicate"]


def test_the_target_is_steered_by_examples_from_a_file_beside_ones_own_questions(prepared, tmp_path):
    _, command = prepared
    write_jsonl(tmp_path / "examples.jsonl", [{"prompt": f"who saw the {word} ?"} for word in ("cat", "dog")])
    write_jsonl(tmp_path / "asked.jsonl", [{"prompt": f"{'why ' * i}who ran ?"} for i in range(1, 30)])
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"the {word} ran . " * 9} for word in VOCABULARY[4:18] * 5])
    change = [
        f"+data.instructions.mine.path={tmp_path}/asked.jsonl",
        "data.instructions.self.number=20",
        f"data.instructions.self.examples={tmp_path}/examples.jsonl",
        "~data.pretraining",
        "+data.pretraining.own={kind: self, max_new_tokens: 30, max_answer_tokens: 8}",
        f"+data.pretraining.files={{path: {tmp_path}/text.jsonl, weight: 3}}",
        "+data.pretraining.docs={kind: docstrings, packages: [fsspec], weight: 1}",
    ]
    command = [one for one in command if not one.startswith("data.pretraining")]
    stage("prepare", [*command, *change, f"root={tmp_path}/run"])
    counts = manifest(tmp_path / "run" / "instructions" / "self")["counts"]
    turns = [
        "<|user|> who saw the cat ?",
        "<|reply|> <unk>",
        "<|user|> who saw the dog ?",
        "<|reply|> <unk>",
        "<|user|>",
    ]
    assert counts["begins_with"] == " <|stop|> ".join(turns)
    kinds = [row["kind"] for row in read_jsonl(tmp_path / "run" / "data" / "instructions.jsonl")]
    assert {"mine", "self"} == set(kinds)
    made = manifest(tmp_path / "run" / "data")
    rows = made["counts"]["rows"]
    assert set(made["inputs"]) == {
        "tokenizer", "instructions mine", "instructions self", "pretraining own", "pretraining files"
    }  # fmt: skip
    assert all(rows[f"text train {name}"]["used"]["train"] for name in ("own", "files", "docs"))
    assert made["counts"]["train_tokens"] == 300


@pytest.mark.end_to_end
def test_a_target_is_all_that_the_whole_pipeline_needs(prepared, tmp_path):
    folder, command = prepared
    shutil.copytree(folder / "run", tmp_path / "run")
    how = ["scale.pretrain_steps=4", "scale.finetune_steps=4", "scale.num_responses=24"]
    main([*command, *how, f"root={tmp_path}/run", "losses=[tvdpp]", "seeds=[1]"])
    rows = read_jsonl(tmp_path / "run" / "evaluate" / "tvdpp-seed1" / "counts.jsonl")
    assert {row["task"] for row in rows} == {"prompts", "sampled"}
    assert manifest(tmp_path / "run" / "evaluate" / "tvdpp-seed1")["counts"]["greedy_outputs_unlike_the_target"] == 0
