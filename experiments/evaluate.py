"""Stage 4: decode the tasks' prompts with each drafter and without one. Config: conf/evaluate.yaml.

Each drafter has a directory of its own, so that a new drafter needs only its own evaluation. All new drafters decode
each prompt in turn: the autoregressive baseline is decoded once for all of them, and a ratio of token rates compares
times that were measured close together on one machine. With evaluate.batch_size above 1, prompts are decoded side by
side, and no times are recorded. Each rank takes the next part of the prompts when it is free. An interrupted evaluation
continues with the missing parts.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.artifacts.manifest import MANIFEST, Stage, read_jsonl, write_jsonl
from drafter.decoding.acceptance import check_rules
from drafter.decoding.capabilities import check_can_decode, check_side_by_side
from drafter.decoding.drafting import Drafter, models_of, with_models
from drafter.decoding.evaluation import Decodings, Task, decode, decode_side_by_side
from drafter.decoding.options import Adaptive, DecodingOptions, check_draft_length, max_draft_length
from drafter.decoding.roles import RoleReader
from drafter.decoding.speculative import speculative_decode
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.inspection import num_active_parameters, num_parameters
from drafter.models.loading import check_quantisation, context_length, load_config, load_target, load_tokenizer
from drafter.models.packing import pack
from drafter.models.sharding import check_parallel
from drafter.ranks import deal, join, wait_for_all
from experiments.reporting.identity import DrafterIdentity
from experiments.running import dry_run
from experiments.running.commands import command
from experiments.running.composing import override
from experiments.running.drafters import find_drafters, output_directories
from experiments.running.identity import without_defaults
from experiments.running.inputs import claim, data_fingerprint, plain, target_fingerprint, target_source
from experiments.running.named_drafters import check_named, fingerprint_of, load_named, named_identity, parse
from experiments.running.progress import Progress
from experiments.running.tasks import check_draft_lengths, check_tasks, decoding_settings, draft_length, read_tasks
from experiments.running.turns import Work, check_fits, decode_turns_together, part_rows, target_answer, turns_by_task

log = logging.getLogger(__name__)
PART = 8  # prompts that are evaluated, and written, together, if they are not decoded in larger batches
# Settings that the identity has only where they differ from these values.
LEFT_OUT = {"batch_size": 1, "acceptance_rules": ["ratio"]}


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate every drafter that has no finished evaluation."""
    if cfg.dry_run:
        return dry_run.show(cfg, "evaluate", check)
    check(cfg)
    shared = {"data": data_fingerprint(cfg), "target": target_fingerprint(cfg)}
    settings = {**without_defaults(plain(cfg.evaluate), LEFT_OUT), **decoding_settings(cfg)}
    directories = output_directories(Path(cfg.out), find_drafters(list(cfg.drafters)))
    identities = {path: named_identity(path) for path in directories}  # refused before anything is decoded
    for path in directories:
        check_named(cfg, path)
    stages = {
        path: claim(
            cfg,
            "evaluate",
            settings,
            {**shared, "drafter": fingerprint_of(path, shared["target"])},
            directory,
            (override("drafters", [path]),),
        )
        for path, directory in directories.items()
    }
    pending = {path: stage for path, stage in stages.items() if not stage.complete}
    if not pending:
        return log.info("%s is up to date (%d drafters)", cfg.out, len(stages))
    ranks = join(cfg.target.parallel == "tensor")
    tokenizer = load_tokenizer(target_source(cfg))
    target = pack(load_target(target_source(cfg)).to(ranks.device))
    drafters = {
        path: with_models(load_named(cfg, path, target), lambda model: pack(model.to(ranks.device))) for path in pending
    }
    models = {path: model for path, drafter in drafters.items() for model in models_of(drafter)}
    contexts = {path: context_length(model) for path, model in models.items()}
    stops, of_target = end_of_turn_ids(target_source(cfg), tokenizer), context_length(target)
    work = read_tasks(
        cfg,
        tokenizer,
        min(of_target, *contexts.values()),
        cfg.evaluate.prompts_per_task,
        stops,
        cfg.evaluate.sampling,
        turns_context=of_target,
    )
    check_fits(work, contexts)
    gammas = {gamma: gamma_of(gamma, cfg) for gamma in cfg.evaluate.num_speculative_tokens}
    batch_size, size = cfg.evaluate.batch_size, max(PART, cfg.evaluate.batch_size)
    rules = check_rules(plain(cfg.evaluate.acceptance_rules))
    if batch_size > 1:
        check_batches(work, [target, *models.values()], of_target, max(map(max_draft_length, gammas.values())))
    parts = [work.tasks[start : start + size] for start in range(0, len(work.tasks), size)]
    # The first calls are slow, and should not count for any drafter. The beginning of a prompt fits into any context.
    for drafter in {**drafters, **models}.values():
        speculative_decode(target, drafter, work.tasks[0].prompt[:32], 3, DecodingOptions(max_new_tokens=8))
    reader = RoleReader(tokenizer, stops)

    def decode_turns_of(tasks: list[Task], paths: Iterable[str]) -> list[Decodings]:
        missing = {path: drafters[path] for path in paths}
        if batch_size > 1:
            return decode_side_by_side(tasks, target, missing, gammas, cfg.seed, rules)
        return [decode(task, target, missing, gammas, cfg.seed, rules) for task in tasks]

    todo = [number for number in range(len(parts)) if missing_files(number, pending)]
    with Progress("evaluate", f"part of {size} prompts", ranks.world_size) as report:
        for index, number in deal(todo, ranks.world_size):
            missing = missing_files(number, pending)
            rows: dict[str, list[dict[str, Any]]] = {path: [] for path in missing}
            decode_missing = partial(decode_turns_of, paths=missing)
            for batch in batches(parts[number], batch_size):
                for reached in decode_turns_together(work, batch, decode_missing, target_answer):
                    for path in missing:
                        rows[path] += part_rows(reached, path, reader, tokenizer)
            for path, file in missing.items() if ranks.writes else []:
                write_jsonl(file, rows[path])
            tokens = sum(row.get("tokens", 0) for of_drafter in rows.values() for row in of_drafter)
            report(index + 1, len(todo), tokens)
    wait_for_all()
    if ranks.first:
        for path, stage in pending.items():
            finish(identities[path], stage, len(parts), drafters[path], target, stops, work, cfg)


def batches(tasks: list[Task], batch_size: int) -> Iterator[list[Task]]:
    """Yield at most `batch_size` tasks at a time, of the same options, in their order."""
    for _, same in groupby(tasks, key=lambda task: task.options):
        together = list(same)
        yield from (together[start : start + batch_size] for start in range(0, len(together), batch_size))


def check_batches(work: Work, models: Iterable[PreTrainedModel], context: int, gamma: int) -> None:
    """Check that each model can decode these prompts side by side. Later turns may be as long as the context.

    Raises:
        ValueError: a model cannot; names it and the reason.
    """
    longest = max(len(task.prompt) + task.options.max_new_tokens for task in work.tasks)
    for model in models:
        try:
            check_side_by_side(model, (context if work.continuations else longest) + gamma + 1)
        except ValueError as error:
            raise ValueError(f"{error}, with evaluate.batch_size=1") from None


def missing_files(number: int, stages: dict[str, Stage]) -> dict[str, Path]:
    """Return the file of a part for each drafter that does not have it yet."""
    files = {path: stage.directory / f"part-{number:05d}.jsonl" for path, stage in stages.items()}
    return {path: file for path, file in files.items() if not file.exists()}


def is_pending(cfg: DictConfig) -> bool:
    """Return whether any drafter has no finished evaluation yet."""
    directories = output_directories(Path(cfg.out), find_drafters(list(cfg.drafters)))
    return any(not (directory / MANIFEST).exists() for directory in directories.values())


def check(cfg: DictConfig) -> None:
    """Check the settings before a model is loaded."""
    check_quantisation(target_source(cfg))
    check_can_decode(load_config(target_source(cfg)))
    check_parallel(cfg.target.parallel, "tensor", "evaluate")
    check_tasks(cfg, cfg.evaluate.sampling)
    for name in cfg.drafters:
        parse(name)
    check_rules(plain(cfg.evaluate.acceptance_rules))
    batch_size = cfg.evaluate.batch_size
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"evaluate.batch_size is {batch_size}, must be a whole number, at least 1")
    check_draft_lengths(plain(cfg.evaluate.num_speculative_tokens), "evaluate.num_speculative_tokens")
    for gamma in cfg.evaluate.num_speculative_tokens:
        check_draft_length(gamma_of(gamma, cfg))


def gamma_of(gamma: int | str, cfg: DictConfig) -> int | Adaptive:
    """Return γ as a number, or the adaptive rule of evaluate.adaptive for "adaptive"."""
    return draft_length(gamma, cfg.evaluate.adaptive, "evaluate.num_speculative_tokens")


def finish(
    identity: DrafterIdentity,
    stage: Stage,
    parts: int,
    drafter: Drafter,
    target: PreTrainedModel,
    stops: list[int],
    work: Work,
    cfg: DictConfig,
) -> None:
    """Join all parts into counts.jsonl (a row per task, γ, rule and prompt) and samples.jsonl (texts by block)."""
    files = [stage.directory / f"part-{number:05d}.jsonl" for number in range(parts)]
    every = [row for file in files for row in read_jsonl(file)]
    rows = [row for row in every if "turns_left_out" not in row]
    shown: Counter[tuple[str, str, str | None]] = Counter()
    samples = []
    for row in rows:
        sample: dict[str, Any] = {name: row[name] for name in ("task", "gamma", "prompt")}
        if plain(cfg.evaluate.acceptance_rules) != LEFT_OUT["acceptance_rules"]:
            sample |= {name: row[name] for name in ("rule", "greedy") if name in row}
        sample |= {name: row.pop(name) for name in ("message", "blocks")}
        kind = row["task"], str(row["gamma"]), row.get("rule")
        shown[kind] += 1
        if shown[kind] <= cfg.evaluate.samples_per_task:
            samples.append(sample)
    greedy = [row for row in rows if row["greedy"]]
    write_jsonl(stage.directory / "counts.jsonl", rows)
    write_jsonl(stage.directory / "samples.jsonl", samples)
    for file in files:
        file.unlink()
    stage.finish(
        counts={
            **identity._asdict(),
            **parameters(drafter, target),
            "stop_ids": stops,
            **({"turns": turns_by_task(work, every)} if work.continuations else {}),
            "greedy_outputs": len(greedy),
            "greedy_outputs_unlike_the_target": sum(not row["like_the_target"] for row in greedy),
        }
    )


def parameters(drafter: Drafter, target: PreTrainedModel) -> dict[str, int]:
    """Return the models' numbers of parameters and, if one is a mixture of experts, of those that a token meets."""
    models = {"drafter": models_of(drafter), "target": [target]}
    every = {f"{name}_parameters": sum(map(num_parameters, found)) for name, found in models.items()}
    active = {f"{name}_active_parameters": sum(map(num_active_parameters, found)) for name, found in models.items()}
    return every if list(every.values()) == list(active.values()) else every | active


if __name__ == "__main__":
    main()
