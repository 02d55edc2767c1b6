"""Write the responses of the distillation set: the target answers the instructions (paper, section 2.2).

Requests are sorted by length and divided into shards, one file each. A shard is written completely or
not at all, and its random numbers depend only on its number and the seed. An interrupted run therefore continues with
the missing shards, and any number of ranks writes the same files.
"""

from collections import Counter
from typing import Any, NamedTuple

import pyarrow as pa

from drafter.artifacts import rows
from drafter.artifacts.storage import Folder
from drafter.data.dealing import deal_missing
from drafter.data.dialogues import Continuation, Dialogue, answer, rows_of
from drafter.data.engines import Request
from drafter.data.states import StatesEngine
from drafter.data.target_cache import ExactFormat
from drafter.progress import Report, silent

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("temperature", pa.float32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("turns", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
    ]
)


def schema(top_p: float, states: str | None = None) -> pa.Schema:
    """Return the columns of the responses, with the top-p of their sampling, which finetuning reads for validation.

    With `states`, a dtype, there is the column of an exact cache. It is empty in rows whose states were not kept.
    """
    columns = [*COLUMNS, *([ExactFormat(states).field()] if states else [])]
    return pa.schema(columns, {b"top_p": str(top_p).encode()})


class Instruction(NamedTuple):
    """An instruction to be answered: its row, the conversation to be answered at its points, and the first prompt."""

    row: dict[str, Any]
    dialogue: Dialogue
    prompt_ids: list[int]


def plan(instructions: list[Instruction], temperatures: list[float], num_responses: int) -> list[Request]:
    """Return `num_responses` requests, with the temperature of each.

    Instructions are taken in order, and the temperatures cycle. After all instructions have been used, the next round
    gives each of them another temperature.
    """
    requests = []
    for number in range(num_responses):
        index, round_ = number % len(instructions), number // len(instructions)
        row, dialogue, prompt_ids = instructions[index]
        temperature = float(temperatures[(index + round_) % len(temperatures)])
        requests.append(Request(row["id"], row["kind"], row["split"], temperature, prompt_ids, round_, dialogue))
    return requests


def shards(requests: list[Request], shard_size: int) -> list[list[Request]]:
    """Sort requests by length, and divide them into shards. Those of one prompt follow each other: it is read once."""
    ordered = sorted(requests, key=lambda request: (len(request.prompt_ids), request.id, request.repetition))
    return [ordered[start : start + shard_size] for start in range(0, len(ordered), shard_size)]


def write_responses(
    engine: StatesEngine,
    parts: list[list[Request]],
    folder: Folder,
    schema: pa.Schema,
    *,
    following: Continuation,
    known_ids: set[int],
    seed: int,
    world_size: int = 1,
    writes: bool = True,
    report: Report = silent,
) -> None:
    """Generate and write the shards that are not complete yet, each on the next free rank.

    Responses that fail, and turns that are left out, are counted by reason; see `dialogues.answer`.
    """
    for number, tell in deal_missing(folder, [len(part) for part in parts], seed, world_size, report):
        answered = answer(engine, parts[number], following, known_ids)
        written = [row for one in answered for row in rows_of(one, following.stop_ids)]
        notes: dict[str, Any] = {
            "failed": Counter(one.failure for one in answered if one.failure),
            "truncated": sum(row["truncated"] for row in written),
            "cut_in_thinking": sum(following.is_cut_in_thinking(turn) for one in answered for turn in one.turns),
            "answers": sum(len(one.turns) for one in answered),
            "turns_left_out": sum((one.left_out for one in answered), Counter[str]()),
        }
        if "hidden" in schema.names:
            notes["with_states"] = sum(len(row["hidden"]) > 0 for row in written)
        if writes:
            rows.write_shard(folder, number, written, schema, notes)
        tell(len(parts[number]), sum(len(row["response_ids"]) for row in written))
