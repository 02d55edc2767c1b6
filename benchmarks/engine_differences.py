r"""List where the texts of an engine differ with and without the drafter, and how nearly equal the two tokens are.

    python -m benchmarks.engine_differences --engines engines/engines-openvino.json … --prompts FILE.jsonl \
        --target runs/smollm2/target

--engines are files that `benchmarks.engines` wrote, and --prompts is the file that it was given. Of each prompt whose
texts differ, the target in float32 computes the log-probabilities of both tokens at the first position that differs,
where the text before is the same. If rounding alone made the difference, the two are nearly equal. A line also says
whether the two tokens are the two most likely ones.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.engine_counts import Measurement, pairs
from benchmarks.engines import check_exists
from drafter.artifacts.manifest import read_jsonl
from drafter.data.conversations import opening
from drafter.data.prompts import encode_prompt
from drafter.models.loading import load_target, load_tokenizer
from experiments.reporting.tabular import Table
from experiments.running.engine_answers import Answer

LogProbabilities = Callable[[list[int]], torch.Tensor]  # token ids -> those of the next token, shape (V,)
COLUMNS = ["task", "prompt", "γ", "token", "log-probability gap", "the two most likely"]


class Difference(NamedTuple):
    """The first position in which two greedy texts of a prompt differ.

    Attributes:
        task: the prompt's task.
        prompt: the prompt's id, which is its row in the file, counted from 1.
        gammas: the draft lengths with this very difference.
        position: of the token, counted from 0; all tokens before are the same.
        alone: the token of the target alone.
        drafted: the token with the drafter.
        shared: the tokens before.
    """

    task: str
    prompt: str
    gammas: list[int]
    position: int
    alone: int
    drafted: int
    shared: list[int]


def main() -> None:
    """Print a table for each engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, nargs="+", required=True, help="files of benchmarks.engines")
    parser.add_argument("--prompts", type=Path, required=True, help="the file that benchmarks.engines was given")
    parser.add_argument("--target", required=True, help="the target's directory")
    arguments = parser.parse_args()
    check_exists(parser, arguments, "prompts")
    tokenizer, target = load_tokenizer(arguments.target), load_target(arguments.target)
    rows = enumerate(read_jsonl(arguments.prompts), start=1)
    prompts = {str(number): encode_prompt(tokenizer, opening(row)) for number, row in rows}

    def log_probabilities(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return target(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].log_softmax(-1)

    for path in arguments.engines:
        found = differences(read_measurements(path))
        print(f"\n{differences_table(path.stem, found, prompts, log_probabilities).markdown()}", flush=True)


def read_measurements(path: Path) -> list[Measurement]:
    """Return the measurements in a file of `benchmarks.engines`."""
    rows = json.loads(path.read_text(encoding="utf-8"))["measurements"]
    return [Measurement(**row | {"answer": Answer(**row["answer"])}) for row in rows]


def differences(measurements: Sequence[Measurement]) -> list[Difference]:
    """Return the first differences of all prompts, in the order of the tasks.

    A text that is the beginning of the other one has no token there, and is left out.
    """
    tasks = {one.prompt: one.task for one in measurements}
    found: dict[tuple[str, int, int, int], Difference] = {}
    for gamma in sorted({one.gamma for one in measurements if one.decoder == "pair"}):
        for pair in pairs(measurements, gamma):
            position = pair.first_difference()
            drafted, alone = pair.drafted.tokens, pair.alone.tokens
            if position is None or position >= min(len(drafted), len(alone)):
                continue
            key = pair.prompt, position, alone[position], drafted[position]
            one = Difference(tasks[pair.prompt], pair.prompt, [], *key[1:], shared=alone[:position])
            if gamma not in (known := found.setdefault(key, one)).gammas:
                known.gammas.append(gamma)
    order = list(dict.fromkeys(tasks.values()))
    return sorted(found.values(), key=lambda one: (order.index(one.task), int(one.prompt), one.position))


def differences_table(
    name: str, found: Iterable[Difference], prompts: dict[str, list[int]], log_probabilities: LogProbabilities
) -> Table:
    """Return the table of differences, of which each has the gap of its two tokens.

    Args:
        name: the engine's.
        found: the differences.
        prompts: the prompt's token ids by its id.
        log_probabilities: computes those of the target.
    """
    rows = []
    for one in found:
        values = log_probabilities([*prompts[one.prompt], *one.shared])
        likely = set(values.topk(2).indices.tolist()) == {one.alone, one.drafted}
        gap = float(values[one.alone] - values[one.drafted])
        gammas = ", ".join(map(str, one.gammas))
        rows.append([one.task, one.prompt, gammas, str(one.position), f"{gap:+.3f}", "yes" if likely else "no"])
    note = (
        "The gap is the log-probability of the token that the target alone wrote, minus that of the token with the "
        "drafter, both by the target in float32."
    )
    return Table(f"differences-{name}", f"First differences in {name}", COLUMNS, rows, note)


if __name__ == "__main__":
    main()
