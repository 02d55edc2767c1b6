"""One prompt of a task: decoded by the target alone and with each drafter, counted, and shown as text.

Shapes: none; a decoded text is a list of token ids, and a block the tokens of one of the target's calls.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from drafter.decoding.speculative import Adaptive, Decoded, autoregressive_decode, speculative_decode
from drafter.metrics import by_position, count
from drafter.warping import Sampling


class Task(NamedTuple):
    """One prompt of a task, and how it is decoded."""

    name: str
    prompt_id: str
    message: str
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling

    def random(self, device: torch.device, seed: int, use: str = "") -> torch.Generator:
        """Random numbers of its own for each use, whatever else is decoded in the same run."""
        return torch.Generator(device).manual_seed(zlib.crc32(f"{self.prompt_id}:{use}".encode()) + seed)


def decode(
    task: Task,
    target: PreTrainedModel,
    drafters: dict[str, PreTrainedModel],
    stops: list[int],
    gammas: Mapping[int | str, int | Adaptive],
    seed: int,
) -> dict[str, list[tuple[dict[str, Any], Decoded]]]:
    """One prompt: the baseline once, then each drafter at each gamma. Rows of counts, with what they count."""
    how = task.max_new_tokens, task.sampling, stops
    baseline = autoregressive_decode(target, task.prompt, *how, task.random(target.device, seed))
    found: dict[str, list[tuple[dict[str, Any], Decoded]]] = {path: [] for path in drafters}
    for path, drafter in drafters.items():
        for gamma, drafts in gammas.items():
            generator = task.random(target.device, seed, f"{Path(path).name} {gamma}")
            decoded = speculative_decode(target, drafter, task.prompt, drafts, *how, generator)
            row = {
                "task": task.name,
                "gamma": gamma,
                "prompt": task.prompt_id,
                **count(decoded, baseline)._asdict(),
                "by_position": by_position(decoded.blocks),
                "greedy": task.sampling.temperature == 0,
                "like_the_target": decoded.tokens == baseline.tokens,
                "message": task.message,
            }
            found[path].append((row, decoded))
    return found


def as_text(decoded: Decoded, tokenizer: Any) -> list[dict[str, Any]]:
    """Each block as pieces of text: accepted drafts, the first rejected draft, and the target's own token."""
    blocks = []
    for block in decoded.blocks:
        accepted, own = block.emitted[: block.accepted], block.emitted[block.accepted :]
        rejected = block.drafted[block.accepted : block.tested] if own else []
        blocks.append(
            {
                "accepted": [tokenizer.decode([token]) for token in accepted],
                "rejected": [tokenizer.decode([token]) for token in rejected],
                "own": [tokenizer.decode([token]) for token in own],
            }
        )
    return blocks
