"""The target's distributions at every response token, on disk: its last hidden states.

A hidden state is hidden_size x 2 bytes in bfloat16 against vocabulary x 2 for the logits, and the target's output
embedding turns it back into them: exact up to the rounding of the state. One safetensors file stands beside each shard
of responses, with the states of its rows one after the other.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from drafter.batches import collate, response_sequence
from drafter.models import has_plain_head, hidden_states


def write_cache(
    target: PreTrainedModel,
    rows: list[dict[str, Any]],
    directory: str | Path,
    *,
    dtype: str,
    batch_size: int,
    shard_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Store the states of all response positions, `shard_size` rows a file; files that are there are kept.

    Raises:
        ValueError: the target's logits are not its output embedding of its last hidden state (it scales or caps
            them), or a state is not finite.
    """
    if not has_plain_head(target):
        raise ValueError(
            f"{type(target).__name__} changes its logits after the output embedding (a scale or a soft cap), so "
            f"hidden states cannot stand for them: finetune with the live target (inputs.cache=null)"
        )
    starts = list(range(0, len(rows), shard_size))[rank::world_size]
    mine = [start for start in starts if not _shard_path(directory, start // shard_size).exists()]
    with tqdm(total=shard_size * len(mine), desc="cache", unit="row", disable=rank > 0) as bar:
        for start in mine:
            shard, states = rows[start : start + shard_size], []
            for first in range(0, len(shard), batch_size):
                states.append(response_states(target, shard[first : first + batch_size]).to(getattr(torch, dtype)))
                bar.update(batch_size)
            hidden_NH = torch.cat(states).cpu()
            if not hidden_NH.isfinite().all():
                raise ValueError(f"the target's hidden states of rows {start} to {start + len(shard)} are not finite")
            path = _shard_path(directory, start // shard_size)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            save_file({"hidden": hidden_NH}, temporary)
            temporary.rename(path)


@torch.inference_mode()
def response_states(target: PreTrainedModel, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The states that predict each response token, row after row, shape (N, hidden)."""
    batch = collate([response_sequence(row) for row in rows])
    device = target.device
    hidden_BTH = hidden_states(target, batch.input_ids_BT.to(device), batch.attention_mask_BT.to(device))
    return hidden_BTH[batch.target_mask_BT.to(device)]


class StateReader:
    """Random access to the cached states of a row, by the row's index in the order of the responses."""

    def __init__(self, directory: str | Path, lengths: list[int], shard_size: int):
        """`lengths` are the response lengths of all rows."""
        self.directory, self.shard_size = Path(directory), shard_size
        self.ends = np.cumsum(lengths)
        self.lengths = lengths

    def __getitem__(self, index: int) -> torch.Tensor:
        shard = index // self.shard_size
        before_shard = self.ends[shard * self.shard_size - 1] if shard else 0
        end = int(self.ends[index] - before_shard)
        with safe_open(_shard_path(self.directory, shard), "pt") as file:
            return file.get_slice("hidden")[end - self.lengths[index] : end]


def _shard_path(directory: str | Path, index: int) -> Path:
    return Path(directory) / f"{index:05d}.safetensors"
