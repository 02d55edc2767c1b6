"""How many tokens should a drafter's head keep? Each size is decoded with, the best is written. Config: conf/trim.yaml.

The head keeps the tokens that the target's training responses use most (see drafter.trimming). A smaller head is a
smaller c, and drafts that it cannot make are tokens that the target has to add: MBSU says which of the two weighs more.
"""

import copy
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.artifacts import write_jsonl, write_text
from drafter.capabilities import check_can_decode
from drafter.ends import end_of_turn_ids
from drafter.loading import load_config, load_target, load_tokenizer
from drafter.metrics import Counts, Estimate, estimate, memory_bound_speedup, paired_difference
from drafter.models import context_length, num_parameters, vocabulary_rows
from drafter.rows import Rows
from drafter.trimming import most_used, read_kept, trim, write_kept
from experiments import dry_run
from experiments.commands import command
from experiments.drafters import identity_of
from experiments.evaluate import Task, decode, decoding_settings, prompts, sampling_of
from experiments.figures import draw_trimming
from experiments.inputs import claim, frozen_drafter, pair_inputs, plain, responses_fingerprint, target_source
from experiments.tabular import Table, with_interval

log = logging.getLogger(__name__)
AllCounts = dict[int, dict[str, np.ndarray]]  # tokens kept -> prompt -> Counts


class Row(NamedTuple):
    """A head of so many tokens, over the tasks in the domain: what it covers, what it costs, what it gives."""

    tokens: int
    coverage: float
    size_ratio: float
    acceptance_rate: Estimate
    block_efficiency: Estimate
    speedup: Estimate
    gain: Estimate | None
    token_rate_ratio: Estimate


@command("trim")
def main(cfg: DictConfig) -> None:
    """Decode with each size, write the table, the figure and the drafter of the best size."""
    if cfg.dry_run:
        return dry_run.show(cfg, "trim", check)
    check(cfg)
    inputs = {**pair_inputs(cfg, cfg.trim.drafter), "responses": responses_fingerprint(cfg)}
    named = identity_of(cfg.trim.drafter)
    settings = {**plain(cfg.trim), **decoding_settings(cfg), "seed": named["seed"], "random_seed": cfg.seed}
    del settings["drafter"]  # its fingerprint is among the inputs
    settings["name"] = f"{named['loss']}-trimmed-seed{named['seed']}"
    stage = claim(cfg, "trim", settings, inputs, Path(cfg.out) / Path(cfg.trim.drafter).name)
    if stage.complete:
        return log.info("%s is up to date", stage.directory)
    tokenizer = load_tokenizer(target_source(cfg))
    target = load_target(target_source(cfg)).to("cuda" if torch.cuda.is_available() else "cpu")
    stops = end_of_turn_ids(target_source(cfg), tokenizer)
    whole = frozen_drafter(cfg, cfg.trim.drafter).to(target.device)
    written = responses_by_split(Rows(cfg.inputs.responses, "respond"))
    ranked = most_used([*written["train"], stops], vocabulary_rows(whole))
    sizes = [size for size in cfg.trim.sizes if size < len(ranked)]
    heads = {size: trim(copy.deepcopy(whole), ranked[:size]) for size in sizes} | {len(ranked): whole}
    context = min(map(context_length, (target, whole)))
    counts = decode_all(heads, target, stops, prompts(cfg, tokenizer, context, cfg.trim.prompts_per_task, {}), cfg)
    heldout = np.concatenate([np.array(text) for text in written.get("validation") or written["train"]])
    ratios = {size: num_parameters(head) / num_parameters(target) for size, head in heads.items()}
    covered = {size: float(np.isin(heldout, ranked[:size]).mean()) for size in heads}
    table = [row_of(size, covered[size], ratios, counts, cfg.trim.num_speculative_tokens) for size in heads]
    best = max(table, key=lambda row: row.speedup.value)
    whole.save_pretrained(stage.directory)
    tokenizer.save_pretrained(stage.directory)
    if best.tokens < len(ranked):
        write_kept(stage.directory, ranked[: best.tokens])
    page = report(table, best, cfg)
    write_jsonl(stage.directory / "trim.jsonl", [row._asdict() for row in table])
    write_text(stage.directory / "trim.md", page)
    draw_trimming(table, stage.directory / "trim")
    stage.finish(counts={"kept": best.tokens, "vocabulary": len(ranked), "stop_ids": stops})
    print(page)


def responses_by_split(rows: Rows) -> dict[str, list[Any]]:
    """The response tokens of every row, read a thousand rows at a time."""
    written: dict[str, list[Any]] = {split: [] for split in set(rows.splits)}
    for start in range(0, len(rows), 1000):
        for row in rows[start : start + 1000]:
            written[row["split"]].append(row["response_ids"])
    return written


def check(cfg: DictConfig) -> None:
    """Refuse a target or tasks that cannot be decoded, sizes that are none, and a drafter that is trimmed already."""
    check_can_decode(load_config(target_source(cfg)))
    if not cfg.trim.sizes or min(cfg.trim.sizes) < 1:
        raise ValueError(f"trim.sizes is {list(cfg.trim.sizes)}, must be numbers of tokens, at least 1")
    if read_kept(cfg.trim.drafter):
        raise ValueError(f"trim.drafter is {cfg.trim.drafter}, which is trimmed already: give the one it was made from")
    for task, how in cfg.task.items():
        sampling_of(task, how, {})


def decode_all(
    heads: dict[int, PreTrainedModel], target: PreTrainedModel, stops: list[int], work: list[Task], cfg: DictConfig
) -> AllCounts:
    """The tasks in the domain (all, if none is): every size decodes each prompt in turn."""
    inside = [task for task in work if cfg.task[task.name].in_domain] or work
    found: AllCounts = {size: {} for size in heads}
    gamma, named = cfg.trim.num_speculative_tokens, {str(size): head for size, head in heads.items()}
    for task in inside:
        for size, rows in decode(task, target, named, stops, {gamma: gamma}, cfg.seed).items():
            (row, _) = rows[0]
            found[int(size)][f"{task.name} {task.prompt_id}"] = np.array([row[field] for field in Counts._fields])
    return found


def row_of(size: int, coverage: float, ratios: dict[int, float], counts: AllCounts, gamma: int) -> Row:
    """The figures of one size; its gain over the whole head is paired by prompt."""
    whole, efficiency = max(counts), estimate(counts[size], "block_efficiency")
    per_tau = [memory_bound_speedup(1, ratios[one], gamma) for one in (size, whole)]
    gain = paired_difference(counts[size], counts[whole], "block_efficiency", factors=(per_tau[0], per_tau[1]))
    return Row(
        size,
        coverage,
        ratios[size],
        estimate(counts[size], "acceptance_rate"),
        efficiency,
        Estimate(*(per_tau[0] * value for value in efficiency)),
        gain if size < whole else None,
        estimate(counts[size], "token_rate_ratio"),
    )


def report(rows: list[Row], best: Row, cfg: DictConfig) -> str:
    """The page, in Markdown."""
    columns = ["tokens kept", "of the target's words", "c", "α", "τ", "MBSU", "MBSU − whole", "token rate"]
    lines = [
        [
            str(row.tokens),
            f"{row.coverage:.1%}",
            f"{row.size_ratio:.2%}",
            *map(with_interval, (row.acceptance_rate, row.block_efficiency, row.speedup)),
            with_interval(row.gain, signed=True) if row.gain else "",
            with_interval(row.token_rate_ratio),
        ]
        for row in rows
    ]
    whole = max(row.tokens for row in rows)
    verdict = f"A head of {best.tokens} of {whole} tokens has the highest MBSU, and is what this directory has."
    if best.tokens == whole:
        verdict = "No trimmed head has a higher MBSU than the whole one, so this directory has the whole one."
    title = f"Heads of {cfg.trim.drafter}, tasks in the domain, γ = {cfg.trim.num_speculative_tokens}"
    notes = (
        "c counts no row that the head lost. Of the target's words: held-out response tokens that the head can draft. "
        "In brackets: 95% bootstrap intervals over prompts, the differences paired."
    )
    table = Table("trim", title, columns, lines, notes)
    return f"# {table.title}\n\n{verdict}\n\n{table.markdown()}\n"


if __name__ == "__main__":
    main()
