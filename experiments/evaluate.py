"""Stage 4: decode the tasks' prompts with each drafter, beside the autoregressive baseline. Config: conf/evaluate.yaml.

One directory a drafter, so that a new drafter costs its own evaluation alone; and in each the baseline runs between the
drafter's own decodings, prompt by prompt, so that a ratio of token rates is of one machine at one time.
"""

import logging
import zlib
from glob import glob
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm
from transformers import PreTrainedModel

from drafter.artifacts import (
    MANIFEST,
    ArtifactError,
    Stage,
    model_fingerprint,
    read_jsonl,
    read_manifest,
    write_jsonl,
)
from drafter.metrics import count
from drafter.models import (
    check_same_vocabulary,
    check_same_width,
    context_length,
    load_target,
    load_tokenizer,
    num_parameters,
)
from drafter.prompts import encode_prompts, stop_ids
from drafter.ranks import join
from drafter.speculative import Decoded, Sampling, autoregressive_decode, check_decoding, speculative_decode
from experiments.inputs import data_fingerprint, plain, target_fingerprint

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate every drafter that has not been."""
    check(cfg)
    shared = {"data": data_fingerprint(cfg), "target": target_fingerprint(cfg)}
    settings = {**plain(cfg.evaluate), "tasks": plain(cfg.task), "seed": cfg.seed}
    ranks = join()
    target = None
    for path in find_drafters(list(cfg.drafters))[ranks.rank :: ranks.world_size]:
        inputs = {**shared, "drafter": model_fingerprint(path)}
        stage = Stage(Path(cfg.out) / Path(path).name, "evaluate", settings, inputs)
        if stage.complete:
            log.info("%s is up to date", stage.directory)
            continue
        if target is None:
            target = load_target(**cfg.target).to(ranks.device)
        evaluate(target, path, stage, cfg)


def check(cfg: DictConfig) -> None:
    """Refuse what would fail, or mean something else, after the model is loaded."""
    for task, how in cfg.task.items():
        sampling_of(task, how, cfg)
        for gamma in cfg.evaluate.num_speculative_tokens:
            check_decoding(gamma, how.max_new_tokens, [0])


def sampling_of(task: str, how: DictConfig, cfg: DictConfig) -> Sampling:
    """How a task is decoded: as it says itself, or as evaluate.sampling says of all.

    Raises:
        ValueError: a key that is neither temperature nor top_p, or a value out of its range.
    """
    if unknown := set(cfg.evaluate.sampling) - {"temperature", "top_p"}:
        raise ValueError(f"evaluate.sampling has {sorted(unknown)}; it takes temperature and top_p")
    sampling = Sampling(**{"temperature": how.temperature, "top_p": how.top_p, **cfg.evaluate.sampling})
    if sampling.temperature < 0:
        raise ValueError(f"task.{task}: temperature is {sampling.temperature}, must be 0 (greedy) or above")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"task.{task}: top_p is {sampling.top_p}, must be above 0, at most 1")
    return sampling


def find_drafters(patterns: list[str]) -> list[str]:
    """Finished model directories of each pattern, in order; a pattern that is no path is a hub name.

    Raises:
        ArtifactError: a local pattern matches nothing.
    """
    found = []
    for pattern in patterns:
        local = sorted(path for path in glob(pattern) if (Path(path) / "config.json").exists())
        finished = [path for path in local if (Path(path) / MANIFEST).exists() or "*" not in pattern]
        if not finished and ("*" in pattern or pattern.startswith((".", "/")) or pattern.count("/") != 1):
            raise ArtifactError(
                f"drafters: '{pattern}' matches no trained drafter; run the stages before, or correct it"
            )
        found += finished or [pattern]
    return found


def evaluate(target: PreTrainedModel, path: str, stage: Stage, cfg: DictConfig) -> None:
    """Write counts.jsonl (a row for each task, gamma and prompt) and samples.jsonl (texts by block)."""
    tokenizer = load_tokenizer(cfg.target.path, cfg.target.revision)
    check_same_vocabulary(tokenizer, load_tokenizer(path))
    drafter = load_target(path).to(target.device)
    check_same_width(target, drafter)
    stops = stop_ids(tokenizer, target.generation_config.eos_token_id)
    context = min(context_length(target), context_length(drafter))
    every = read_jsonl(f"{cfg.inputs.data}/tasks.jsonl")
    work = []
    for task, how in cfg.task.items():
        rows = [row for row in every if row["task"] == task][: cfg.evaluate.prompts_per_task]
        prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], how.max_new_tokens, context)
        work += [(task, how, row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
    if work:  # first calls are slow, and nobody's fault
        speculative_decode(target, drafter, work[0][3], 3, 8, Sampling(), stops)
    counts: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    greedy = differing = 0
    for task, how, row, prompt in tqdm(work, desc=f"evaluate {stage.directory.name}", unit="prompt"):
        sampling = sampling_of(task, how, cfg)
        generator = torch.Generator(target.device).manual_seed(zlib.crc32(row["id"].encode()) + cfg.seed)
        baseline = autoregressive_decode(target, prompt, how.max_new_tokens, sampling, stops, generator)
        for gamma in cfg.evaluate.num_speculative_tokens:
            decoded = speculative_decode(target, drafter, prompt, gamma, how.max_new_tokens, sampling, stops, generator)
            greedy += sampling.temperature == 0
            differing += sampling.temperature == 0 and decoded.tokens != baseline.tokens
            key = {"task": task, "gamma": gamma, "prompt": row["id"]}
            counts.append({**key, **count(decoded, baseline)._asdict()})
            kept = sum(sample["task"] == task and sample["gamma"] == gamma for sample in samples)
            if kept < cfg.evaluate.samples_per_task:
                samples.append({**key, "message": row["prompt"], "blocks": as_text(decoded, tokenizer)})
    write_jsonl(stage.directory / "counts.jsonl", counts)
    write_jsonl(stage.directory / "samples.jsonl", samples)
    stage.finish(
        counts={
            **identity_of(path),
            "drafter_parameters": num_parameters(drafter),
            "target_parameters": num_parameters(target),
            "greedy_outputs": greedy,
            "greedy_outputs_unlike_the_target": int(differing),
        }
    )


def identity_of(path: str) -> dict[str, Any]:
    """What the tables call a drafter: the loss and seed of its finetuning, or how it came about."""
    manifest = Path(path) / MANIFEST
    if not manifest.exists():
        return {"loss": Path(path).name, "seed": 0}
    stage = "finetune" if '"stage": "finetune"' in manifest.read_text() else "pretrain"
    settings = read_manifest(path, stage)["settings"]
    name = settings["name"].rsplit("-seed", 1)[0] if stage == "finetune" else "pretrained"
    return {"loss": name, "seed": settings["seed"]}


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


if __name__ == "__main__":
    main()
