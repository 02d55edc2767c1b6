"""The exported pair in other engines: `make test-serving`. Not among the default tests, for what it has to install.

Each engine decodes the demo's prompts greedily, alone and with the exported drafter: the text is the target's own as
this project decodes it, token for token, and as many drafts are accepted as here.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.engine_processes import LlamaServer, Settings
from drafter.artifacts.manifest import read_jsonl
from drafter.data.prompts import encode_prompt
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from drafter.models.compatibility import load_drafter
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import load_target, load_tokenizer

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent.parent
TARGET = ROOT / "assets" / "tiny-target"
DRAFTER = Path(os.environ.get("DRAFTER", ROOT / "runs" / "tiny" / "finetune" / "tvdpp-seed1"))
ENVIRONMENT = ROOT / ".venv-serving"
PYTHON = ENVIRONMENT / "bin" / "python"
LLAMA_SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
GAMMA, LIMIT = 3, 64

pytestmark = pytest.mark.skipif(not DRAFTER.exists(), reason=f"{DRAFTER} is not there: `make demo` makes it")


def needs(path, what):
    if not path.exists():
        pytest.skip(f"{what} is not installed in {ENVIRONMENT.name} (`make test-serving` installs it)")


@pytest.fixture(scope="module", autouse=True)
def _threads():
    torch.set_num_threads(2)


class Pair(NamedTuple):
    """Both models, prompts, and what the target writes by itself."""

    target: torch.nn.Module
    drafter: torch.nn.Module
    prompts: list[list[int]]
    stops: list[int]
    alone: list[list[int]]

    def asked(self, target, drafter, gamma=GAMMA):
        common = {"prompts": self.prompts, "stop_ids": self.stops, "max_new_tokens": LIMIT}
        return common | {"target": str(target), "drafter": drafter and str(drafter), "num_speculative_tokens": gamma}

    def accepted(self, gamma, first=0):
        """Of each text the accepted drafts of every block, where `first` tokens were written before the first block."""
        found = []
        for prompt, text in zip(self.prompts, self.alone, strict=True):
            if text[:first] == text:
                found.append([])
                continue
            start, length = prompt + text[:first], LIMIT - first
            options = DecodingOptions(length, stop_ids=self.stops)
            one = speculative_decode(self.target, self.drafter, start, gamma, options)
            assert one.tokens == text[first:]
            found.append([block.accepted for block in one.blocks])
        return found


@pytest.fixture(scope="module")
def pair():
    tokenizer, target = load_tokenizer(str(TARGET)), load_target(str(TARGET))
    drafter = load_drafter(str(DRAFTER), str(TARGET)).requires_grad_(False).eval()
    stops = end_of_turn_ids(str(TARGET), tokenizer)
    rows = read_jsonl(DRAFTER.parent.parent / "data" / "tasks.jsonl")
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    prompts = [prompt for prompt in prompts if len(prompt) + LIMIT + GAMMA < 512]
    alone = [autoregressive_decode(target, prompt, DecodingOptions(LIMIT, stop_ids=stops)).tokens for prompt in prompts]
    return Pair(target, drafter, prompts, stops, alone)


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


def texts(rows):
    return [row["tokens"] for row in rows]


def compared(engine, rows, calls, accepted, pair):
    """Target calls and accepted drafts within 3% of this project's, counted in the engine's way, text by text."""
    theirs = [(row["target_calls"], row["accepted"]) for row in rows]
    here = list(zip(calls, accepted, strict=True))
    same = sum(one == other for one, other in zip(theirs, here, strict=True))
    tokens, (found, drafts) = sum(map(len, pair.alone)), map(sum, zip(*theirs, strict=True))
    print(
        f"\n{engine}: tau {tokens / found:.3f}, here {tokens / sum(calls):.3f}; accepted {drafts}, here {sum(accepted)}"
    )
    print(f"both counts are equal for {same} of {len(rows)} texts")
    assert (found, drafts) == pytest.approx((sum(calls), sum(accepted)), rel=0.03)


def by_openvino(asked):
    """The rows of the client that the benchmark of engines uses, which takes one prompt per line."""
    settings = {name: asked[name] for name in ("target", "drafter", "stop_ids")} | {"exact": True, "threads": None}
    each = {name: asked[name] for name in ("max_new_tokens", "num_speculative_tokens")}
    lines = [settings, *(each | {"prompt": prompt} for prompt in asked["prompts"])]
    command = [*map(str, [PYTHON, ROOT / "benchmarks" / "openvino_client.py"])]
    found = subprocess.run(command, input="\n".join(map(json.dumps, lines)), capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith('{"tokens"')]


def test_openvino(pair, tmp_path):
    needs(ENVIRONMENT / "bin" / "optimum-cli", "optimum-intel")
    drafter = export(tmp_path / "drafter", "export.format=openvino", f"openvino.command={ENVIRONMENT}/bin/optimum-cli")
    target = tmp_path / "target"
    task = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    command = [ENVIRONMENT / "bin" / "optimum-cli", "export", "openvino", "--model", TARGET, *task, target]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    assert texts(by_openvino(pair.asked(target, None))) == pair.alone
    found = by_openvino(pair.asked(target, drafter))
    assert texts(found) == pair.alone
    # Its first call reads the prompt and writes a token, without drafts; its counter leaves out a text's last block.
    blocks = pair.accepted(GAMMA, first=1)
    compared("OpenVINO GenAI", found, [1 + len(one) for one in blocks], [sum(one[:-1]) for one in blocks], pair)


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    found = sorted(ENVIRONMENT.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    needs(found[-1] if found else ENVIRONMENT / "convert_hf_to_gguf.py", "llama.cpp's converter")
    folder = tmp_path_factory.mktemp("gguf")
    how = ["export.format=gguf", f"gguf.converter={found[-1]}", f"gguf.python={PYTHON}"]
    drafter = export(folder / "drafter", *how)
    target = folder / "target.gguf"
    arguments = [found[-1], TARGET, "--outfile", target, "--outtype", "f32"]
    script = ROOT / "experiments" / "exporting" / "to_gguf.py"
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
    target, drafter = ggufs
    assert texts(answered(llama_client, pair.asked(target, None))) == pair.alone
    found = answered(llama_client, pair.asked(target, drafter) | {"predictor": "fixed"})
    assert texts(found) == pair.alone
    # node-llama-cpp 3.22 compares a second draft with a list that it never fills, so that one draft a call is accepted
    # at most, as with gamma 1. It counts those that another token follows: all tokens but one a call.
    calls = [len(one) for one in pair.accepted(1)]
    accepted = [len(text) - one for text, one in zip(pair.alone, calls, strict=True)]
    compared("llama.cpp", found, calls, accepted, pair)


def test_llama_cpp_with_the_predictor_of_node_llama_cpp(pair, ggufs, llama_client):
    # It lets one target call pass without drafts after each refuted one, so that it accepts less: only texts are equal.
    found = answered(llama_client, pair.asked(*ggufs) | {"predictor": "own"})
    assert texts(found) == pair.alone
    assert 0 < sum(row["accepted"] for row in found) < sum(map(sum, pair.accepted(1)))


@pytest.mark.skipif(not LLAMA_SERVER, reason="LLAMA_SERVER does not name llama-server, which has to be compiled")
def test_the_counters_of_llama_server_are_those_of_this_project(pair, ggufs, tmp_path):
    target, drafter = map(str, ggufs)
    settings = Settings(threads=1, context=512, length=LIMIT, exact=True, stop_ids=pair.stops, logs=tmp_path)
    with ExitStack() as stack:
        drafted, alone = (LlamaServer(LLAMA_SERVER, target, one, GAMMA, settings) for one in (drafter, None))
        for server in (drafted, alone):
            stack.callback(server.close)
        given = {"target.path": TARGET, "measure.drafter": DRAFTER, "out": tmp_path / "out", "measure.rivals": "[]"}
        given |= {"measure.engine": "llama-server", "measure.engine_gamma": GAMMA, "measure.max_new_tokens": LIMIT}
        given |= {"measure.url": drafted.client.url, "measure.url_alone": alone.client.url}
        given |= {"measure.prompts": DRAFTER.parent.parent / "data" / "tasks.jsonl", "measure.num_prompts": 32}
        arguments = [f"{name}={value}" for name, value in given.items()]
        command = [sys.executable, "-m", "experiments.measure", *arguments, f"hydra.run.dir={tmp_path}"]
        subprocess.run(command, check=True, cwd=ROOT)
    found = json.loads((tmp_path / "out" / "measure.json").read_text())["engine"]
    print(f"\nllama-server: tau {found['tau']['value']:.3f}, here {found['own_tau']:.3f}; equal texts {found['equal']}")
    equal, texts = found["equal"]
    assert equal >= 0.9 * texts  # in float32 only near ties differ
    assert found["tau"]["value"] == pytest.approx(found["own_tau"], rel=0.02)  # as far as the page calls them equal


@pytest.mark.skipif(not LLAMA_SERVER, reason="LLAMA_SERVER does not name llama-server, which has to be compiled")
def test_llama_server_samples_by_the_rule_argmax(ggufs, tmp_path):
    target, drafter = ggufs
    prompts = DRAFTER.parent.parent / "data" / "tasks.jsonl"
    given = {"target": TARGET, "drafter": DRAFTER, "target-gguf": target, "drafter-gguf": drafter, "prompts": prompts}
    given |= {"binary": LLAMA_SERVER, "gamma": GAMMA, "length": LIMIT, "threads": 1, "out": tmp_path}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "benchmarks.engine_rules", *options], check=True, cwd=ROOT)
    texts = json.loads((tmp_path / "engine_rules.json").read_text())["texts"]
    for temperature in (0.6, 1.0):
        chosen = [text["calls"] for text in texts if text["temperature"] == temperature]
        engine, argmax, match = (sum(calls[name] for calls in chosen) for name in ("llama-server", "argmax", "match"))
        assert engine > 2000
        assert argmax == pytest.approx(engine, rel=0.005)  # in float32 only near ties of the drafter differ
        assert abs(match - engine) > 0.02 * engine


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_for_gpus(pair, tmp_path, engine):
    if subprocess.run([str(PYTHON), "-c", f"import {engine}"], capture_output=True).returncode:
        pytest.skip(f"{engine} is not installed in {ENVIRONMENT.name}: it wants a GPU")
    asked = pair.asked(TARGET, export(tmp_path / "drafter", "export.format=hf")) | {"engine": engine}
    assert texts(answered([PYTHON, HERE / "gpu_client.py"], asked)) == pair.alone
