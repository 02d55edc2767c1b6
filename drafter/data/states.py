"""Keep the target's last hidden states while it generates responses, so that an exact cache needs no pass of its own.

A token is drawn from the output embedding of the last hidden state at the position before it. This is what the exact
format of `target_cache` stores for the token. A forward pass over the finished response gives the same state up to
rounding, because attention is causal.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedModel

from drafter.artifacts import rows
from drafter.artifacts.manifest import MANIFEST, ArtifactError, read_manifest
from drafter.artifacts.storage import Folder
from drafter.data.columns import to_array, to_tensor
from drafter.data.engines import Failure, Limits, Request, generate_side_by_side, transformers_engine
from drafter.decoding.capabilities import check_side_by_side
from drafter.decoding.side_by_side import Generated
from drafter.models.inspection import has_plain_head

StatesEngine = Callable[[list[Request]], Sequence[list[int] | Failure | Generated]]  # any `engines.Engine` is one


def states_engine(
    target: PreTrainedModel, limits: Limits, batch_tokens: int, dtype: str, requests: list[Request]
) -> StatesEngine:
    """Return an engine that generates as `engines.transformers_engine` does, and keeps the states in `dtype`.

    Later turns of a conversation may be too long to be generated side by side; their states are not kept.

    Args:
        target: the target.
        limits: how responses are sampled, and where they end.
        batch_tokens: the most tokens of a batch, padding included.
        dtype: one of `columns.ARROW_TYPES`.
        requests: all first turns, which are checked here.

    Raises:
        ValueError: the target's logits are not those of its hidden states, or it cannot generate side by side.
    """
    require_plain_head(target)
    try:
        check_side_by_side(target, max(len(request.prompt_ids) for request in requests) + limits.max_new_tokens)
    except ValueError as problem:
        raise ValueError(f"respond.states={dtype} needs generation side by side, give null: {problem}") from problem
    plain_engine = transformers_engine(target, limits, batch_tokens)

    def generate(part: list[Request]) -> Sequence[list[int] | Failure | Generated]:
        found = generate_side_by_side(target, part, limits, batch_tokens, getattr(torch, dtype))
        return plain_engine(part) if found is None else found

    return generate


def require_plain_head(target: PreTrainedModel) -> None:
    """Refuse a target whose states are of no use. It may be on the meta device.

    Raises:
        ValueError: the target changes its logits after the output embedding.
    """
    if not has_plain_head(target):
        raise ValueError(
            f"respond.states: {type(target).__name__} changes its logits after the output embedding (by a scale or a "
            f"soft cap), so they cannot be computed from hidden states: give respond.states=null"
        )


def without_states(schema: pa.Schema) -> pa.Schema:
    """Return the columns of responses without that of the target's states."""
    return pa.schema([field for field in schema if field.name != "hidden"], schema.metadata)


def copy_without_states(directory: str | Path, out: Folder) -> None:
    """Copy a finished set of responses without the column of the target's states. Its identity stays the same.

    Raises:
        ArtifactError: the set is not finished, or a file of it is damaged.
    """
    responses, manifest = rows.Rows(directory, "respond"), read_manifest(directory, "respond")
    schema, count = without_states(responses.schema), len(manifest["files"]) - 1  # the index is a file, too
    start = 0
    for number in range(count):
        length = len(rows.read_shard(responses.folder, number))
        rows.write_shard(out, number, responses.read(range(start, start + length)), schema, {})
        start += length
    manifest["files"], _ = rows.finish(out, count, schema)
    if "with_states" in manifest["counts"]:
        manifest["counts"]["with_states"] = 0
    out.write(MANIFEST, json.dumps(manifest, indent=1).encode())


def states_column(parts: Sequence[torch.Tensor | None]) -> np.ndarray | list[float]:
    """Return the column `hidden` of a row from the states of its responses; nothing if they are not complete."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return []
    return to_array(torch.cat(known), str(known[0].dtype).removeprefix("torch.")).reshape(-1)


def has_states(row: rows.Row, responses: rows.Rows, head: nn.Linear, required: bool) -> bool:
    """Return whether a row of responses has states.

    Args:
        row: the row.
        responses: the set that it was read from.
        head: the target's output embedding.
        required: refuse a row that has none.

    Raises:
        ArtifactError: they are not as many as the tokens of the responses, or not finite.
    """
    states, count, width = to_tensor(row, responses.schema, "hidden"), len(row["response_ids"]), head.weight.shape[1]
    if not len(states) and not required:
        return False
    if len(states) != count * width or not states.isfinite().all():
        raise ArtifactError(
            f"{responses.folder}: the row '{row['id']}' has {count} response tokens, and its column 'hidden' has "
            f"{len(states)} numbers instead of {width} finite ones for each: make the responses again"
        )
    return True
