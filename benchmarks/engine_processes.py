"""Run llama-server and OpenVINO GenAI as processes that answer one request at a time, and say what it took."""

import json
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from drafter.data.engines import Limits
from drafter.data.http_client import HttpClient, Retries, ServerError
from experiments.running.engine_answers import Answer, ask_llama_server

OPENVINO = Path(__file__).parent / "openvino_client.py"
PATIENCE = 300.0  # seconds in which an engine must have loaded its models


class Settings(NamedTuple):
    """What all processes of a measurement share.

    Attributes:
        threads: threads of a process; only one process computes at a time.
        context: tokens that the longest prompt, its text and a block need.
        length: the most tokens of a text.
        exact: compute in float32, with a float32 key-value cache, instead of what the engine chooses.
        stop_ids: the ids that end a text.
        logs: the folder of the processes' logs.
    """

    threads: int
    context: int
    length: int
    exact: bool
    stop_ids: list[int]
    logs: Path


def one_of(help_text: str, *names: str) -> str:
    """Return the first of an option's names, which differ between versions, that a program's help contains.

    >>> one_of("-md, --model-draft FNAME   --draft-max N", "--spec-draft-n-max", "--draft-max")
    '--draft-max'

    Raises:
        ValueError: the help contains none.
    """
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_text))
    if found := next((name for name in names if name in known), None):
        return found
    raise ValueError(f"this llama-server has no option {' or '.join(names)}: take one that drafts with a second model")


def llama_arguments(help_text: str, drafter: str | None, gamma: int, settings: Settings) -> list[str]:
    """Return llama-server's arguments, without the model and the address.

    The least probability of a draft is 0 and the least number of drafts too, so that γ tokens are drafted whatever the
    drafter's confidence. Prompts are not kept between requests.

    Args:
        help_text: what `llama-server --help` prints.
        drafter: the drafter's file, or None.
        gamma: drafted tokens per block.
        settings: threads, context and precision.
    """
    threads, context = str(settings.threads), str(settings.context)
    found = ["-t", threads, "-tb", threads, "-c", context, "-np", "1"]
    if "--cache-ram" in help_text:
        found += ["--cache-ram", "0"]
    if settings.exact:
        found += ["--flash-attn", "off", "-ctk", "f32", "-ctv", "f32"]
    if drafter is None:
        return found
    found += [one_of(help_text, "--model-draft", "--spec-draft-model"), drafter]
    found += [one_of(help_text, "--spec-draft-n-max", "--draft-max"), str(gamma)]
    found += [one_of(help_text, "--spec-draft-n-min", "--draft-min"), "0"]
    found += [one_of(help_text, "--spec-draft-p-min", "--draft-p-min"), "0"]
    if "draft-simple" in help_text:
        found += ["--spec-type", "draft-simple"]
    if settings.exact:
        found += ["-ctkd", "f32", "-ctvd", "f32"]
    return found


class LlamaServer:
    """A llama-server with a model of its own, and a drafter if one is given.

    Raises:
        ServerError: it did not start; the error has the end of its log.
    """

    def __init__(self, binary: str, model: str, drafter: str | None, gamma: int, settings: Settings):
        usage = subprocess.run([binary, "--help"], capture_output=True, encoding="utf-8", errors="replace")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = llama_arguments(usage.stdout + usage.stderr, drafter, gamma, settings)
        self.binary = binary
        command = [binary, "-m", model, "--host", "127.0.0.1", "--port", str(port), *arguments]
        self.length = settings.length
        self.log = settings.logs / f"{Path(model).stem}-{f'gamma{gamma}' if drafter else 'alone'}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        # A request that failed is not sent again: the time of both tries would count.
        self.client = HttpClient(f"http://127.0.0.1:{port}", limits=Retries(retries=0, patience=0.0))
        self._await_model()

    def _await_model(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return self.client.ask("/health", None, lambda _: None)
            except ServerError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.close()
                    raise ServerError(f"{self.binary} did not start:\n{tail(self.log)}") from None
            time.sleep(0.05)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids in the model's own vocabulary."""
        return str(self.client.ask("/detokenize", {"tokens": ids}, lambda found: found["content"]))

    def ask(self, prompt: list[int], gamma: int, temperature: float = 0.0, seed: int = 0) -> Answer:
        """Return the continuation of a prompt, and its counts with a drafter of γ tokens per block."""
        self.client.close()  # the server ends a connection that was idle while other processes were asked
        return ask_llama_server(self.client, prompt, Limits(1.0, self.length, []), gamma, temperature, seed)

    def close(self) -> None:
        """Stop the server."""
        self.client.close()
        _end(self.process)


class OpenVino:
    """OpenVINO GenAI in the Python of the serving environment, with a model and a drafter if one is given.

    Raises:
        ServerError: it did not start; the error has the end of its log.
    """

    def __init__(self, python: str, model: str, drafter: str | None, settings: Settings):
        self.length = settings.length
        self.log = settings.logs / f"{Path(model).name}-{'pair' if drafter else 'alone'}.log"
        with self.log.open("wb") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self.process = subprocess.Popen([python, str(OPENVINO)], **pipes)
        shared = {"exact": settings.exact, "threads": settings.threads, "stop_ids": settings.stop_ids}
        self._send(shared | {"target": model, "drafter": drafter})

    def ask(self, prompt: list[int], gamma: int) -> Answer:
        """Return the greedy continuation of a prompt, and its counts with a drafter of γ tokens per block."""
        self._send({"prompt": prompt, "max_new_tokens": self.length, "num_speculative_tokens": gamma})
        return openvino_answer(self._receive())

    def close(self) -> None:
        """Stop the process."""
        _end(self.process)

    def _send(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ServerError(f"OpenVINO ended:\n{tail(self.log)}") from None

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"tokens"'):  # OpenVINO may print other lines
                return dict(json.loads(line))
        self.process.wait()
        raise ServerError(f"OpenVINO ended:\n{tail(self.log)}")


def openvino_answer(found: dict[str, Any]) -> Answer:
    """Return what benchmarks/openvino_client.py says of a text.

    OpenVINO's counter of accepted drafts leaves out each text's last block, so that they are counted here: each target
    call yields one token of its own. Its drafter reads the prompt after the first token, in the time of decoding.
    """
    tokens, calls = found["tokens"], found["target_calls"] - 1
    accepted = len(tokens) - 1 - calls
    return Answer(tokens, len(tokens), found["seconds"], found["decoding_seconds"], calls, found["drafted"], accepted)


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _end(process: "subprocess.Popen[Any]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
