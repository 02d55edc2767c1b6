"""The distillation set's text: the target answers the instructions (paper, section 2.2).

Requests are sorted by temperature and length and cut into shards, one Parquet file each. A shard is written whole or
not at all, and its random numbers depend on the seed and its index alone: an interrupted run goes on with the missing
shards, and any number of ranks writes the same files.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

SCHEMA = pa.schema(
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


class Request(NamedTuple):
    """One answer asked of the target; `split` is "train" or "validation"."""

    id: str
    kind: str
    split: str
    temperature: float
    prompt_ids: list[int]


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
        requests.append(Request(row["id"], row["kind"], row["split"], float(temperature), prompts[index]))
    return requests


def shards(requests: list[Request], shard_size: int) -> list[list[Request]]:
    """Requests of like temperature and length side by side, cut into shards."""
    ordered = sorted(requests, key=lambda request: (request.temperature, len(request.prompt_ids), request.id))
    return [ordered[start : start + shard_size] for start in range(0, len(ordered), shard_size)]


def write_responses(
    target: PreTrainedModel,
    parts: list[list[Request]],
    directory: str | Path,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    **how: Any,
) -> None:
    """Answer this rank's shards (every world_size-th) that are not on disk yet; `how` goes to `answer`."""
    mine = [i for i in range(rank, len(parts), world_size) if not _shard_path(directory, i).exists()]
    with tqdm(total=sum(len(parts[i]) for i in mine), desc="responses", unit="row", disable=rank > 0) as bar:
        for index in mine:
            torch.manual_seed(seed * 1_000_003 + index)
            rows = answer(target, parts[index], bar.update, **how)
            _write_parquet(rows, _shard_path(directory, index))


def answer(
    target: PreTrainedModel,
    requests: list[Request],
    advance: Callable[[int], Any] = lambda finished: None,
    *,
    top_p: float,
    max_new_tokens: int,
    stop_ids: list[int],
    batch_size: int,
    first_round: int = 16,
) -> list[dict[str, Any]]:
    """Batched generation in rounds of 16, 32, 64 … tokens; rows have the fields of SCHEMA.

    A batch runs until its longest answer ends, and most answers are short: after each round the unfinished ones are
    gathered into new, full batches, which costs reading their text again.
    """
    answers: list[list[int]] = [[] for _ in requests]
    pending, round_ = list(range(len(requests))), first_round
    while pending:
        room = min(round_, max_new_tokens - len(answers[pending[0]]))  # all pending ones are equally long
        for batch in _batches(requests, pending, batch_size):
            contexts = [requests[i].prompt_ids + answers[i] for i in batch]
            grown = _generate(target, contexts, requests[batch[0]].temperature, top_p, room, stop_ids)
            for i, tokens in zip(batch, grown, strict=True):
                answers[i] += tokens
        ended = [i for i in pending if answers[i][-1] in stop_ids or len(answers[i]) == max_new_tokens]
        advance(len(ended))
        pending, round_ = sorted(set(pending) - set(ended)), 2 * round_
    return [
        {**request._asdict(), "response_ids": tokens, "truncated": tokens[-1] not in stop_ids}
        for request, tokens in zip(requests, answers, strict=True)
    ]


@torch.inference_mode()
def _generate(
    target: PreTrainedModel,
    contexts: list[list[int]],
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    stop_ids: list[int],
) -> list[list[int]]:
    """What follows each context, up to its first stop token (which is part of it)."""
    width = max(map(len, contexts))
    padding = stop_ids[0] if stop_ids else 0
    ids = torch.tensor([[padding] * (width - len(context)) + context for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    sampled: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampled if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids or None,
        pad_token_id=padding,
    )
    device = target.device
    output = target.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
    grown = output[:, width:].tolist()
    return [tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), None)] for tokens in grown]


def read_responses(directory: str | Path) -> list[dict[str, Any]]:
    """Every row, in the order of the shards; see SCHEMA."""
    paths = sorted(Path(directory).glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


def _batches(requests: list[Request], indices: list[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of one temperature each, contexts of like length side by side."""
    by_temperature: dict[float, list[int]] = {}
    for index in indices:
        by_temperature.setdefault(requests[index].temperature, []).append(index)
    return [
        group[start : start + batch_size]
        for group in by_temperature.values()
        for start in range(0, len(group), batch_size)
    ]


def _shard_path(directory: str | Path, index: int) -> Path:
    return Path(directory) / f"{index:05d}.parquet"


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)
    temporary.rename(path)
