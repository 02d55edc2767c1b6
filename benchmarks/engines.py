r"""Measure wall-clock time in llama-server or OpenVINO GenAI with and without the drafter, alternating in one run.

    python -m benchmarks.engines --engine llama-server --binary PATH --tokenizer DIR --target TARGET.gguf \
        --drafter DRAFTER.gguf --prompts FILE.jsonl --gammas 3 5 8 --length 128 --repeats 3 --threads 2 --out DIR
    python -m benchmarks.engines --engine openvino --python .venv-serving/bin/python --tokenizer DIR --target DIR \
        --drafter DIR --prompts FILE.jsonl …

docs/SERVING.md says how the models are converted. Each row of the prompts has a `prompt` (or messages) and may have a
`task`; results are reported for each task and for all prompts. The chat template of --tokenizer, the target's
directory, is applied here, and both engines get token ids.

The target alone, the drafter alone and the pair (for llama-server one with each γ) run side by side, and one request is
under way at a time: each prompt goes to all of them in turn, in another order from prompt to prompt and from repeat to
repeat. Decoding is greedy. llama-server's options get their names from its own --help; its least probability of a
draft is set to 0, so that it drafts γ tokens per block whatever the drafter's confidence. With --exact, the engines
compute in float32 with a float32 key-value cache; without it they have their own defaults.

DIR gets engines-ENGINE.json (every measurement with its text, and the summaries) and the table, as Markdown and LaTeX,
after each repeat. benchmarks/engine_counts.py says what the columns are.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engine_counts import ALL, Measurement, record, summarise, summary_record, table
from benchmarks.engine_processes import LlamaServer, OpenVino, Settings
from drafter.artifacts.manifest import read_jsonl, write_json
from drafter.data.conversations import UnusableConversation, opening
from drafter.data.http_client import ServerError
from drafter.data.prompts import encode_prompt
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import context_limit, load_tokenizer
from experiments.running.engine_answers import Answer

SAMPLE = "A sentence whose ids must be the same text in both vocabularies: café, 1,234.5 and naïve λ."


class Prompt(NamedTuple):
    """A prompt in the chat template."""

    name: str
    task: str
    ids: list[int]


class Decoder(NamedTuple):
    """A way to decode: "target" or "drafter" alone, or "pair" with a gamma; `ask` sends a prompt to its process."""

    name: str
    gamma: int
    ask: Callable[[list[int], int], Answer]


def main() -> None:
    """Measure, print the table, and write it with all measurements."""
    arguments = parse(sys.argv[1:])
    prompts = read_prompts(arguments)
    settings = settings_of(arguments, prompts, max(arguments.gammas), arguments.exact)
    measurements: list[Measurement] = []
    try:
        with ExitStack() as stack:
            decoders = start(arguments, settings, stack)
            for decoder in decoders:  # the first request allocates
                decoder.ask(prompts[0].ids, decoder.gamma)
            for repeat in range(arguments.repeats):
                measurements += one_pass(decoders, prompts, repeat)
                write(arguments, measurements)
                print(f"repeat {repeat + 1} of {arguments.repeats}, {len(prompts)} prompts", flush=True)
    except ServerError as problem:
        raise SystemExit(f"{problem}\nThe logs are in {settings.logs}") from None
    found = table(arguments.engine, summarise(measurements))
    print(f"\n{found.title}\n\n{found.markdown()}")


def settings_of(arguments: argparse.Namespace, prompts: Sequence[Prompt], gamma: int, exact: bool) -> Settings:
    """Return what the processes of a measurement share, and make the folder of their logs.

    Raises:
        SystemExit: the longest prompt, its text and a block of γ drafts do not fit into the target's context.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    context = longest + arguments.length + gamma + 2
    if context > (limit := context_limit(arguments.tokenizer)):
        raise SystemExit(f"the longest prompt has {longest} tokens: with --length it needs {context} of {limit} tokens")
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    stops = end_of_turn_ids(arguments.tokenizer, load_tokenizer(arguments.tokenizer))
    return Settings(arguments.threads, context, arguments.length, exact, stops, logs)


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Return the arguments. A wrong one ends the program with a sentence that names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("llama-server", "openvino"), required=True)
    parser.add_argument("--binary", default="llama-server", help="llama-server's binary")
    parser.add_argument("--python", default=".venv-serving/bin/python", help="a Python that has openvino_genai")
    parser.add_argument("--tokenizer", required=True, help="the target's directory, with its tokenizer and config")
    for name in ("target", "drafter"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="a GGUF file, or a directory for OpenVINO")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `prompt` and perhaps `task`")
    parser.add_argument("--count", type=int, help="how many of the prompts, evenly spaced; all if left out")
    parser.add_argument("--gammas", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--length", type=int, default=128, help="the most tokens of a text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="float32 everywhere, to compare texts")
    parser.add_argument("--out", type=Path, default=Path("engines"))
    found = parser.parse_args(given)
    check_small(parser, found, {"count": 1, "length": 2, "repeats": 1, "threads": 1})
    if min(found.gammas) < 1:
        parser.error(f"--gammas are {found.gammas}, must be at least 1: the target alone is measured in any case")
    found.gammas = sorted(set(found.gammas))
    for name in ("target", "drafter", "prompts"):
        path = check_exists(parser, found, name)
        if name != "prompts" and not is_model(path, found.engine):
            what = "GGUF file" if found.engine == "llama-server" else "directory with an openvino_model.xml"
            parser.error(f"--{name} is '{path}', must be a {what}: docs/SERVING.md says how to convert a model")
    program, option = (found.binary, "binary") if found.engine == "llama-server" else (found.python, "python")
    if not shutil.which(program):
        parser.error(f"--{option} is '{program}', which is not an installed command")
    return found


def check_small(parser: argparse.ArgumentParser, found: argparse.Namespace, least: Mapping[str, int]) -> None:
    """End the program if an argument is below the least value that it may have."""
    for name, smallest in least.items():
        if (value := getattr(found, name)) is not None and value < smallest:
            parser.error(f"--{name} is {value}, must be at least {smallest}")


def check_exists(parser: argparse.ArgumentParser, found: argparse.Namespace, name: str) -> Path:
    """Return the path that an argument gives. End the program if nothing is there."""
    path: Path = getattr(found, name)
    if not path.exists():
        parser.error(f"--{name.replace('_', '-')} is '{path}', which does not exist")
    return path


def is_model(path: Path, engine: str) -> bool:
    """Return whether an engine can load what lies at a path."""
    return path.is_file() if engine == "llama-server" else (path / "openvino_model.xml").exists()


def check_vocabulary(arguments: argparse.Namespace, sample: list[int], text: Callable[[list[int]], str]) -> None:
    """Check that a converted model has the tokenizer's vocabulary, because it gets token ids.

    Args:
        arguments: of the command.
        sample: token ids, which should not be control tokens.
        text: decodes ids in the converted model's vocabulary.

    Raises:
        SystemExit: the two decode the sample differently.
    """
    ours = load_tokenizer(arguments.tokenizer).decode(sample, clean_up_tokenization_spaces=False)
    if ours.strip() != (theirs := text(sample)).strip():
        raise SystemExit(
            f"--tokenizer {arguments.tokenizer} is not that of --target {arguments.target}: the same ids are "
            f"{ours[:60]!r} and {theirs[:60]!r}"
        )


def read_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """Return the prompts of the file, or some of them, as token ids.

    Raises:
        SystemExit: the file has no row, or a row has no prompt.
    """
    tokenizer = load_tokenizer(arguments.tokenizer)
    rows = list(enumerate(read_jsonl(arguments.prompts), start=1))
    if arguments.count is not None and arguments.count < len(rows):
        rows = [rows[number * len(rows) // arguments.count] for number in range(arguments.count)]
    found = []
    for number, row in rows:
        try:
            ids = encode_prompt(tokenizer, opening(row))
        except UnusableConversation as problem:
            raise SystemExit(f"line {number} of {arguments.prompts} has no prompt: {problem}") from None
        found.append(Prompt(str(number), row.get("task") or ALL, ids))
    if not found:
        raise SystemExit(f"{arguments.prompts} has no prompts")
    return found


def start(arguments: argparse.Namespace, settings: Settings, stack: ExitStack) -> list[Decoder]:
    """Start the processes of all decoders, which the stack ends.

    Raises:
        ServerError: a process did not start.
        SystemExit: the target has another vocabulary than the tokenizer.
    """
    target, drafter = str(arguments.target), str(arguments.drafter)
    sample = load_tokenizer(arguments.tokenizer)(SAMPLE, add_special_tokens=False)["input_ids"]

    def openvino(model: str, with_drafter: str | None = None) -> OpenVino:
        process = OpenVino(arguments.python, model, with_drafter, settings)
        stack.callback(process.close)
        return process

    def llama(model: str, with_drafter: str | None = None, gamma: int = 0) -> LlamaServer:
        process = LlamaServer(arguments.binary, model, with_drafter, gamma, settings)
        stack.callback(process.close)
        return process

    if arguments.engine == "openvino":  # one process has every gamma
        check_vocabulary(arguments, sample, load_tokenizer(target).decode)
        alone = [Decoder("target", 0, openvino(target).ask), Decoder("drafter", 0, openvino(drafter).ask)]
        ask = openvino(target, drafter).ask
        return alone + [Decoder("pair", gamma, ask) for gamma in arguments.gammas]
    first = llama(target)
    check_vocabulary(arguments, sample, first.decode)
    alone = [Decoder("target", 0, first.ask), Decoder("drafter", 0, llama(drafter).ask)]
    return alone + [Decoder("pair", gamma, llama(target, drafter, gamma).ask) for gamma in arguments.gammas]


def one_pass(decoders: Sequence[Decoder], prompts: Sequence[Prompt], repeat: int) -> Iterator[Measurement]:
    """Yield what each prompt gives by each decoder, one request after the other."""
    for number, prompt in enumerate(prompts):
        for decoder in turn(decoders, number + repeat):
            answer = decoder.ask(prompt.ids, decoder.gamma)
            yield Measurement(prompt.name, prompt.task, repeat, decoder.name, decoder.gamma, answer)


def turn(decoders: Sequence[Decoder], number: int) -> Iterator[Decoder]:
    """Yield all decoders, beginning with another one for each number, and in the reverse order for odd ones."""
    first = number % len(decoders)
    found = [*decoders[first:], *decoders[:first]]
    yield from reversed(found) if number % 2 else found


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a command's arguments as JSON has them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}


def write(arguments: argparse.Namespace, measurements: Sequence[Measurement]) -> None:
    """Write the measurements so far, and their table."""
    summaries = summarise(measurements)
    rows = {"summaries": list(map(summary_record, summaries)), "measurements": list(map(record, measurements))}
    write_json(arguments.out / f"engines-{arguments.engine}.json", {"arguments": described(arguments), **rows})
    table(arguments.engine, summaries).write(arguments.out)


if __name__ == "__main__":
    main()
