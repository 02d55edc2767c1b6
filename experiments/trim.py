"""Find how many tokens a drafter's output embedding should keep, and write the best drafter. Config: conf/trim.yaml.

The output embedding keeps the tokens that are most frequent in the target's training responses (see
drafter.models.trimming). A smaller one makes c smaller, but the drafter can then not propose the other tokens. MBSU
tells which effect is larger.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.artifacts.manifest import write_jsonl, write_text
from drafter.artifacts.rows import Rows
from drafter.decoding.capabilities import check_can_decode
from drafter.decoding.evaluation import Decodings, Task, decode
from drafter.metrics import Estimate, by_prompt, estimate, memory_bound_speedup, paired_difference, read_row
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.inspection import num_active_parameters, vocabulary_rows
from drafter.models.loading import context_length, load_config, load_target, load_tokenizer, save_tokenizer
from drafter.models.trimming import most_used, read_kept, trim, write_kept
from experiments.reporting.figures import draw_trimming
from experiments.reporting.identity import identity_of
from experiments.reporting.trim_page import TrimRow, trim_page
from experiments.running import dry_run
from experiments.running.commands import command
from experiments.running.inputs import claim, frozen_drafter, pair_inputs, plain, responses_fingerprint, target_source
from experiments.running.tasks import check_tasks, decoding_settings, read_tasks
from experiments.running.turns import Work, decode_turns, target_answer

log = logging.getLogger(__name__)
AllCounts = dict[int, dict[str, np.ndarray]]  # tokens kept -> prompt -> Counts


@command("trim")
def main(cfg: DictConfig) -> None:
    """Decode with each size, and write the table, the figure and the drafter of the best size."""
    if cfg.dry_run:
        return dry_run.show(cfg, "trim", check)
    check(cfg)
    inputs = {**pair_inputs(cfg, cfg.trim.drafter), "responses": responses_fingerprint(cfg)}
    identity = identity_of(cfg.trim.drafter)
    identity = identity._replace(series=f"{identity.series}-trimmed")
    settings = {**plain(cfg.trim), **decoding_settings(cfg), **identity._asdict(), "random_seed": cfg.seed}
    del settings["drafter"]  # its fingerprint is among the inputs
    stage = claim(cfg, "trim", settings, inputs, Path(cfg.out) / Path(cfg.trim.drafter).name)
    if stage.complete:
        return log.info("%s is up to date", stage.directory)
    tokenizer = load_tokenizer(target_source(cfg))
    target = load_target(target_source(cfg)).to("cuda" if torch.cuda.is_available() else "cpu")
    stops = end_of_turn_ids(target_source(cfg), tokenizer)
    untrimmed = frozen_drafter(cfg, cfg.trim.drafter).to(target.device)
    responses = responses_by_split(Rows(cfg.inputs.responses, "respond"))
    ranked = most_used([*responses["train"], stops], vocabulary_rows(untrimmed))
    sizes = [size for size in cfg.trim.sizes if size < len(ranked)]
    drafters = {size: trim(copy.deepcopy(untrimmed), ranked[:size]) for size in sizes} | {len(ranked): untrimmed}
    context = min(map(context_length, (target, untrimmed)))
    work = read_tasks(cfg, tokenizer, context, cfg.trim.prompts_per_task, stops, {})
    counts = decode_all(drafters, target, work, cfg)
    heldout = np.concatenate([np.array(tokens) for tokens in responses.get("validation") or responses["train"]])
    ratios = {
        size: num_active_parameters(drafter) / num_active_parameters(target) for size, drafter in drafters.items()
    }
    coverage = {size: float(np.isin(heldout, ranked[:size]).mean()) for size in drafters}
    table = [row_of(size, coverage[size], ratios, counts, cfg.trim.num_speculative_tokens) for size in drafters]
    best = max(table, key=lambda row: row.speedup.value)
    untrimmed.save_pretrained(stage.directory)
    save_tokenizer(tokenizer, stage.directory)
    if best.tokens < len(ranked):
        write_kept(stage.directory, ranked[: best.tokens])
    page = trim_page(table, best, cfg.trim.drafter, cfg.trim.num_speculative_tokens)
    write_jsonl(stage.directory / "trim.jsonl", [row._asdict() for row in table])
    write_text(stage.directory / "trim.md", page)
    draw_trimming(table, stage.directory / "trim")
    stage.finish(counts={"kept": best.tokens, "vocabulary": len(ranked), "stop_ids": stops})
    print(page)


def responses_by_split(rows: Rows) -> dict[str, list[Any]]:
    """Return the response tokens of every row by split, reading a thousand rows at a time."""
    responses: dict[str, list[Any]] = {split: [] for split in set(rows.splits)}
    for start in range(0, len(rows), 1000):
        for row in rows[start : start + 1000]:
            responses[row["split"]].append(row["response_ids"])
    return responses


def check(cfg: DictConfig) -> None:
    """Refuse a target or tasks that cannot be decoded, sizes below 1, and a drafter that is already trimmed."""
    check_can_decode(load_config(target_source(cfg)))
    if not cfg.trim.sizes or min(cfg.trim.sizes) < 1:
        raise ValueError(f"trim.sizes is {list(cfg.trim.sizes)}, must be numbers of tokens, at least 1")
    if read_kept(cfg.trim.drafter):
        raise ValueError(f"trim.drafter is {cfg.trim.drafter}, which is trimmed already: give the one it was made from")
    check_tasks(cfg, {})


def decode_all(drafters: dict[int, PreTrainedModel], target: PreTrainedModel, work: Work, cfg: DictConfig) -> AllCounts:
    """Decode each prompt of the tasks in the domain (of all tasks, if none is) with every size in turn."""
    inside = [task for task in work.tasks if cfg.task[task.name].in_domain] or work.tasks
    gamma, named = cfg.trim.num_speculative_tokens, {str(size): drafter for size, drafter in drafters.items()}

    def decode_turn(task: Task) -> Decodings:
        return decode(task, target, named, {gamma: gamma}, cfg.seed)

    reached = [decode_turns(work, first, decode_turn, target_answer) for first in inside]
    found: AllCounts = {}
    for size in drafters:
        rows = [of_turn.by_drafter[str(size)][0].row for one in reached for _, of_turn in one.turns]
        counts = [read_row(row) for row in rows]
        found[size] = by_prompt([f"{row['task']} {row['prompt']}" for row in rows], counts)
    return found


def row_of(size: int, coverage: float, ratios: dict[int, float], counts: AllCounts, gamma: int) -> TrimRow:
    """Return the measures of one size. Its gain over the untrimmed drafter is paired by prompt."""
    vocabulary, efficiency = max(counts), estimate(counts[size], "block_efficiency")
    factors = [memory_bound_speedup(1, ratios[one], gamma) for one in (size, vocabulary)]
    gain = paired_difference(counts[size], counts[vocabulary], "block_efficiency", factors=(factors[0], factors[1]))
    return TrimRow(
        size,
        coverage,
        ratios[size],
        estimate(counts[size], "acceptance_rate"),
        efficiency,
        Estimate(*(factors[0] * value for value in efficiency)),
        gain if size < vocabulary else None,
        estimate(counts[size], "token_rate_ratio"),
    )


if __name__ == "__main__":
    main()
