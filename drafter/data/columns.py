"""Store tensors of numbers in Arrow columns, in any of three dtypes."""

import numpy as np
import pyarrow as pa
import torch

from drafter.artifacts import rows

ARROW_TYPES = {"bfloat16": pa.uint16(), "float16": pa.float16(), "float32": pa.float32()}


def number_column(name: str, dtype: str) -> pa.Field:
    """Return a list column of numbers of a dtype, which its metadata name.

    Raises:
        ValueError: the dtype is none of `ARROW_TYPES`.
    """
    if dtype not in ARROW_TYPES:
        raise ValueError(f"cache.format.dtype is '{dtype}', must be one of {', '.join(ARROW_TYPES)}")
    return pa.field(name, pa.list_(ARROW_TYPES[dtype]), metadata={b"dtype": dtype.encode()})


def to_array(values: torch.Tensor, dtype: str) -> np.ndarray:
    """Return an array of the dtype. numpy and Arrow lack bfloat16, whose bits are returned as uint16."""
    values = values.to(getattr(torch, dtype)).cpu()
    return values.view(torch.uint16).numpy() if dtype == "bfloat16" else values.numpy()


def to_tensor(row: rows.Row, schema: pa.Schema, name: str) -> torch.Tensor:
    """Return the values of a column of a row as a flat tensor of the dtype."""
    values = torch.from_numpy(np.array(row[name]))  # a copy, because Arrow's buffers are read-only
    return values.view(torch.bfloat16) if schema.field(name).metadata[b"dtype"] == b"bfloat16" else values
