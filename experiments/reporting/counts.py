"""Write the counts behind the tables as one Parquet file: a row for each drafter, task, γ and prompt."""

from collections.abc import Iterable
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from drafter.artifacts.storage import write_file
from drafter.metrics import Counts, conversation_and_turn
from experiments.reporting.results import Evaluation

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("series", "loss", "variant", "weighting")),
        ("seed", pa.int64()),
        ("step", pa.int64()),  # of the finetuning; null: its end
        ("size_ratio", pa.float64()),  # c
        ("task", pa.string()),
        ("in_domain", pa.bool_()),
        ("gamma", pa.string()),  # a number in digits, or "adaptive"
        ("rule", pa.string()),  # the acceptance rule above temperature 0
        ("prompt", pa.string()),
        ("conversation", pa.string()),  # the prompts of one conversation belong together; else the prompt itself
        ("turn", pa.int64()),
        *((name, pa.float64() if kind is float else pa.int64()) for name, kind in get_type_hints(Counts).items()),
    ]
)


def write_counts(path: Path, evaluations: Iterable[Evaluation]) -> None:
    """Write the counts of these evaluations, one row per prompt, from which every ratio in the tables follows.

    The ratio of sums over prompts and seeds is the value in the tables: τ, for example, is the sum of `tokens` divided
    by the sum of `target_calls`. See `identity.DrafterIdentity` for the columns that describe the drafter and
    `metrics.Counts` for the counts. The column `gamma` holds text, because the adaptive draft length has no number.
    Times are null where prompts were decoded side by side.
    """
    rows = [
        {
            **{name: getattr(one.drafter, name) for name in ("series", "loss", "variant", "weighting", "seed", "step")},
            "size_ratio": one.size_ratio,
            "task": task,
            "in_domain": task in one.in_domain,
            "gamma": str(gamma),
            "rule": one.rule,
            "prompt": prompt,
            **dict(zip(("conversation", "turn"), conversation_and_turn(prompt), strict=True)),
            **{name: None if np.isnan(value) else value for name, value in counts._asdict().items()},
        }
        for one in evaluations
        for (task, gamma, prompt), counts in one.counts.items()
    ]
    content = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), content)
    write_file(path, content.getvalue().to_pybytes())
