"""Read the prompts of the tasks and how each task samples, and tell which settings identify an evaluation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from drafter.artifacts.manifest import read_jsonl
from drafter.data.conversations import UnusableConversation, read_conversation
from drafter.data.dialogues import TOO_LONG, Continuation, begin, choose_points
from drafter.data.prompts import encode_prompts
from drafter.data.selection import Row
from drafter.decoding.evaluation import Task
from drafter.decoding.options import Adaptive, DecodingOptions
from drafter.metrics import turn_id
from drafter.warping import Sampling
from experiments.running.data_settings import turns_of
from experiments.running.inputs import plain
from experiments.running.turns import Work


def decoding_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings by which the tasks are decoded. The identity of the data covers their prompts.

    top_k is among them only if it limits anything, and turns only for conversations: evaluations without them stay
    valid.
    """
    names = ("temperature", "top_p", "max_new_tokens", "in_domain")
    tasks = {}
    for task, settings in plain(cfg.task).items():
        tasks[task] = {name: settings[name] for name in names}
        if settings.get("top_k"):
            tasks[task]["top_k"] = settings["top_k"]
        if turns := turns_of(task, settings):
            tasks[task]["turns"] = turns
    return {"tasks": tasks, "seed": cfg.seed, "target_dtype": cfg.target.dtype}


def options_of(
    task: str, settings: DictConfig, overrides: Mapping[str, Any], stop_ids: Sequence[int] = ()
) -> DecodingOptions:
    """Return how a task is decoded: by its settings, or by `overrides` (evaluate.sampling), which apply to all tasks.

    Raises:
        ValueError: an override is none of temperature, top_p and top_k, or a value is out of its range.
    """
    if unknown := set(overrides) - set(Sampling._fields):
        raise ValueError(f"evaluate.sampling has {sorted(unknown)}, it takes {', '.join(Sampling._fields)}")
    defaults = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.get("top_k", 0)}
    try:
        return DecodingOptions(settings.max_new_tokens, Sampling(**{**defaults, **overrides}), stop_ids)
    except ValueError as error:
        raise ValueError(f"task.{task}: {error}") from None


def draft_length(gamma: Any, adaptive: DictConfig, key: str) -> int | Adaptive:
    """Return γ as a number, or the adaptive rule for "adaptive".

    Args:
        gamma: the configured value.
        adaptive: the settings of the rule.
        key: the key of the value, for the error.

    Raises:
        ValueError: another word is given.
    """
    if isinstance(gamma, str):
        if gamma != "adaptive":
            raise ValueError(f"{key} has '{gamma}': numbers and 'adaptive' are allowed")
        return Adaptive(**plain(adaptive))
    return gamma


def check_draft_lengths(gammas: Any, key: str) -> None:
    """Check that the values of γ are a list with each once.

    Raises:
        ValueError: they are not; names the key and the value.
    """
    if not isinstance(gammas, list) or not gammas or any(gammas.count(gamma) > 1 for gamma in gammas):
        raise ValueError(f"{key} is {gammas}, must be a list of at least one γ, each once, such as [3]")


def check_tasks(cfg: DictConfig, overrides: Mapping[str, Any]) -> None:
    """Raise ValueError if a task cannot be decoded with its settings (see `options_of` and `turns_of`)."""
    for task, settings in cfg.task.items():
        options_of(task, settings, overrides)
        turns_of(task, settings)


def read_tasks(
    cfg: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    per_task: int,
    stop_ids: Sequence[int],
    overrides: Mapping[str, Any],
    turns_context: int | None = None,
) -> Work:
    """Return the first `per_task` prompts or conversations of every task, encoded, with how they are decoded.

    Args:
        cfg: the command's config.
        tokenizer: the target's tokenizer.
        context: the number of tokens that prompt and answer must fit into.
        per_task: the most prompts per task.
        stop_ids: tokens that end an answer.
        overrides: sampling settings that apply to all tasks (see `options_of`).
        turns_context: the context for conversations, if it differs. What exceeds it is left out and counted.

    Raises:
        ValueError: a prompt exceeds the context, no conversation of a task can be begun, or a task is prepared with
            conversations and its config does not say so.
    """
    every = read_jsonl(f"{cfg.inputs.data}/tasks.jsonl")
    tasks: list[Task] = []
    continuations, left_out = {}, {}
    for name, settings in cfg.task.items():
        rows = [row for row in every if row["task"] == name][:per_task]
        options = options_of(name, settings, overrides, stop_ids)
        turns = turns_of(name, settings)
        if turns is None:
            tasks += single_prompts(name, rows, options, tokenizer, context)
            continue
        room = (turns_context or context) - options.max_new_tokens
        continuations[name] = Continuation(tokenizer, list(stop_ids), room)
        begun, left_out[name] = first_turns(name, rows, options, continuations[name], turns)
        if not begun:
            raise ValueError(f"task.{name} has no conversation that can be begun: {dict(left_out[name])} turns")
        tasks += begun
    return Work(tasks, continuations, left_out)


def single_prompts(
    name: str, rows: Sequence[Row], options: DecodingOptions, tokenizer: PreTrainedTokenizerBase, context: int
) -> list[Task]:
    """Return the prompts of a task whose rows are no conversations."""
    if any("prompt" not in row for row in rows):
        raise ValueError(f"task.{name} was prepared with conversations: give task.{name}.kind=conversations here, too")
    encoded = encode_prompts(tokenizer, [row["prompt"] for row in rows], options.max_new_tokens, context)
    return [Task(name, row["id"], row["prompt"], prompt, options) for row, prompt in zip(rows, encoded, strict=True)]


def first_turns(
    name: str, rows: Sequence[Row], options: DecodingOptions, continuation: Continuation, turns: str
) -> tuple[list[Task], Counter[str]]:
    """Return the first turn of each conversation of a task, and how many turns are left out with it, by reason."""
    tasks, left_out = [], Counter[str]()
    for row in rows:
        conversation = read_conversation(row)
        points = choose_points(conversation, turns)
        try:
            dialogue, prompt = begin(continuation.tokenizer, conversation, points)
        except UnusableConversation as problem:
            left_out[problem.reason] += len(points)
            continue
        if len(prompt) > continuation.room:
            left_out[TOO_LONG] += len(points)
            continue
        turn = conversation.answer_points().index(points[0]) + 1
        message = dialogue.before().asked()[-1]
        tasks.append(Task(name, turn_id(row["id"], turn), message, prompt, options, turn, dialogue))
    return tasks, left_out
