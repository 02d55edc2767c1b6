"""Measure whether a target and a drafter that were trained anywhere are worth it. Config: conf/measure.yaml.

The target alone answers each prompt, greedily and sampled. τ at every γ and by every acceptance rule follows from that,
and with timed calls the speed-up. Then the prompts are decoded with the drafter, and with the rivals that cost nothing,
at the γ that promise most.
"""

import logging
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from drafter.artifacts.manifest import digest, write_jsonl
from drafter.data.prompts import check_embedding
from drafter.decoding.capabilities import check_can_decode
from drafter.decoding.evaluation import Task
from drafter.models.compatibility import Difference, check_pair
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import check_quantisation, context_limit, load_config, load_tokenizer, vocabulary_width
from experiments.exporting.engine_settings import add_settings
from experiments.planning.expected_calls import check_hardware, expected_timings
from experiments.reporting.measure_page import write_page
from experiments.running.commands import command
from experiments.running.contexts import check_contexts, context_rows, context_seconds
from experiments.running.inputs import claim, plain, target_fingerprint, target_source
from experiments.running.measuring import (
    GREEDY,
    SEVERAL,
    Prompt,
    choose_gammas,
    decode_all,
    encode_tasks,
    generate_answers,
    predict_all,
    read_prompts,
)
from experiments.running.measuring_engine import ask_servers, check_engine_settings, find_servers, summarise_engine
from experiments.running.named_drafters import (
    check_compiles,
    check_named,
    fingerprint_of,
    label_of,
    model_of,
    model_source,
    parse,
)
from experiments.running.progress import Progress, duration
from experiments.running.speedups import check_gammas
from experiments.running.summarising import summarise
from experiments.running.timed_pair import expected_seconds, load_and_time

log = logging.getLogger(__name__)
OF_THE_PROMPTS = ("drafter", "rivals", "prompts", "template")  # settings whose content is among the inputs
# Decodings of a prompt by the target alone: greedy and sampled for the predictions, and greedy beside the drafters.
ALONE = 3


@command("measure")
def main(cfg: DictConfig) -> None:
    """Measure, and write measure.md, measure.html, measure.json and counts.jsonl."""
    ready, measure = check(cfg), cfg.measure
    if cfg.dry_run:
        find_servers(cfg, ready.tasks[GREEDY])
        return print(f"{measure.drafter} can be measured with {cfg.target.path}")
    settings = {key: value for key, value in plain(measure).items() if key not in OF_THE_PROMPTS}
    hardware = {} if cfg.get("hardware") is None else {"hardware": plain(cfg.hardware)}
    drafters = {label: fingerprint_of(name, target_fingerprint(cfg)) for label, name in ready.names.items()}
    inputs = {"target": target_fingerprint(cfg), "drafters": digest(drafters), "prompts": digest(ready.prompts)}
    directory = Path(cfg.out or f"measure/{label_of(measure.drafter)}")
    stage = claim(
        cfg, "measure", {**settings, "seed": cfg.seed, "dtype": cfg.target.dtype, **hardware}, inputs, directory
    )
    if stage.complete:
        return print((directory / "measure.md").read_text(encoding="utf-8"))
    servers = find_servers(cfg, ready.tasks[GREEDY])
    served = ask_servers(servers, ready.tasks[GREEDY]) if servers else []
    log.info("measure: loading the models and timing their calls; the page will be in %s", directory)
    tasks, seed, largest = ready.tasks, cfg.seed, measure.largest
    drafted = len(measure.decode or range(min(SEVERAL, largest))) * len(ready.names)
    count, decodings, contexts = len(ready.prompts), ALONE + drafted, measure.contexts or []
    pair = load_and_time(cfg, ready.names, tasks[GREEDY], decodings)
    seconds = expected_seconds(pair, count, decodings, measure.batch_sizes)
    seconds += context_seconds(pair, tasks[GREEDY], contexts)
    log.info(
        "measure: this takes about %s, unless drafts save time: %d prompts are decoded %d times, with up to %d tokens",
        duration(seconds),
        *(count, decodings, measure.max_new_tokens),
    )
    with Progress("measure", "decoding") as progress:
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            progress(done, count * decodings)

        answers = generate_answers(tasks, pair.alone, pair.plain_target, pair.models, seed, lambda: advance(1))
        predictions = {
            label: predict_all(
                tasks, answers, pair.plain_target, drafter, pair.timings[label], pair.conditions[label], largest
            )
            for label, drafter in pair.plain_drafters.items()
        }
        gammas = {label: choose_gammas(found[GREEDY], measure.decode) for label, found in predictions.items()}
        rows = decode_all(
            tasks[GREEDY], pair.target, pair.alone, pair.drafters, gammas, seed, lambda: advance(1 + drafted)
        )
    found = summarise(cfg, pair, tasks[GREEDY], answers, predictions, rows, ready.differences)
    if servers:
        figures = summarise_engine(servers, served, pair, tasks[GREEDY], answers, found.rows)
        found = found._replace(engine=figures)
    by_roofline = expected_timings(cfg, pair)
    found = found._replace(
        contexts=context_rows(pair, tasks[GREEDY], answers, contexts, largest, by_roofline),
        hardware=cfg.hardware.name if by_roofline else None,
    )
    speedups = {
        label: {key: [one.speedup for one in of_key] for key, of_key in of_label.items()}
        for label, of_label in predictions.items()
    }
    page = write_page(stage.directory, add_settings(found, speedups))
    write_jsonl(stage.directory / "counts.jsonl", rows)
    stage.finish(counts={"c": found.calls.ratio, "v": found.calls.verification})
    print(page)


class Ready(NamedTuple):
    """What is known before a model is loaded.

    Attributes:
        names: label -> name of the drafter, and of each rival.
        prompts: the prompts.
        tasks: the same encoded, decoded greedily and sampled.
        differences: the harmless differences of the two models.
    """

    names: dict[str, str]
    prompts: list[Prompt]
    tasks: dict[str, list[Task]]
    differences: list[Difference]


def check(cfg: DictConfig) -> Ready:
    """Refuse what cannot be measured, before any weights are loaded.

    Raises:
        ValueError: a setting is out of its range, the two vocabularies differ, an architecture cannot be decoded with,
            or a prompt exceeds the context; names the value and the remedy.
        OSError: a model cannot be found.
    """
    check_settings(cfg)
    target, names = target_source(cfg), drafters_of(cfg)
    tokenizer, differences = load_tokenizer(target), list[Difference]()
    check_embedding(tokenizer, vocabulary_width(target), target.path)
    context = context_limit(target)
    for name in names.values():
        check_named(cfg, name)
    # The drafter is the first of them, so that the differences are those of the drafter that is measured.
    models = list(dict.fromkeys(model for name in names.values() if (model := model_of(name))))
    for source in (target, *(model_source(cfg, model) for model in models)):
        check_can_decode(load_config(source))
        check_quantisation(source)
    for model in models:
        found = check_pair(target, model_source(cfg, model), cfg.pad_vocabulary)
        differences = found if model == model_of(cfg.measure.drafter) else differences
        context = min(context, context_limit(model_source(cfg, model)))
    prompts = read_prompts(cfg)
    tasks = encode_tasks(cfg, prompts, tokenizer, context, end_of_turn_ids(target, tokenizer))
    return Ready(names, prompts, tasks, differences)


def drafters_of(cfg: DictConfig) -> dict[str, str]:
    """Return the drafter and its rivals, each once, by a label that only one of them has."""
    chosen, rivals = str(cfg.measure.drafter), cfg.measure.rivals
    if rivals is None:
        rivals = ["ngram"] if parse(chosen) else ["ngram", f"ngram+{chosen}"]
    names = list(dict.fromkeys([chosen, *rivals]))
    labels = [label_of(name) for name in names]
    return {label if labels.count(label) == 1 else name: name for label, name in zip(labels, names, strict=True)}


def check_settings(cfg: DictConfig) -> None:
    """Refuse settings that are out of their range.

    Raises:
        ValueError: names the setting, its value, and what is allowed.
    """
    measure = cfg.measure
    for name in ("num_prompts", "max_new_tokens"):
        if measure[name] < 1:
            raise ValueError(f"measure.{name} is {measure[name]}, must be at least 1")
    if not measure.temperature > 0:
        raise ValueError(
            f"measure.temperature is {measure.temperature}, must be above 0: what is decoded is greedy in any case"
        )
    check_gammas(cfg, "measure")
    if not measure.batch_sizes or min(measure.batch_sizes) < 1:
        raise ValueError(f"measure.batch_sizes is {plain(measure.batch_sizes)}, must be numbers of at least 1")
    if measure.compile and max(measure.batch_sizes) > 1:
        raise ValueError(
            f"measure.batch_sizes is {plain(measure.batch_sizes)} and measure.compile is true: only calls with one "
            f"sequence are compiled, so that the sizes could not be compared; leave one of the two out"
        )
    check_engine_settings(cfg)
    check_compiles(cfg, "measure")
    check_contexts(cfg)
    check_hardware(cfg)


if __name__ == "__main__":
    main()
