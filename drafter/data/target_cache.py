"""Provide the target's distribution at every response token: computed live, or read from disk in one of two formats.

`ExactFormat` stores the last hidden states, hidden_size numbers per token. The output embedding turns them into logits
that are exact up to rounding. It also stores log Z, so that a few of the logits are probabilities without the others,
and the most likely token. `SparseFormat` stores the most likely tokens and samples from the rest (see
distributions.Sparse). It takes hundreds of bytes per token whatever the size of the target, and sums over the
vocabulary in the losses stay unbiased. Both formats hold distributions at temperature 1 without top-p. A row of the
cache is a row of the responses with the columns of the format added.

Shapes: B sequences, T tokens, N response tokens, H the target's hidden size, V vocabulary, K tokens per position.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedModel

from drafter.artifacts import rows
from drafter.artifacts.manifest import ArtifactError, read_manifest, require
from drafter.artifacts.storage import Folder
from drafter.data.batches import Batch, States, by_budget, collate, next_tokens, response_mask, response_sequence
from drafter.data.columns import number_column, to_array, to_tensor
from drafter.data.dealing import deal_missing
from drafter.data.forward import hidden_at
from drafter.data.states import has_states, without_states
from drafter.losses.chunked import CHUNK_ENTRIES, Head, chunk_rows
from drafter.losses.distributions import Drawn, Sparse, Target
from drafter.models.inspection import has_plain_head, vocabulary_rows
from drafter.models.loading import OutputEmbedding, embedding_checksum
from drafter.progress import Report, silent
from drafter.warping import double

Logits = Callable[[slice], torch.Tensor]  # rows of the N positions -> (n, V)


class ExactFormat(NamedTuple):
    """Store the target's last hidden states in `dtype`, and what `normalise` returns."""

    dtype: str = "bfloat16"

    def field(self) -> pa.Field:
        """Return the column of the states, which responses may have already (see `states`)."""
        return number_column("hidden", self.dtype)

    def fields(self, vocabulary: int) -> list[pa.Field]:
        """Return the columns that the format adds to those of the responses."""
        return [self.field(), number_column("log_z", "float32"), pa.field("top", pa.list_(pa.int32()))]

    def columns(self, hidden_NH: torch.Tensor | None, logits: Logits, tokens_N: torch.Tensor) -> dict[str, Any]:
        """Return the states of N positions, to which `write_cache` adds the other columns."""
        if hidden_NH is None:
            raise ValueError(
                "this target changes its logits after the output embedding (by a scale or a soft cap), so they cannot "
                "be computed from hidden states: use cache=sparse, or the live target (inputs.cache=null)"
            )
        return {"hidden": to_array(hidden_NH, self.dtype)}


class SparseFormat(NamedTuple):
    """Store the `top_k` most likely tokens, `num_samples` draws from the others, and log-probabilities in `dtype`."""

    top_k: int = 32
    num_samples: int = 40
    dtype: str = "float16"

    def fields(self, vocabulary: int) -> list[pa.Field]:
        """Return the columns that the format adds to those of the responses; ids take two bytes where possible."""
        if not (0 < self.top_k < vocabulary and self.num_samples > 0):
            raise ValueError(
                f"cache.format has top_k={self.top_k} and num_samples={self.num_samples} for {vocabulary} tokens: "
                f"both must be above 0, and top_k below the vocabulary"
            )
        ids = pa.uint16() if vocabulary <= 2**16 else pa.int32()
        k = {b"top_k": str(self.top_k).encode()}
        return [
            pa.field("ids", pa.list_(ids), metadata=k),
            *(number_column(name, self.dtype) for name in ("log_q", "log_rest")),
        ]

    def columns(self, hidden_NH: torch.Tensor | None, logits: Logits, tokens_N: torch.Tensor) -> dict[str, Any]:
        """Return what is stored for N positions: one array of shape (N, …) per column.

        The last entry of `log_q` is the log-probability of the response's token, whose id the row has already.
        """
        parts, one_V = [], logits(slice(0, 1))
        step = max(1, CHUNK_ENTRIES.get(one_V.device.type, CHUNK_ENTRIES["cuda"]) // one_V.shape[-1])
        for start in range(0, len(tokens_N), step):
            logits_nV = logits(slice(start, start + step)).float()
            _require_finite(logits_nV, "logits")
            parts.append(Drawn.from_logits(logits_nV, tokens_N[start : start + step], self.top_k, self.num_samples))
        drawn = Drawn.cat(parts)
        return {
            "ids": drawn.ids_NK[:, :-1].cpu().numpy(),
            "log_q": to_array(drawn.log_q_NK, self.dtype),
            "log_rest": to_array(drawn.log_rest_N, self.dtype),
        }


Format = ExactFormat | SparseFormat


def restore(row: rows.Row, schema: pa.Schema) -> States | Drawn | None:
    """Return the target's states or sparse distributions from a row of a cache; None for a row of responses.

    Columns are found by name. An earlier version wrote a `log_z` without `top`, whose rounding is unknown: it is not
    used.
    """
    count = len(row["response_ids"])
    if "hidden" in row:
        states = States(to_tensor(row, schema, "hidden").reshape(count, -1))
        if not {"log_z", "top"} <= row.keys():
            return states
        return states._replace(
            log_z_N=to_tensor(row, schema, "log_z"), top_N=torch.from_numpy(row["top"].astype(np.int64))
        )
    if "ids" not in row:
        return None
    ids_NK = np.concatenate([row["ids"].reshape(count, -1), row["response_ids"][:, None]], axis=1, dtype=np.int64)
    return Drawn(
        torch.from_numpy(ids_NK),
        to_tensor(row, schema, "log_q").reshape(count, -1),
        to_tensor(row, schema, "log_rest"),
        int(schema.field("ids").metadata[b"top_k"]),
    )


def format_kind(directory: str) -> str:
    """Return the kind of a finished cache's format: "exact" or "sparse".

    Raises:
        ArtifactError: an earlier version of this project made the cache.
    """
    kind: str | None = read_manifest(directory, "cache")["settings"]["format"].get("kind")
    if kind is None:
        raise ArtifactError(f"{directory} does not say of which kind its format is: make it again with this version")
    return kind


def require_output_embedding(directory: str, embedding: nn.Module) -> None:
    """Refuse an exact cache whose hidden states belong to another output embedding. A sparse cache needs none.

    Raises:
        ArtifactError: the embeddings differ; names the cache and both checksums.
    """
    if format_kind(directory) == "exact":
        found = read_manifest(directory, "cache")["counts"].get("output_embedding")
        require(directory, "output embedding", found, embedding_checksum(embedding))


def write_cache(
    target: PreTrainedModel | OutputEmbedding,
    responses: rows.Rows,
    folder: Folder,
    format: Format,
    *,
    batch_tokens: int,
    shard_size: int,
    seed: int,
    world_size: int = 1,
    writes: bool = True,
    report: Report = silent,
    take_states: bool = False,
) -> tuple[int, pa.Schema]:
    """Store the distributions at all response positions, in files of `shard_size` rows. Keep files that are complete.

    A file depends only on its number and the seed, so that any number of ranks writes the same files. With
    `take_states`, states that the responses have are taken as they are, and the target runs over the other rows alone.
    If all rows have states, its output embedding is enough. An exact cache that an earlier version began is completed
    without the columns that its files lack.

    Returns:
        The number of files and the schema of the rows, both for `rows.finish`.

    Raises:
        ValueError: a hidden state or a logit is not finite, or the format does not suit the target.
        ArtifactError: a row's states are not those of its response.
    """
    head: Any = target.get_output_embeddings()
    _require_finite(head.weight, "output embedding")
    required = not isinstance(target, PreTrainedModel)  # there is nothing to compute missing states with
    plain_head = not required and has_plain_head(target)
    starts = range(0, len(responses), shard_size)
    begun = rows.begun_schema(folder, len(starts))
    added = [field for field in format.fields(vocabulary_rows(target)) if begun is None or field.name in begun.names]
    schema = pa.schema([*without_states(responses.schema), *added], responses.schema.metadata)
    precise = Head.from_module(head).precise() if "top" in schema.names else None
    sizes = [min(shard_size, len(responses) - start) for start in starts]
    for number, tell in deal_missing(folder, sizes, seed, world_size, report):
        shard, undecided = responses[starts[number] : starts[number] + shard_size], []
        asked = [row for row in shard if not (take_states and has_states(row, responses, head, required))]
        lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in asked]
        for batch in by_budget(lengths, batch_tokens):
            for i, columns in zip(batch, _rows(target, [asked[i] for i in batch], format, plain_head), strict=True):
                asked[i] |= {name: array.reshape(-1) for name, array in columns.items()}
                if "log_rest" in columns:
                    undecided += np.exp(double(to_tensor(asked[i], schema, "log_rest")).numpy()).tolist()
            tell(len(batch), sum(lengths[i] for i in batch))
        if precise is not None:
            for row in shard:
                row |= normalise(to_tensor(row, schema, "hidden").reshape(len(row["response_ids"]), -1), precise)
        taken = len(shard) - len(asked)
        if taken:
            tell(taken, 0)
        if writes:
            notes = {"undecided_mass": sum(undecided), **({"taken": taken} if take_states else {})}
            rows.write_shard(folder, number, shard, schema, notes)
    return len(starts), schema


@torch.inference_mode()
def _rows(
    target: PreTrainedModel, chosen: list[rows.Row], format: Format, plain_head: bool
) -> list[dict[str, np.ndarray]]:
    """Return the format's columns for each row, from one forward pass over all rows."""
    batch = collate([response_sequence(row) for row in chosen]).uncached(target.device)
    hidden_NH, logits = live_target(target, batch, plain_head)
    if hidden_NH is not None:
        _require_finite(hidden_NH, f"hidden states for the responses {[row['id'] for row in chosen]}")
    tokens_N = next_tokens(batch)[batch.target_mask_BT]
    columns = format.columns(hidden_NH, logits, tokens_N)
    ends = np.cumsum([len(row["response_ids"]) for row in chosen])[:-1]
    parts = {name: np.split(array, ends) for name, array in columns.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(chosen))]


@torch.inference_mode()
def normalise(hidden_NH: torch.Tensor, head: Head) -> dict[str, np.ndarray]:
    """Return log Z and the most likely token at N positions, from the states as the cache stores them.

    log Z is the logsumexp of the logits at temperature 1. With a `Head.precise`, it belongs to a target of any dtype.
    Of several most likely tokens the first is taken.

    Raises:
        ValueError: a logit is not finite.
    """
    device, vocabulary = head.weight_VH.device, len(head.weight_VH)
    log_z, top = [], []
    for hidden_nH in hidden_NH.split(chunk_rows(device, vocabulary)):
        logits_nV = head(hidden_nH.to(device))
        log_z.append(logits_nV.logsumexp(-1))
        top.append(logits_nV.argmax(-1))
    _require_finite(torch.cat(log_z), "logits")
    return {"log_z": to_array(torch.cat(log_z), "float32"), "top": torch.cat(top).int().cpu().numpy()}


@torch.no_grad()
def live_target(
    target: PreTrainedModel, batch: Batch, plain_head: bool, batch_tokens: int | None = None
) -> tuple[torch.Tensor | None, Logits]:
    """Run the target. Return hidden states (N, H), and a function of a slice of the N positions to their logits.

    Forward passes have at most `batch_tokens` tokens (see `forward.hidden_at`). If the target changes its logits after
    its output embedding (`plain_head` is false), its hidden states are None and the logits of all positions are
    computed at once, in one pass.
    """
    rows_B, head = ~batch.is_text_B, target.get_output_embeddings()
    if not rows_B.any():  # all ranks must run a sharded target: run it on one packed text, whose output is masked out
        rows_B = torch.arange(len(rows_B), device=rows_B.device) == 0
    mask_BT = response_mask(batch)[rows_B]
    batch = batch._replace(input_ids_BT=batch.input_ids_BT[rows_B], attention_mask_BT=batch.attention_mask_BT[rows_B])
    if not plain_head:
        ids_BT, attention_BT = batch.input_ids_BT, batch.attention_mask_BT
        logits_NV = target(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits[mask_BT]
        return None, lambda rows: logits_NV[rows]
    hidden_NH = hidden_at(target, batch, mask_BT, batch_tokens)
    return hidden_NH, lambda rows: head(hidden_NH[rows]).detach()


def target_at(
    target: PreTrainedModel | OutputEmbedding,
    batch: Batch,
    plain_head: bool = True,
    batch_tokens: int | None = None,
) -> Callable[[slice], Target]:
    """Return a function of a slice of the N response positions to the target's distributions, cached or live.

    Cached states may lie on another device than the target, which gives the logits.
    """
    cached = batch.cached_N
    if isinstance(cached, Sparse):
        return cached.__getitem__
    if cached is None and isinstance(target, PreTrainedModel):
        return live_target(target, batch, plain_head, batch_tokens)[1]
    head = Head.from_module(target.get_output_embeddings())
    # A batch of packed text alone has no positions.
    hidden_NH = head.weight_VH[:0] if cached is None else cached.hidden_NH
    return lambda rows: head(hidden_NH[rows].to(head.weight_VH.device)).detach()


def _require_finite(values: torch.Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise ValueError(
            f"the target's {what}: not finite. Check that its weights are complete, and try target.dtype=float32"
        )
