"""The distillation set's text: the target answers the instructions (paper, section 2.2).

Requests are sorted by temperature and length and cut into shards, one Parquet file each. A shard is written whole or
not at all, and its random numbers depend on the seed and its index alone: an interrupted run goes on with the missing
shards, and any number of ranks writes the same files.
"""

import os
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
    top_p: float,
    max_new_tokens: int,
    stop_ids: list[int],
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Answer this rank's shards (every world_size-th) that are not on disk yet."""
    mine = [i for i in range(rank, len(parts), world_size) if not _shard_path(directory, i).exists()]
    with tqdm(total=sum(len(parts[i]) for i in mine), desc="responses", unit="row", disable=rank > 0) as bar:
        for index in mine:
            torch.manual_seed(seed * 1_000_003 + index)
            rows = []
            for batch in _batches(parts[index], batch_size):
                rows += answer(target, batch, top_p=top_p, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
                bar.update(len(batch))
            _write_parquet(rows, _shard_path(directory, index))


@torch.inference_mode()
def answer(
    target: PreTrainedModel, batch: list[Request], *, top_p: float, max_new_tokens: int, stop_ids: list[int]
) -> list[dict[str, Any]]:
    """One batched generation; all requests of a batch have one temperature. Rows have the fields of SCHEMA."""
    width = max(len(request.prompt_ids) for request in batch)
    padding = stop_ids[0] if stop_ids else 0
    ids = torch.tensor([[padding] * (width - len(row.prompt_ids)) + row.prompt_ids for row in batch])
    mask = torch.tensor([[0] * (width - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in batch])
    temperature = batch[0].temperature
    sampled: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampled if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids or None,
        pad_token_id=padding,
    )
    device = target.device
    output = target.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
    rows = []
    for request, generated in zip(batch, output[:, width:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(generated) if token in stop_ids), None)
        rows.append({**request._asdict(), "response_ids": generated[:end], "truncated": end is None})
    return rows


def read_responses(directory: str | Path) -> list[dict[str, Any]]:
    """Every row, in the order of the shards; see SCHEMA."""
    paths = sorted(Path(directory).glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


def _batches(shard: list[Request], batch_size: int) -> list[list[Request]]:
    by_temperature: dict[float, list[Request]] = {}
    for request in shard:
        by_temperature.setdefault(request.temperature, []).append(request)
    return [
        rows[start : start + batch_size]
        for rows in by_temperature.values()
        for start in range(0, len(rows), batch_size)
    ]


def _shard_path(directory: str | Path, index: int) -> Path:
    return Path(directory) / f"{index:05d}.parquet"


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)
    temporary.rename(path)
