"""Divide the counts of a prompt's decoding into parts: by turn, by role, and by position in the answer."""

from typing import Any, NamedTuple

Gamma = int | str  # "adaptive"


class Part(NamedTuple):
    """The counts of a part of one prompt's decoding: a turn, the tokens of one role, or a range of positions.

    Attributes:
        kind: what the decoding is divided by: "turn", "role" or "position".
        label: which turn, role or range it is.
        gamma: the draft length.
        task: the task.
        prompt: the prompt's id.
        tokens: generated tokens.
        target_calls: calls of the target.
    """

    kind: str
    label: str
    gamma: Gamma
    task: str
    prompt: str
    tokens: int
    target_calls: int


def parts_of(row: dict[str, Any]) -> list[Part]:
    """Return the parts of a row of counts.jsonl, as far as it has them."""
    divided = {"role": row.get("by_role", {}), "position": row.get("by_answer_position", {})}
    if "turn" in row:
        divided["turn"] = {str(row["turn"]): (row["tokens"], row["target_calls"])}
    return [
        Part(kind, label, row["gamma"], row["task"], row["prompt"], *counts)
        for kind, counts_by_label in divided.items()
        for label, counts in counts_by_label.items()
    ]
