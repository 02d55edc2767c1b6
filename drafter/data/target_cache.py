"""The target's distributions at every response token: live, or from disk in one of two formats.

`ExactFormat` keeps the last hidden states, hidden_size numbers a token, which the output embedding turns into logits:
exact up to their rounding. `SparseFormat` keeps the most likely tokens and samples from the rest (see
distributions.Sparse): hundreds of bytes a token whatever the target's size, and what the losses sum up stays unbiased.
Both are of temperature 1, never warped. A row of the cache is a row of the responses with these columns beside.

Shapes: B sequences, T tokens, N response tokens, H the target's hidden size, V vocabulary, K tokens a position.
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
from drafter.data.batches import Batch, by_budget, collate, next_tokens, response_mask, response_sequence
from drafter.losses.chunked import CHUNK_ENTRIES, Head
from drafter.losses.distributions import Drawn, Sparse, Target
from drafter.models.inspection import has_plain_head, hidden_states, vocabulary_rows
from drafter.models.loading import OutputEmbedding, embedding_checksum
from drafter.progress import Report, silent
from drafter.ranks import deal
from drafter.warping import double

STORED = {"bfloat16": pa.uint16(), "float16": pa.float16(), "float32": pa.float32()}
Logits = Callable[[slice], torch.Tensor]  # rows of the N positions -> (n, V)


class ExactFormat(NamedTuple):
    """The target's last hidden states, in `dtype`."""

    dtype: str = "bfloat16"

    def fields(self, vocabulary: int) -> list[pa.Field]:
        """The columns beside those of the responses."""
        return [_field("hidden", self.dtype)]

    def columns(self, hidden_NH: torch.Tensor | None, logits: Logits, tokens_N: torch.Tensor) -> dict[str, Any]:
        """What is stored of N positions: an array (N, …) a column."""
        if hidden_NH is None:
            raise ValueError(
                "this target changes its logits after the output embedding (a scale or a soft cap), so hidden states "
                "cannot stand for them: use cache=sparse, or the live target (inputs.cache=null)"
            )
        return {"hidden": _stored(hidden_NH, self.dtype)}


class SparseFormat(NamedTuple):
    """`top_k` tokens and `num_samples` draws from the others, their log-probabilities, and log Z, in `dtype`."""

    top_k: int = 32
    num_samples: int = 40
    dtype: str = "float16"

    def fields(self, vocabulary: int) -> list[pa.Field]:
        """The columns beside those of the responses; ids take two bytes where they can."""
        if not (0 < self.top_k < vocabulary and self.num_samples > 0):
            raise ValueError(
                f"cache.format has top_k={self.top_k} and num_samples={self.num_samples} for {vocabulary} tokens: "
                f"both must be above 0, and top_k below the vocabulary"
            )
        ids = pa.uint16() if vocabulary <= 2**16 else pa.int32()
        k = {b"top_k": str(self.top_k).encode()}
        return [
            pa.field("ids", pa.list_(ids), metadata=k),
            *(_field(name, self.dtype) for name in ("log_q", "log_rest", "log_z")),
        ]

    def columns(self, hidden_NH: torch.Tensor | None, logits: Logits, tokens_N: torch.Tensor) -> dict[str, Any]:
        """What is stored of N positions: an array (N, …) a column. The own token's log-probability is log_q's last."""
        parts, one_V = [], logits(slice(0, 1))
        step = max(1, CHUNK_ENTRIES.get(one_V.device.type, CHUNK_ENTRIES["cuda"]) // one_V.shape[-1])
        for start in range(0, len(tokens_N), step):
            logits_nV = logits(slice(start, start + step)).float()
            _refuse_not_finite(logits_nV, "logits")
            drawn = Drawn.from_logits(logits_nV, tokens_N[start : start + step], self.top_k, self.num_samples)
            parts.append((*drawn[:-1], logits_nV.logsumexp(-1)))
        ids_NK, log_q_NK, log_rest_N, log_z_N = (torch.cat(part) for part in zip(*parts, strict=True))
        return {
            "ids": ids_NK[:, :-1].cpu().numpy(),
            "log_q": _stored(log_q_NK, self.dtype),
            "log_rest": _stored(log_rest_N, self.dtype),
            "log_z": _stored(log_z_N, self.dtype),
        }


Format = ExactFormat | SparseFormat


def restore(row: rows.Row, schema: pa.Schema) -> torch.Tensor | Drawn | None:
    """What a sample brings of the target, from a row of a cache; from a row of responses, None."""
    count = len(row["response_ids"])
    if "hidden" in row:
        return _restored(row, schema, "hidden").reshape(count, -1)
    if "ids" not in row:
        return None
    ids_NK = np.concatenate([row["ids"].reshape(count, -1), row["response_ids"][:, None]], axis=1, dtype=np.int64)
    return Drawn(
        torch.from_numpy(ids_NK),
        _restored(row, schema, "log_q").reshape(count, -1),
        _restored(row, schema, "log_rest"),
        int(schema.field("ids").metadata[b"top_k"]),
    )


def format_kind(directory: str) -> str:
    """Return the kind of a finished cache's format: "exact" or "sparse".

    Raises:
        ArtifactError: the cache was made before formats had a kind.
    """
    kind: str | None = read_manifest(directory, "cache")["settings"]["format"].get("kind")
    if kind is None:
        raise ArtifactError(f"{directory} does not say of which kind its format is: make it again with this version")
    return kind


def require_output_embedding(directory: str, embedding: nn.Module) -> None:
    """Refuse an exact cache whose hidden states belong to another output embedding; a sparse one needs none.

    Raises:
        ArtifactError: names the cache, and both checksums.
    """
    if format_kind(directory) == "exact":
        found = read_manifest(directory, "cache")["counts"].get("output_embedding")
        require(directory, "output embedding", found, embedding_checksum(embedding))


def write_cache(
    target: PreTrainedModel,
    responses: rows.Rows,
    folder: Folder,
    format: Format,
    *,
    batch_tokens: int,
    shard_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    writes: bool = True,
    report: Report = silent,
) -> tuple[int, pa.Schema]:
    """Store the distributions of all response positions, `shard_size` rows a file; files that are there are kept.

    A file depends on the seed and its number alone, so that any number of ranks writes the same. Returns the number of
    files, and the schema, for rows.finish.

    Raises:
        ValueError: a hidden state or logit is not finite, or the format does not suit the target.
    """
    _refuse_not_finite(target.get_output_embeddings().weight, "output embedding")
    plain_head = has_plain_head(target)
    schema = pa.schema([*responses.schema, *format.fields(vocabulary_rows(target))], responses.schema.metadata)
    starts = range(0, len(responses), shard_size)
    missing = rows.missing_shards(folder, len(starts))
    total = sum(min(shard_size, len(responses) - starts[number]) for number in missing)
    for index, number in deal(missing, world_size):
        shard = responses[starts[number] : starts[number] + shard_size]
        torch.manual_seed(seed * 1_000_003 + number)
        undecided, done = [], shard_size * index
        lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in shard]
        for batch in by_budget(lengths, batch_tokens):
            for i, columns in zip(batch, _rows(target, [shard[i] for i in batch], format, plain_head), strict=True):
                shard[i] |= {name: array.reshape(-1) for name, array in columns.items()}
                if "log_rest" in columns:
                    undecided += np.exp(double(_restored(shard[i], schema, "log_rest")).numpy()).tolist()
            done += len(batch)
            report(done, total, sum(lengths[i] for i in batch))
        if writes:
            rows.write_shard(folder, number, shard, schema, {"undecided_mass": sum(undecided)})
    return len(starts), schema


@torch.inference_mode()
def _rows(
    target: PreTrainedModel, chosen: list[rows.Row], format: Format, plain_head: bool
) -> list[dict[str, np.ndarray]]:
    """The format's columns of each row, from one forward over all of them."""
    batch = Batch(*(part.to(target.device) for part in collate([response_sequence(row) for row in chosen])[:-1]))
    hidden_NH, logits = live_target(target, batch, plain_head)
    if hidden_NH is not None:
        _refuse_not_finite(hidden_NH, f"hidden states for the responses {[row['id'] for row in chosen]}")
    tokens_N = next_tokens(batch)[batch.target_mask_BT]
    columns = format.columns(hidden_NH, logits, tokens_N)
    ends = np.cumsum([len(row["response_ids"]) for row in chosen])[:-1]
    parts = {name: np.split(array, ends) for name, array in columns.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(chosen))]


@torch.no_grad()
def live_target(target: PreTrainedModel, batch: Batch, plain_head: bool) -> tuple[torch.Tensor | None, Logits]:
    """Hidden states (N, H) and logits at a slice of the N response places, from one forward of the target.

    A target that changes its logits after its output embedding (`plain_head` False) makes them all at once, and its
    hidden states are None.
    """
    rows_B, head = ~batch.is_text_B, target.get_output_embeddings()
    if not rows_B.any():  # a target that is split over ranks needs them all, so that a text stands in, and is not used
        rows_B = torch.arange(len(rows_B), device=rows_B.device) == 0
    ids_BT, attention_BT = batch.input_ids_BT[rows_B], batch.attention_mask_BT[rows_B]
    mask_BT = response_mask(batch)[rows_B]
    if not plain_head:
        logits_NV = target(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits[mask_BT]
        return None, lambda rows: logits_NV[rows]
    hidden_NH = hidden_states(target, ids_BT, attention_BT)[mask_BT]
    return hidden_NH, lambda rows: head(hidden_NH[rows]).detach()


def target_at(
    target: PreTrainedModel | OutputEmbedding, batch: Batch, plain_head: bool = True
) -> Callable[[slice], Target]:
    """The target's distributions at a slice of the N response places: cached ones, or live."""
    cached = batch.cached_N
    if isinstance(cached, Sparse):
        return cached.__getitem__
    if cached is None and isinstance(target, PreTrainedModel):
        return live_target(target, batch, plain_head)[1]
    head = Head.from_module(target.get_output_embeddings())
    hidden_NH = head.weight_VH[:0] if cached is None else cached  # a batch of texts has none
    return lambda rows: head(hidden_NH[rows]).detach()


def _refuse_not_finite(values: torch.Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise ValueError(
            f"the target's {what}: not finite. See that its weights are whole, and try target.dtype=float32"
        )


def _field(name: str, dtype: str) -> pa.Field:
    if dtype not in STORED:
        raise ValueError(f"cache.format.dtype is '{dtype}', must be one of {', '.join(STORED)}")
    return pa.field(name, pa.list_(STORED[dtype]), metadata={b"dtype": dtype.encode()})


def _stored(values: torch.Tensor, dtype: str) -> np.ndarray:
    """An array of the dtype; bfloat16, which numpy and Arrow lack, by its bits."""
    values = values.to(getattr(torch, dtype)).cpu()
    return values.view(torch.uint16).numpy() if dtype == "bfloat16" else values.numpy()


def _restored(row: rows.Row, schema: pa.Schema, name: str) -> torch.Tensor:
    values = torch.from_numpy(np.array(row[name]))  # a copy: what was read may not be written to
    return values.view(torch.bfloat16) if schema.field(name).metadata[b"dtype"] == b"bfloat16" else values
