"""Decode prompts with the target alone and with each drafter, count the tokens, and show the blocks as text."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from drafter.decoding.decoders import plain_model
from drafter.decoding.drafting import Drafter, models_of
from drafter.decoding.generation import Decoded
from drafter.decoding.options import Adaptive, DecodingOptions
from drafter.decoding.speculative import (
    autoregressive_decode,
    autoregressive_decode_batch,
    speculative_decode,
    speculative_decode_batch,
)
from drafter.metrics import TIMES, answer_positions, by_label, by_position, count
from drafter.models.loading import context_length


class Task(NamedTuple):
    """One prompt of a task, and how it is decoded.

    Attributes:
        name: the task's name.
        prompt_id: the prompt's id in the prepared data; for a later turn of a conversation see metrics.turn_id.
        message: the user's last message as text.
        prompt: the prompt's token ids, in the chat template.
        options: how it is decoded.
        turn: the number of the answer in its conversation, from 1 on.
        dialogue: the conversation, if it has more turns (see data.dialogues.Dialogue).
    """

    name: str
    prompt_id: str
    message: str
    prompt: list[int]
    options: DecodingOptions
    turn: int = 1
    dialogue: Any = None

    @property
    def is_greedy(self) -> bool:
        """Return whether the prompt is decoded at temperature 0."""
        return self.options.sampling.temperature == 0

    def by_rule(self, rules: Sequence[str]) -> dict[str, DecodingOptions]:
        """Return the options for each acceptance rule; for the first alone at temperature 0, where all are the same."""
        return {rule: replace(self.options, rule=rule) for rule in (rules[:1] if self.is_greedy else rules)}

    def random(self, device: torch.device, seed: int, use: str = "") -> torch.Generator:
        """Return a generator that depends on the prompt, the seed and its use alone, not on what else is decoded."""
        return torch.Generator(device).manual_seed(zlib.crc32(f"{self.prompt_id}:{use}".encode()) + seed)


class Evaluated(NamedTuple):
    """The row of counts.jsonl for one prompt, drafter and gamma, and the decoding that it counts."""

    row: dict[str, Any]
    decoded: Decoded


class Decodings(NamedTuple):
    """The target's own decoding of a prompt, and the results of each drafter, by path, in the order of the gammas."""

    baseline: Decoded
    by_drafter: dict[str, list[Evaluated]]


def fits(task: Task, drafter: Drafter) -> bool:
    """Return whether a turn fits into a drafter's context. Other prompts were checked when they were read."""
    needed = len(task.prompt) + task.options.max_new_tokens
    return task.dialogue is None or all(needed <= context_length(plain_model(model)) for model in models_of(drafter))


def decode(
    task: Task,
    target: PreTrainedModel,
    drafters: dict[str, Drafter],
    gammas: Mapping[int | str, int | Adaptive],
    seed: int,
    rules: Sequence[str] = ("ratio",),
) -> Decodings:
    """Decode one prompt with the target alone, once, and with each drafter that it fits, at each gamma, by each rule.

    Args:
        task: the prompt.
        target: the target.
        drafters: the drafters by path; the last part of a path enters the seed of its random numbers.
        gammas: gamma by its name in the rows.
        seed: the run's seed.
        rules: the acceptance rules (see decoding.acceptance).

    """
    baseline = autoregressive_decode(target, task.prompt, task.options, task.random(target.device, seed))
    found: dict[str, list[Evaluated]] = {path: [] for path in drafters}
    for path, drafter in drafters.items():
        for gamma, num_speculative_tokens in gammas.items() if fits(task, drafter) else ():
            for rule, options in task.by_rule(rules).items():
                generator = task.random(target.device, seed, use(path, gamma))
                decoded = speculative_decode(target, drafter, task.prompt, num_speculative_tokens, options, generator)
                found[path].append(Evaluated(row_of(task, gamma, rule, decoded, baseline), decoded))
    return Decodings(baseline, found)


def decode_side_by_side(
    tasks: Sequence[Task],
    target: PreTrainedModel,
    drafters: dict[str, Drafter],
    gammas: Mapping[int | str, int | Adaptive],
    seed: int,
    rules: Sequence[str] = ("ratio",),
) -> list[Decodings]:
    """Decode several prompts of the same options in one batch, with the target alone and as `decode` does.

    Each prompt has the random numbers of `decode`, and therefore its texts and counts, unless rounding decides between
    nearly equal values. The rows have no times: those of a batch are not those of a single user.

    Args:
        tasks: the prompts.
        target: the target.
        drafters: see `decode`.
        gammas: see `decode`.
        seed: see `decode`.
        rules: see `decode`.

    Raises:
        ValueError: a model cannot decode side by side (see capabilities.check_side_by_side).
    """
    prompts = [task.prompt for task in tasks]
    baselines = autoregressive_decode_batch(
        target, prompts, tasks[0].options, [task.random(target.device, seed) for task in tasks]
    )
    found = [Decodings(baseline, {path: [] for path in drafters}) for baseline in baselines]
    for path, drafter in drafters.items():
        fitting = [number for number, task in enumerate(tasks) if fits(task, drafter)]
        asked = [prompts[number] for number in fitting]
        for gamma, num_speculative_tokens in gammas.items() if fitting else ():
            for rule, options in tasks[0].by_rule(rules).items():
                generators = [tasks[number].random(target.device, seed, use(path, gamma)) for number in fitting]
                decoded = speculative_decode_batch(target, drafter, asked, num_speculative_tokens, options, generators)
                for number, one in zip(fitting, decoded, strict=True):
                    row = row_of(tasks[number], gamma, rule, one, baselines[number]) | dict.fromkeys(TIMES)
                    found[number].by_drafter[path].append(Evaluated(row, one))
    return found


def use(path: str, gamma: int | str) -> str:
    """Return what a drafter's decoding at one gamma draws its random numbers for (see Task.random)."""
    return f"{Path(path).name} {gamma}"


def row_of(task: Task, gamma: int | str, rule: str, decoded: Decoded, baseline: Decoded) -> dict[str, Any]:
    """Return the row of counts.jsonl for one decoding.

    It names the acceptance rule unless that is `ratio`, or the temperature is 0, where the row holds for every rule. It
    has the number of drafts by a model only where others were drafted without one.
    """
    counts = count(decoded, baseline)
    by_model = {} if decoded.drafted_by_model == counts.drafted else {"drafted_by_model": decoded.drafted_by_model}
    return {
        "task": task.name,
        "gamma": gamma,
        **({} if rule == "ratio" or task.is_greedy else {"rule": rule}),
        "prompt": task.prompt_id,
        "turn": task.turn,
        **counts._asdict(),
        **by_model,
        "by_position": by_position(decoded.blocks),
        "by_answer_position": by_label(decoded.blocks, answer_positions(len(decoded.tokens))),
        "greedy": task.is_greedy,
        "like_the_target": decoded.tokens == baseline.tokens,
        "message": task.message,
    }


def as_text(decoded: Decoded, tokenizer: Any) -> list[dict[str, Any]]:
    """Return each block as pieces of text: the accepted drafts, the first rejected draft, and the bonus token."""
    blocks = []
    for block in decoded.blocks:
        accepted, bonus = block.emitted[: block.accepted], block.emitted[block.accepted :]
        rejected = block.drafted[block.accepted : block.tested] if bonus else []
        blocks.append(
            {
                "accepted": [tokenizer.decode([token]) for token in accepted],
                "rejected": [tokenizer.decode([token]) for token in rejected],
                "bonus": [tokenizer.decode([token]) for token in bonus],
            }
        )
    return blocks
