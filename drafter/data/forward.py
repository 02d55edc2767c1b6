"""Run a model over a batch in parts of limited size, so that memory does not grow with the longest sequence.

A batch is padded to its longest sequence: one of 8,192 tokens among 20 costs 20 x 8,192 tokens of activations. Here the
sequences are sorted by length and divided into parts of at most `batch_tokens` tokens with padding. In training, the
activations of each part are computed again in the backward pass (torch.utils.checkpoint), so that only one part's exist
at a time. The values and gradients are those of the complete batch, whatever the loss does with them, up to rounding.

Shapes: B sequences, T tokens of the longest (b and t in a part), N selected positions, H hidden size.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from drafter.data.batches import Batch, by_budget
from drafter.models.inspection import hidden_states


def hidden_at(
    model: PreTrainedModel, batch: Batch, selected_BT: torch.Tensor, batch_tokens: int | None = None
) -> torch.Tensor:
    """Return the last hidden states at the selected positions in row-major order, shape (N, H).

    Args:
        model: the model.
        batch: the sequences, padded on the right.
        selected_BT: the mask of the positions, none of which is padding.
        batch_tokens: the most tokens of a forward pass, with padding; a longer sequence is a part of its own. None
            means no limit.
    """
    parts = _parts(model, batch, batch_tokens)
    if len(parts) == 1:
        return hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT)[selected_BT]
    number_BT = (selected_BT.flatten().cumsum(0) - 1).view_as(selected_BT)
    found, order = [], []
    for part in parts:
        selected_bt = selected_BT[part.rows, : part.width] & part.used
        order.append(number_BT[part.rows, : part.width][selected_bt])
        run = partial(_run, model, batch.input_ids_BT[part.rows, : part.width], selected_bt)
        found.append(checkpoint(run, use_reentrant=False) if torch.is_grad_enabled() else run())
    return torch.cat(found)[torch.cat(order).argsort()]


def _run(model: PreTrainedModel, ids_bt: torch.Tensor, selected_bt: torch.Tensor) -> torch.Tensor:
    # Real tokens never attend to the padding on their right. Without a mask, attention's memory is linear in t.
    return hidden_states(model, ids_bt, None)[selected_bt]


class _Part(NamedTuple):
    """The rows of a part, the tokens of its longest row, and whether its result is used."""

    rows: list[int]
    width: int
    used: bool = True


def _parts(model: PreTrainedModel, batch: Batch, batch_tokens: int | None) -> list[_Part]:
    """Divide a batch. If the model is sharded, all ranks have equally many parts, because all run each forward pass.

    A rank that has fewer runs its smallest part again, without using the result.
    """
    count, longest = batch.input_ids_BT.shape
    parts = [_Part(list(range(count)), longest)]
    if batch_tokens is not None and count * longest > batch_tokens:
        lengths = batch.attention_mask_BT.sum(1).tolist()
        parts = [_Part(rows, lengths[rows[-1]]) for rows in by_budget(lengths, batch_tokens)]
    if batch_tokens is not None and any(isinstance(module, FSDPModule) for module in model.modules()):
        most = torch.tensor(len(parts), device=batch.input_ids_BT.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        parts += [parts[0]._replace(used=False)] * (int(most) - len(parts))
    return parts
