"""The exported pair in other engines: `make test-serving`. Not among the default tests, for what it has to install.

Each engine decodes the demo's prompts greedily, alone and with the exported drafter: the text is the target's own as
this project decodes it, token for token, and as many drafts are accepted as here.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drafter.artifacts import read_jsonl
from drafter.gate import load_drafter
from drafter.models import load_target, load_tokenizer
from drafter.prompts import encode_prompt, stop_ids
from drafter.speculative import autoregressive_decode, speculative_decode
from drafter.warping import Sampling

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent.parent
TARGET = ROOT / "assets" / "tiny-target"
DRAFTER = Path(os.environ.get("DRAFTER", ROOT / "runs" / "tiny" / "finetune" / "tvdpp-seed1"))
ENVIRONMENT = ROOT / ".venv-serving"
PYTHON = ENVIRONMENT / "bin" / "python"
GAMMA, LIMIT = 3, 64

pytestmark = pytest.mark.skipif(not DRAFTER.exists(), reason=f"{DRAFTER} is not there: `make demo` makes it")


def needs(path, what):
    if not path.exists():
        pytest.skip(f"{what} is not installed in {ENVIRONMENT.name} (`make test-serving` installs it)")


@pytest.fixture(scope="module", autouse=True)
def _threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def pair():
    """Tokenizer, prompts, and what this project makes of them: alone, and with the drafter."""
    tokenizer, target = load_tokenizer(str(TARGET)), load_target(str(TARGET))
    drafter = load_drafter(str(DRAFTER), str(TARGET)).requires_grad_(False).eval()
    stops = stop_ids(tokenizer, target.generation_config.eos_token_id)
    rows = read_jsonl(DRAFTER.parent.parent / "data" / "tasks.jsonl")
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    prompts = [prompt for prompt in prompts if len(prompt) + LIMIT + GAMMA < 512]
    alone = [autoregressive_decode(target, prompt, LIMIT, Sampling(), stops).tokens for prompt in prompts]
    drafted = [speculative_decode(target, drafter, prompt, GAMMA, LIMIT, Sampling(), stops) for prompt in prompts]
    assert [one.tokens for one in drafted] == alone
    return prompts, stops, alone, drafted


def export(out, *overrides):
    arguments = [
        f"export.drafter={DRAFTER}",
        f"target.path={TARGET}",
        f"out={out}",
        "hydra.run.dir=" + str(out.parent),
        *overrides,
    ]
    subprocess.run([sys.executable, "-m", "experiments.export", *arguments], check=True, cwd=ROOT)
    return out


def answered(command, asked):
    found = subprocess.run([*map(str, command)], input=json.dumps(asked), capture_output=True, text=True, cwd=HERE)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.strip().splitlines()[-1])


def compared(engine, found, pair, accepted_by="accepted"):
    """The engine's tokens are ours, and its target calls and accepted drafts within 3%."""
    prompts, _, alone, drafted = pair
    unlike = [i for i, row in enumerate(found) if row["tokens"] != alone[i]]
    calls, ours = sum(row["target_calls"] for row in found), sum(len(one.blocks) for one in drafted)
    accepted = sum(row[accepted_by] for row in found)
    ours_accepted = sum(block.accepted for one in drafted for block in one.blocks)
    tokens = sum(map(len, alone))
    print(
        f"\n{engine}: {len(prompts) - len(unlike)} of {len(prompts)} texts equal; "
        f"tau {tokens / calls:.3f}, ours {tokens / ours:.3f}; accepted {accepted}, ours {ours_accepted}"
    )
    assert not unlike
    assert tokens / calls == pytest.approx(tokens / ours, rel=0.03)
    assert accepted == pytest.approx(ours_accepted, rel=0.03)


def test_openvino(pair, tmp_path):
    needs(ENVIRONMENT / "bin" / "optimum-cli", "optimum-intel")
    prompts, stops, alone, _ = pair
    drafter = export(tmp_path / "drafter", "export.format=openvino", f"openvino.command={ENVIRONMENT}/bin/optimum-cli")
    target = tmp_path / "target"
    task = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    command = [ENVIRONMENT / "bin" / "optimum-cli", "export", "openvino", "--model", TARGET, *task, target]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    asked = {"target": str(target), "drafter": None, "prompts": prompts, "max_new_tokens": LIMIT, "stop_ids": stops}
    asked["num_speculative_tokens"] = GAMMA
    client = [PYTHON, HERE / "openvino_client.py"]
    assert [row["tokens"] for row in answered(client, asked)] == alone
    compared("OpenVINO GenAI", answered(client, asked | {"drafter": str(drafter)}), pair)


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    found = sorted(ENVIRONMENT.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    needs(found[-1] if found else ENVIRONMENT / "convert_hf_to_gguf.py", "llama.cpp's converter")
    folder = tmp_path_factory.mktemp("gguf")
    how = ["export.format=gguf", f"gguf.converter={found[-1]}", f"gguf.python={PYTHON}"]
    drafter = export(folder / "drafter", *how)
    target = folder / "target.gguf"
    arguments = [found[-1], TARGET, "--outfile", target, "--outtype", "f32"]
    script = ROOT / "experiments" / "to_gguf.py"
    subprocess.run([*map(str, [PYTHON, script, *arguments])], check=True, capture_output=True)
    return target, next(drafter.glob("*.gguf"))


@pytest.fixture
def llama_client(tmp_path):
    needs(ENVIRONMENT / "node_modules" / "node-llama-cpp", "node-llama-cpp")
    if not shutil.which("node"):
        pytest.skip("Node.js is not installed")
    # An ES module finds its packages beside itself alone.
    shutil.copy(HERE / "llama_client.mjs", tmp_path / "client.mjs")
    (tmp_path / "node_modules").symlink_to(ENVIRONMENT / "node_modules")
    return ["node", tmp_path / "client.mjs"]


def test_llama_cpp(pair, ggufs, llama_client):
    prompts, stops, alone, _ = pair
    target, drafter = map(str, ggufs)
    asked = {"target": target, "drafter": None, "prompts": prompts, "max_new_tokens": LIMIT}
    asked |= {"num_speculative_tokens": GAMMA, "stop_ids": stops}
    assert [row["tokens"] for row in answered(llama_client, asked)] == alone
    compared("llama.cpp", answered(llama_client, asked | {"drafter": drafter, "predictor": "fixed"}), pair)


def test_llama_cpp_with_the_predictor_of_node_llama_cpp(pair, ggufs, llama_client):
    # It lets one target call pass without drafts after each refuted one, so that it accepts less: only texts are equal.
    prompts, stops, alone, drafted = pair
    target, drafter = map(str, ggufs)
    asked = {"target": target, "drafter": drafter, "predictor": "own", "prompts": prompts, "max_new_tokens": LIMIT}
    found = answered(llama_client, asked | {"num_speculative_tokens": GAMMA, "stop_ids": stops})
    assert [row["tokens"] for row in found] == alone
    assert 0 < sum(row["accepted"] for row in found) < sum(block.accepted for one in drafted for block in one.blocks)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_for_gpus(pair, tmp_path, engine):
    if subprocess.run([str(PYTHON), "-c", f"import {engine}"], capture_output=True).returncode:
        pytest.skip(f"{engine} is not installed in {ENVIRONMENT.name}: it wants a GPU")
    prompts, _, alone, _ = pair
    asked = {"target": str(TARGET), "drafter": str(export(tmp_path / "drafter", "export.format=hf"))}
    asked |= {"prompts": prompts, "max_new_tokens": LIMIT, "num_speculative_tokens": GAMMA, "engine": engine}
    assert [row["tokens"] for row in answered([PYTHON, HERE / "gpu_client.py"], asked)] == alone
