import json
import re
import shlex
import shutil
import stat
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drafter.artifacts.manifest import read_manifest
from drafter.data.prompts import encode_prompt
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from drafter.models.compatibility import VocabularyError
from drafter.models.loading import load_target
from drafter.models.trimming import write_kept
from experiments.exporting import to_gguf
from experiments.exporting.facts import gather
from experiments.exporting.serving import serving
from tests.conftest import WORDS, save_target
from tests.experiments.test_pipeline import snapshot, stage


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    _, root = world
    out = tmp_path_factory.mktemp("export")
    drafter = root / "finetune" / "tvdpp-seed1"
    command = [f"export.drafter={drafter}", f"hydra.run.dir={out}/hydra"]
    stage("export", [*command, f"out={out}/hf"])
    return command, drafter, out / "hf"


def test_the_export_finds_the_drafters_target_and_has_the_targets_tokenizer_and_end_of_text(world, exported):
    overrides, _ = world
    _, drafter, out = exported
    target = next(one.split("=", 1)[1] for one in overrides if one.startswith("target.path"))
    assert read_manifest(out, "export")["config"]["target"]["path"] == target
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(target)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    before, after = load_file(drafter / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((out / "generation_config.json").read_text())
    assert config["eos_token_id"] in (0, [0])
    assert config["num_assistant_tokens_schedule"] == "constant"


def test_transformers_assisted_generation_gives_the_targets_text_in_as_many_calls(world, exported):
    overrides, _ = world
    path = next(one.split("=", 1)[1] for one in overrides if one.startswith("target.path"))
    _, _, out = exported
    target, drafter = load_target(path), AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    gamma = drafter.generation_config.num_assistant_tokens
    calls = []
    target.register_forward_hook(lambda *_: calls.append(1))
    total = ours = 0
    for word in WORDS[3:9]:
        prompt = encode_prompt(tokenizer, f"who saw the {word} ?")
        alone = autoregressive_decode(target, prompt, DecodingOptions(20, stop_ids=[0])).tokens
        blocks = speculative_decode(target, drafter, prompt, gamma, DecodingOptions(20, stop_ids=[0])).blocks
        calls.clear()
        ids = torch.tensor([prompt])
        found = target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=drafter, max_new_tokens=20, do_sample=False
        )
        assert found[0, len(prompt) :].tolist() == alone
        total, ours = total + len(calls), ours + len(blocks)
    assert total == pytest.approx(ours, rel=0.03)


def test_the_card_has_the_hubs_header_and_the_measured_figures(exported):
    _, drafter, out = exported
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model"],
    }
    facts = gather(str(drafter))
    assert facts.best is not None
    assert f"Draft γ = {facts.gamma('hf')} tokens per block" in card
    for row in facts.rows:
        at = " and ".join(f"{value:g}" for value in facts.temperatures[row.task])
        where = f"| {row.task.replace('_', ' ')} | {at} | {row.gamma} | {row.prompts} |"
        assert f"{where} {row.block_efficiency.value:.2f} [" in card
    assert {tuple(values) for values in facts.temperatures.values()} == {(0,), (0.6,), (0, 0.6)}
    for part in (
        "vllm serve",
        "sglang.launch_server",
        "assistant_model=drafter",
        "distillation loss | tvdpp",
        "commit",
    ):
        assert part in card, part
    assert "{{" not in card
    assert "{%" not in card
    assert "None" not in card


def test_a_second_export_changes_nothing(exported):
    command, _, out = exported
    before = snapshot(out)
    stage("export", [*command, f"out={out}"])
    assert snapshot(out) == before


def test_the_card_has_the_license_that_was_chosen(exported, tmp_path):
    command, _, _ = exported
    stage(
        "export", [*command, f"out={tmp_path}/out", "export.license=apache-2.0", "target.path=" + target_of(exported)]
    )
    assert yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])["license"] == "apache-2.0"


def target_of(exported):
    return read_manifest(exported[2], "export")["config"]["target"]["path"]


def test_weights_have_the_dtype_of_the_config(exported, tmp_path):
    command, _, _ = exported
    stage("export", [*command, f"out={tmp_path}/out", "export.dtype=bfloat16"])
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert "These weights are bfloat16" in (tmp_path / "out" / "README.md").read_text()


def test_a_trimmed_drafter_is_exported_whole_with_its_list(exported, tmp_path):
    command, drafter, _ = exported
    shutil.copytree(drafter, tmp_path / drafter.name)
    write_kept(tmp_path / drafter.name, [1, 2, 5])
    path = tmp_path / drafter.name / "manifest.json"
    manifest = json.loads(path.read_text())
    made_of = {"stage": "trim", "counts": {"kept": 3, "vocabulary": 24}}
    made_of["config"] = manifest["config"] | {"trim": {"drafter": str(drafter)}}
    path.write_text(json.dumps(manifest | made_of))
    stage("export", [*command[1:], f"export.drafter={tmp_path / drafter.name}", f"out={tmp_path}/out"])
    assert json.loads((tmp_path / "out" / "kept_tokens.json").read_text()) == [1, 2, 5]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(drafter / "model.safetensors").keys()
    assert (
        "the 3 tokens that the drafter's output embedding was trimmed to"
        in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("target.path={stranger}", VocabularyError, "is no drafter for"),
        ("export.format=onnx", ValueError, r"export.format is 'onnx', must be one of \['gguf', 'hf', 'openvino'\]"),
        (
            "export.dtype=int8",
            ValueError,
            r"export.dtype is 'int8'; the format hf has \['bfloat16', 'float16', 'float32'\]",
        ),
        ("export.format=gguf", ValueError, "gguf.converter is 'None': give the path of convert_hf_to_gguf.py"),
        (
            "export.format=openvino openvino.command=no-such-tool",
            ValueError,
            "'no-such-tool' is not an installed command",
        ),
    ],
)
def test_bad_input_is_one_clear_error_and_writes_nothing(exported, tmp_path, change, error, message):
    command, _, _ = exported
    save_target(tmp_path / "stranger", [*WORDS[:18], WORDS[19], WORDS[18]])
    with pytest.raises(error, match=message):
        stage("export", [*command, f"out={tmp_path}/out", *change.format(stranger=tmp_path / "stranger").split()])
    assert not (tmp_path / "out").exists()


def test_a_drafter_without_a_manifest_needs_target_path(exported, tmp_path):
    command, drafter, _ = exported
    shutil.copytree(drafter, tmp_path / "hub")
    (tmp_path / "hub" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"give target\.path="):
        stage("export", [*command[1:], f"export.drafter={tmp_path}/hub", f"out={tmp_path}/out"])
    stage(
        "export",
        [*command[1:], f"export.drafter={tmp_path}/hub", f"out={tmp_path}/out", "target.path=" + target_of(exported)],
    )
    assert "Nothing was measured with it: γ = 3 below is a guess" in (tmp_path / "out" / "README.md").read_text()


def test_gguf_is_made_by_the_converter_from_the_exported_directory(exported, tmp_path):
    # A stand-in of the converter's interface; tests/serving has the real one.
    (tmp_path / "llama.cpp" / "conversion").mkdir(parents=True)
    (tmp_path / "llama.cpp" / "conversion" / "base.py").write_text("class TextModel:\n    get_vocab_base_pre = None\n")
    converter = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    converter.write_text(
        "import json, pathlib, sys\n"
        "source, _, out, _, kind = sys.argv[1:]\n"
        "files = sorted(path.name for path in pathlib.Path(source).iterdir())\n"
        "pathlib.Path(out).write_text(json.dumps([kind, files]))\n"
    )
    command, drafter, _ = exported
    how = ["export.format=gguf", "export.dtype=int8", f"gguf.converter={converter}", f"gguf.python={sys.executable}"]
    stage("export", [*command, f"out={tmp_path}/out", *how])
    kind, files = json.loads((tmp_path / "out" / f"{drafter.name}.gguf").read_text())
    assert kind == "q8_0"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert set(read_manifest(tmp_path / "out", "export")["files"]) == {"README.md", f"{drafter.name}.gguf"}
    assert (
        f"llama-server --model target.gguf --model-draft {tmp_path}/out/{drafter.name}.gguf"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_the_error_of_a_converter_that_fails_has_its_output(exported, tmp_path):
    tool = tmp_path / "optimum-cli"
    tool.write_text("#!/bin/sh\necho no such architecture >&2\nexit 3\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    command, _, _ = exported
    with pytest.raises(RuntimeError, match=r"optimum-cli export openvino .*failed:\nno such architecture"):
        stage("export", [*command, f"out={tmp_path}/out", "export.format=openvino", f"openvino.command={tool}"])
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "like"),
    [
        ({}, True),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, False),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, False),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, False),
    ],
)
def test_only_a_tokenizer_that_splits_like_gpt2_is_called_so(tmp_path, change, like):
    tokenizer = {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}} | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert to_gguf.splits_like_gpt2(tmp_path) == like
    assert not to_gguf.splits_like_gpt2(tmp_path / "nowhere")


def test_commands_name_the_arguments_that_the_engines_document():
    # docs.vllm.ai, Draft Models; docs.sglang.io, Standalone Speculative Decoding; llama.cpp, common/arg.cpp.
    commands = serving("hf", "org/target", "out", 4)
    vllm = shlex.split(commands["vLLM"])
    assert vllm[:4] == ["vllm", "serve", "org/target", "--speculative-config"]
    plain = {"model": "out", "num_speculative_tokens": 4, "method": "draft_model"}
    assert json.loads(vllm[4]) == {**plain, "draft_sample_method": "probabilistic"}
    assert json.loads(shlex.split(serving("hf", "org/target", "out", 4, "argmax")["vLLM"])[4]) == plain
    options = dict(re.findall(r"(--[\w-]+) (\S+)", commands["SGLang"]))
    assert options == {
        "--model-path": "org/target",
        "--speculative-algorithm": "STANDALONE",
        "--speculative-draft-model-path": "out",
        "--speculative-num-steps": "4",
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "5",
    }
    (llama,) = serving("gguf", "org/target", "out", 4).values()
    assert "--spec-type draft-simple --spec-draft-n-max 4 --spec-draft-p-min 0" in llama
    compile(commands["transformers"], "card", "exec")
    # transformers 5 loads the weights in their own dtype, such as bfloat16, and decoding in it is slow on CPUs.
    for name, path in (("target", "org/target"), ("drafter", "out")):
        assert f'{name} = AutoModelForCausalLM.from_pretrained("{path}", dtype="float32")' in commands["transformers"]
    (openvino,) = serving("openvino", "org/target", "out", 4).values()
    compile(openvino, "card", "exec")
    assert "num_assistant_tokens=4" in openvino
