"""Faster products with few rows on a CPU, from weights that are packed for them.

A product of a few rows with a weight matrix reads the whole matrix, and its time should hardly depend on the number of
rows. That of PyTorch's default way does, up to several times; with packed weights it does not. Up to three rows the
default is the faster one. For four it is MKL's packed weights, which serve one number of rows alone, and for more it is
oneDNN's. Such products are most of the time of decoding on a CPU, side by side or with a drafter.

The packed weights are copies, so that the model takes up to three times its memory. Logits differ by rounding.
"""

from collections.abc import Container
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

SMALLEST = 2**24  # parameters: in smaller models, other work takes most of the time of a call
LARGEST = 2**30  # parameters: a copy of larger models might not fit into memory
ROWS = range(4, 97)  # the numbers of rows for which packed weights were faster wherever this was measured
BLOCK_ROWS = 4  # the number of rows that MKL's weights are packed for: a block with three drafts


def pack(model: nn.Module, rows: Container[int] = ROWS) -> nn.Module:
    """Pack the linear layers of a frozen model in float32 on a CPU, in place, and return the model.

    Nothing is done to any other model, to one that is packed, or where oneDNN is missing. Do not change the weights
    afterwards.

    Args:
        model: the model.
        rows: the numbers of rows for which the packed weights are used.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return model
    # A layer with a `forward` of its own is packed already.
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    if not SMALLEST <= sum(layer.weight.numel() for layer in layers) <= LARGEST or not all(map(_can_be_packed, layers)):
        return model
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, None)
        of_block = None
        if torch.backends.mkl.is_available() and BLOCK_ROWS in rows:
            of_block = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight, BLOCK_ROWS)
        layer.forward = partial(_linear, layer, packed, of_block, rows)  # type: ignore[method-assign]
    return model


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not weight.requires_grad
        and not isinstance(weight, DTensor)  # a part of a weight that is split over ranks
    )


def _linear(
    layer: nn.Linear, packed: torch.Tensor, of_block: torch.Tensor | None, rows: Container[int], values: torch.Tensor
) -> torch.Tensor:
    """Return what the layer returns."""
    count = values.numel() // layer.in_features
    if count not in rows or torch.is_grad_enabled():
        return F.linear(values, layer.weight, layer.bias)
    if of_block is not None and count == BLOCK_ROWS:
        found: torch.Tensor = torch.ops.mkl._mkl_linear(values, of_block, layer.weight, layer.bias, BLOCK_ROWS)
    else:
        found = torch.ops.mkldnn._linear_pointwise(values, packed, layer.bias, "none", [], "")
    return found
