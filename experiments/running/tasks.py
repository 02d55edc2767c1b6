"""The prompts of the tasks, how each task samples, and which of these settings identify an evaluation."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from drafter.artifacts.manifest import read_jsonl
from drafter.data.prompts import encode_prompts
from drafter.decoding.evaluation import Task
from drafter.warping import Sampling
from experiments.running.inputs import plain


def decoding_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings by which the tasks are decoded. The identity of the data covers their prompts."""
    limits = ("temperature", "top_p", "max_new_tokens", "in_domain")
    tasks = {name: {key: how[key] for key in limits} for name, how in plain(cfg.task).items()}
    return {"tasks": tasks, "seed": cfg.seed, "target_dtype": cfg.target.dtype}


def sampling_of(task: str, how: DictConfig, overrides: Mapping[str, Any]) -> Sampling:
    """Return how a task samples: by its own settings, or by `overrides` (evaluate.sampling), which apply to all tasks.

    Raises:
        ValueError: a key is neither temperature nor top_p, or a value is out of its range.
    """
    if unknown := set(overrides) - {"temperature", "top_p"}:
        raise ValueError(f"evaluate.sampling has {sorted(unknown)}; it takes temperature and top_p")
    sampling = Sampling(**{"temperature": how.temperature, "top_p": how.top_p, **overrides})
    if sampling.temperature < 0:
        raise ValueError(f"task.{task}: temperature is {sampling.temperature}, must be 0 (greedy) or above")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"task.{task}: top_p is {sampling.top_p}, must be above 0, at most 1")
    return sampling


def read_tasks(
    cfg: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    per_task: int,
    overrides: Mapping[str, Any],
) -> list[Task]:
    """Return the first `per_task` prompts of every task, encoded and checked, with their sampling (see sampling_of)."""
    every = read_jsonl(f"{cfg.inputs.data}/tasks.jsonl")
    tasks = []
    for name, how in cfg.task.items():
        rows = [row for row in every if row["task"] == name][:per_task]
        encoded = encode_prompts(tokenizer, [row["prompt"] for row in rows], how.max_new_tokens, context)
        sampling = sampling_of(name, how, overrides)
        tasks += [
            Task(name, row["id"], row["prompt"], prompt, how.max_new_tokens, sampling)
            for row, prompt in zip(rows, encoded, strict=True)
        ]
    return tasks
