"""The distillation set's text: the target answers the instructions (paper, section 2.2).

Requests are sorted by temperature and length and cut into shards, a file each. A shard is written whole or not at all,
and its random numbers depend on the seed and its number alone: an interrupted run goes on with the missing shards, and
any number of ranks writes the same files.
"""

from collections import Counter
from itertools import accumulate
from typing import Any

import pyarrow as pa
import torch

from drafter.artifacts import rows
from drafter.artifacts.storage import Folder
from drafter.data.engines import Engine, Request
from drafter.progress import Report, silent
from drafter.ranks import deal

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("temperature", pa.float32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
    ]
)


def schema(top_p: float) -> pa.Schema:
    """The columns, and how the responses were drawn: what their block efficiency has to know."""
    return COLUMNS.with_metadata({b"top_p": str(top_p).encode()})


def plan(
    instructions: list[dict[str, Any]], prompts: list[list[int]], temperatures: list[float], num_responses: int
) -> list[Request]:
    """Which instruction is answered at which temperature.

    Instructions are taken in turn and temperatures cycle; once every instruction has had its turn, the next round
    gives each of them another temperature.
    """
    requests = []
    for number in range(num_responses):
        index, round_ = number % len(instructions), number // len(instructions)
        row, temperature = instructions[index], temperatures[(index + round_) % len(temperatures)]
        requests.append(Request(row["id"], row["kind"], row["split"], float(temperature), prompts[index], round_))
    return requests


def shards(requests: list[Request], shard_size: int) -> list[list[Request]]:
    """Requests of like temperature and length side by side, cut into shards."""
    ordered = sorted(requests, key=lambda request: (request.temperature, len(request.prompt_ids), request.id))
    return [ordered[start : start + shard_size] for start in range(0, len(ordered), shard_size)]


def write_responses(
    engine: Engine,
    parts: list[list[Request]],
    folder: Folder,
    schema: pa.Schema,
    *,
    stop_ids: list[int],
    known_ids: set[int],
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    writes: bool = True,
    report: Report = silent,
) -> None:
    """Answer the shards that are not complete yet, each on the rank that is free for it, and write them.

    A response with an id that is none of `known_ids`, which both tokenizer and target have, is left out and counted as
    failed, and so is an empty one.
    """
    missing = rows.missing_shards(folder, len(parts))
    ends = list(accumulate((len(parts[number]) for number in missing), initial=0))
    for index, number in deal(missing, world_size):
        torch.manual_seed(seed * 1_000_003 + number)
        written, failed = [], Counter[str]()
        for request, tokens in zip(parts[number], engine(parts[number]), strict=True):
            if not tokens:
                failed["an empty response"] += 1
            elif not known_ids.issuperset(tokens):
                failed["an id that the tokenizer or the target does not have"] += 1
            else:
                ended = tokens[-1] in stop_ids
                written.append({**request._asdict(), "response_ids": tokens, "truncated": not ended})
        notes = {"failed": failed, "truncated": sum(row["truncated"] for row in written)}
        if writes:
            rows.write_shard(folder, number, written, schema, notes)
        report(ends[index + 1], ends[-1], sum(len(row["response_ids"]) for row in written))
