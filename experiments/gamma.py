"""Find the best γ of a target and a drafter on this machine, for each task. Config: conf/gamma.yaml.

The target alone generates a sequence for each prompt. From these follows the expected block efficiency at every γ
(see drafter.decoding.expected_efficiency), from timed calls the ratios c and v (see drafter.decoding.timings), and
from both the predicted speed-up. Then the prompts are decoded at each γ, to compare.
"""

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from drafter.artifacts.manifest import write_jsonl, write_text
from drafter.decoding.acceptance import check_rule
from drafter.decoding.capabilities import check_can_decode
from drafter.decoding.drafting import models_of, with_models, without_model
from drafter.metrics import by_prompt, count, estimate
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import context_length, load_config, load_target, load_tokenizer
from experiments.reporting.figures import draw_gammas
from experiments.reporting.gamma_page import GammaRow, gamma_page
from experiments.running import dry_run
from experiments.running.commands import command
from experiments.running.identity import without_defaults
from experiments.running.inputs import claim, data_fingerprint, plain, target_fingerprint, target_source
from experiments.running.named_drafters import check_compiles, check_named, fingerprint_of, label_of, load_named
from experiments.running.predictions import expected_counts
from experiments.running.progress import Progress
from experiments.running.speedups import check_gammas, compile_pair, decode_prompt, prepare_pair
from experiments.running.tasks import check_tasks, decoding_settings, read_tasks
from experiments.running.turns import Work, decode_turns

log = logging.getLogger(__name__)
DRAFTER = "drafter"  # its name among the decodings of a prompt


@command("gamma")
def main(cfg: DictConfig) -> None:
    """Measure, and write gamma.md, gamma.jsonl, counts.jsonl and the figure."""
    if cfg.dry_run:
        return dry_run.show(cfg, "gamma", check)
    check(cfg)
    settings = {**without_defaults(plain(cfg.gamma), {"acceptance_rule": "ratio"}), **decoding_settings(cfg)}
    del settings["drafter"]  # its fingerprint is among the inputs
    inputs = {"data": data_fingerprint(cfg), "target": target_fingerprint(cfg)}
    inputs |= {"drafter": fingerprint_of(cfg.gamma.drafter, inputs["target"])}
    stage = claim(cfg, "gamma", settings, inputs, Path(cfg.out) / label_of(cfg.gamma.drafter))
    if stage.complete:
        return log.info("%s is up to date", stage.directory)
    tokenizer = load_tokenizer(target_source(cfg))
    target = load_target(target_source(cfg)).to("cuda" if torch.cuda.is_available() else "cpu")
    drafter = with_models(load_named(cfg, cfg.gamma.drafter, target), lambda model: model.to(target.device))
    stops = end_of_turn_ids(target_source(cfg), tokenizer)
    context = min(map(context_length, (target, *models_of(drafter))))
    work = by_rule(
        read_tasks(cfg, tokenizer, context, cfg.gamma.prompts_per_task, stops, {}), cfg.gamma.acceptance_rule
    )
    prompt, largest = work.tasks[0].prompt, cfg.gamma.largest
    if cfg.gamma.compile:
        ends = [len(task.prompt) + task.options.max_new_tokens for task in work.tasks]
        longest = context if work.continuations else max(ends)
        pair = compile_pair(target, drafter, prompt, longest, largest, cfg.gamma.decode)
    else:
        pair = prepare_pair(target, drafter, prompt, largest, cfg.gamma.pad)
    timings = pair.time_calls({DRAFTER: pair.drafter}, prompt, largest)[DRAFTER]
    drafters, gammas = {DRAFTER: pair.drafter}, {DRAFTER: list(cfg.gamma.decode or range(1, largest + 1))}
    decode_turn = partial(
        decode_prompt, target=pair.target, drafters=drafters, gammas=gammas, seed=cfg.seed, alone=pair.alone
    )
    conversations = []
    with Progress("gamma", "prompt") as report:
        for number, task in enumerate(work.tasks, start=1):
            conversations.append(decode_turns(work, task, decode_turn, lambda one: one.baseline.tokens))
            report(number, len(work.tasks))
    rows, counts, left_out = [], [], {}
    greedy: list[bool] = []  # of each greedy decoding: is its text the target's own?
    for name in cfg.task:
        reached = [one for task, one in zip(work.tasks, conversations, strict=True) if task.name == name]
        turns = [turn for one in reached for turn in one.turns]
        tasks, found = [task for task, _ in turns], [decoded for _, decoded in turns]
        left_out[name] = sum((one.left_out for one in reached), work.left_out.get(name, Counter()))
        predicted = expected_counts(
            tasks, [one.baseline.tokens for one in found], target, drafter, timings, largest
        ).ratios()
        for gamma, (efficiency, cost) in enumerate(predicted, start=1):
            pairs = zip(tasks, found, strict=True)
            of_gamma = {
                task.prompt_id: count(one.drafted[DRAFTER, gamma], one.baseline)
                for task, one in pairs
                if (DRAFTER, gamma) in one.drafted
            }
            speedup = estimate(by_prompt(of_gamma, of_gamma.values()), "token_rate_ratio") if of_gamma else None
            rows.append(GammaRow(name, gamma, efficiency, cost, efficiency / cost, speedup))
            counts += [
                {"task": name, "gamma": gamma, "prompt": prompt, **values._asdict()}
                for prompt, values in of_gamma.items()
            ]
        greedy += [
            decoding.tokens == one.baseline.tokens
            for task, one in turns
            if task.options.sampling.temperature == 0
            for decoding in one.drafted.values()
        ]
    page = gamma_page(
        rows,
        timings,
        cfg.gamma.drafter,
        cfg.gamma.compile,
        pair.widths,
        cfg.gamma.acceptance_rule,
        ("beside a model" if models_of(drafter) else "alone") if without_model(drafter) else None,
        pair.alone is not pair.target,
        (sum(greedy), len(greedy)),
    )
    write_jsonl(stage.directory / "gamma.jsonl", [row._asdict() for row in rows])
    write_jsonl(stage.directory / "counts.jsonl", counts)
    write_text(stage.directory / "gamma.md", page)
    draw_gammas(rows, stage.directory / "gamma")
    stage.finish(
        counts={
            "c": timings.ratio,
            "widths": {str(tokens): width for tokens, width in pair.widths.items()},
            "v": [timings.verification(g) for g in range(1, largest + 1)],
            "stop_ids": stops,
            "greedy_outputs": len(greedy),
            "greedy_outputs_unlike_the_target": len(greedy) - sum(greedy),
            **({"turns_left_out": left_out} if work.continuations else {}),
        }
    )
    print(page)


def check(cfg: DictConfig) -> None:
    """Refuse a target or tasks that cannot be decoded, and a largest γ below 1."""
    check_can_decode(load_config(target_source(cfg)))
    check_gammas(cfg, "gamma")
    check_compiles(cfg, "gamma")
    check_named(cfg, cfg.gamma.drafter)
    check_tasks(cfg, {})
    check_rule(cfg.gamma.acceptance_rule)


def by_rule(work: Work, rule: str) -> Work:
    """Return the same work, decoded by an acceptance rule."""
    return work._replace(tasks=[task._replace(options=replace(task.options, rule=rule)) for task in work.tasks])


if __name__ == "__main__":
    main()
