"""Read the prompts of the tasks and how each task samples, and tell which settings identify an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from drafter.artifacts.manifest import read_jsonl
from drafter.data.prompts import encode_prompts
from drafter.decoding.evaluation import Task
from drafter.decoding.options import DecodingOptions
from drafter.warping import Sampling
from experiments.running.inputs import plain


def decoding_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings by which the tasks are decoded. The identity of the data covers their prompts.

    top_k is among them only if it limits anything: evaluations without it stay valid.
    """
    names = ("temperature", "top_p", "max_new_tokens", "in_domain")
    tasks = {}
    for task, settings in plain(cfg.task).items():
        tasks[task] = {name: settings[name] for name in names}
        if settings.get("top_k"):
            tasks[task]["top_k"] = settings["top_k"]
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


def check_tasks(cfg: DictConfig, overrides: Mapping[str, Any]) -> None:
    """Raise ValueError if a task cannot be decoded with its settings (see `options_of`)."""
    for task, settings in cfg.task.items():
        options_of(task, settings, overrides)


def read_tasks(
    cfg: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    per_task: int,
    stop_ids: Sequence[int],
    overrides: Mapping[str, Any],
) -> list[Task]:
    """Return the first `per_task` prompts of every task, encoded, with the options by which they are decoded.

    Args:
        cfg: the command's config.
        tokenizer: the target's tokenizer.
        context: the number of tokens that prompt and answer must fit into.
        per_task: the most prompts per task.
        stop_ids: tokens that end an answer.
        overrides: sampling settings that apply to all tasks (see `options_of`).
    """
    every = read_jsonl(f"{cfg.inputs.data}/tasks.jsonl")
    tasks = []
    for name, settings in cfg.task.items():
        rows = [row for row in every if row["task"] == name][:per_task]
        encoded = encode_prompts(tokenizer, [row["prompt"] for row in rows], settings.max_new_tokens, context)
        options = options_of(name, settings, overrides, stop_ids)
        tasks += [
            Task(name, row["id"], row["prompt"], prompt, options) for row, prompt in zip(rows, encoded, strict=True)
        ]
    return tasks
