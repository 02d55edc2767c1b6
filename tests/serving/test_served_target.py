"""llama-server as the target's server: the same responses as in this process. Run by `make test-serving`.

llama-server has to be compiled, or installed by hand: LLAMA_SERVER=/path/to/llama-server make test-serving. With
TARGET_GGUF the target's GGUF file is that one, in float32, and is not converted again.
"""

import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import textwrap
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch

from drafter.artifacts.rows import finish
from drafter.artifacts.storage import Folder
from drafter.data.dialogues import Continuation
from drafter.data.engines import Limits, Request, transformers_engine
from drafter.data.http_client import HttpClient, Retries
from drafter.data.prompts import encode_prompt
from drafter.data.responses import schema, shards, write_responses
from drafter.data.served import served_engine
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import load_target, load_tokenizer
from drafter.warping import Sampling, warp
from tests.conftest import finished_rows
from tests.serving.test_engines import ENVIRONMENT, PYTHON, ROOT, TARGET, needs

LLAMA_SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
LIMIT, MODEL = 48, "tiny-target"
NEAR_TIE = 1e-3  # of two logits: float32 sums in another order differ by less than 1e-4 in this model

pytestmark = pytest.mark.skipif(not LLAMA_SERVER, reason="LLAMA_SERVER does not name llama-server")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    if given := os.environ.get("TARGET_GGUF"):
        return Path(given)
    found = sorted(ENVIRONMENT.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    needs(found[-1] if found else ENVIRONMENT / "convert_hf_to_gguf.py", "llama.cpp's converter")
    out = tmp_path_factory.mktemp("gguf") / "target.gguf"
    script = ROOT / "experiments" / "exporting" / "to_gguf.py"
    command = [PYTHON, script, found[-1], TARGET, "--outfile", out, "--outtype", "f32"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return out


class LlamaServer:
    """A process of llama-server on a port of its own."""

    def __init__(self, gguf, slots=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # By default the cache and flash attention are in half precision, which decides near ties otherwise.
        exact = ["--flash-attn", "off", "-ctk", "f32", "-ctv", "f32"]
        size = ["-c", str(512 * slots), "-np", str(slots), "-t", "1"]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--alias", MODEL]
        self.command = [LLAMA_SERVER, "-m", str(gguf), *exact, *size, *where]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process = None

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ready(self):
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1) as found:
                    return json.load(found)
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("llama-server did not start")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(gguf):
    one = LlamaServer(gguf)
    one.start()
    one.ready()
    yield one
    one.kill()


@pytest.fixture(scope="module")
def target():
    torch.set_num_threads(2)
    return load_target(str(TARGET))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TARGET))


@pytest.fixture(scope="module")
def stops(tokenizer):
    return end_of_turn_ids(str(TARGET), tokenizer)


def requests(tokenizer, temperature=0.0):
    """Ask about the functions of a few modules of Python's standard library."""
    found = [
        f"What does `{module.__name__}.{name}{inspect.signature(value)}` do?"
        for module in (textwrap, json, shutil, inspect)
        for name, value in sorted(vars(module).items())
        if inspect.isfunction(value) and not name.startswith("_")
    ]
    prompts = [encode_prompt(tokenizer, text) for text in found]
    fitting = [prompt for prompt in prompts if len(prompt) + LIMIT <= 256]
    return [Request(str(i), "k", "train", temperature, prompt) for i, prompt in enumerate(fitting)]


def served(server, tokenizer, stops, limit=LIMIT, patience=60.0, sleep=time.sleep):
    client = HttpClient(server.url, None, Retries(timeout=60.0, patience=patience), sleep)
    return served_engine(client, MODEL, tokenizer, Limits(0.95, limit, stops), 5, encode_prompt(tokenizer, "Hello?"), 4)


def test_greedy_responses_are_those_of_this_process_but_for_named_near_ties(server, target, tokenizer, stops):
    asked = requests(tokenizer)
    here = transformers_engine(target, Limits(0.95, LIMIT, stops), batch_tokens=256)(asked)
    there = served(server, tokenizer, stops)(asked)
    ties = []
    for request, one, other in zip(asked, here, there, strict=True):
        if one == other:
            continue
        first = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        with torch.inference_mode():
            logits = target(torch.tensor([request.prompt_ids + one[:first]])).logits[0, -1]
        gap = (logits[one[first]] - logits[other[first]]).item()
        ties.append((request.id, first, tokenizer.convert_ids_to_tokens([one[first], other[first]]), gap))
        assert 0 <= gap < NEAR_TIE, ties[-1]
    print(f"\nllama-server: {len(asked) - len(ties)} of {len(asked)} greedy texts are equal; near ties: {ties}")
    assert len(asked) > 50
    assert len(ties) <= len(asked) // 20


def test_samples_come_from_the_targets_distribution(server, target, tokenizer, stops):
    prompt, count = requests(tokenizer)[0].prompt_ids, 600
    asked = [Request("a", "k", "train", 0.7, prompt, i) for i in range(count)]
    found = Counter(tokens[0] for tokens in served(server, tokenizer, stops, limit=1)(asked))
    with torch.inference_mode():
        logits = target(torch.tensor([prompt])).logits[0, -1:]
    exact = warp(logits, Sampling(0.7, top_p=0.95))[0]
    print(f"\n{len(found)} different first tokens; the target's top-p set has {int((exact > 0).sum())}")
    assert len(found) > 1
    assert all(exact[token] > 0 for token in found)  # llama-server's top-p, after the temperature, is the same set
    for token in (exact > 0.02).nonzero().flatten().tolist():
        share = exact[token].item()
        # Five standard deviations of a share of 600 samples.
        assert abs(found[token] / count - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_a_server_that_is_killed_and_started_again_loses_and_doubles_nothing(
    server, target, tokenizer, stops, tmp_path
):
    asked = requests(tokenizer)
    parts, folder = shards(asked, 16), Folder(tmp_path)
    pauses, killed = [], threading.Event()

    def sleep(seconds):
        pauses.append(seconds)
        time.sleep(seconds)

    generate = served(server, tokenizer, stops, sleep=sleep)

    def restart():
        server.kill()
        killed.set()
        time.sleep(2)  # connections are refused
        server.start()

    def watched(part):
        if part == parts[1]:  # in the middle of this shard
            threading.Timer(0.15, restart).start()
        return generate(part)

    known = set(tokenizer.get_vocab().values())
    following = Continuation(tokenizer, stops, 10_000)
    write_responses(watched, parts, folder, schema(0.95), following=following, known_ids=known, seed=3)
    files, notes = finish(folder, len(parts), schema(0.95))
    rows = finished_rows(folder, files, "respond")
    assert killed.is_set()
    assert pauses  # some requests failed, and were sent again
    assert all(note["failed"] == {} for note in notes)
    assert sorted(row["id"] for row in rows) == sorted(request.id for request in asked)
    alone = dict(zip((request.id for request in asked), served(server, tokenizer, stops)(asked), strict=True))
    assert {row["id"]: row["response_ids"].tolist() for row in rows} == alone
