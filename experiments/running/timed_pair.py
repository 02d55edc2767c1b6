"""Load a target with several drafters, make their calls as fast as this project can, and time them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.decoding.capabilities import check_side_by_side
from drafter.decoding.clock import now
from drafter.decoding.decoders import Decodable
from drafter.decoding.drafting import Drafter, models_of, with_models
from drafter.decoding.evaluation import Task
from drafter.decoding.timings import REPEATS, WARM_UP, CallTimings, measure_reading
from drafter.models.loading import context_length, load_target
from drafter.models.packing import pack
from experiments.running.inputs import target_source
from experiments.running.measuring import Conditions, timed_prompt
from experiments.running.named_drafters import load_named
from experiments.running.progress import duration
from experiments.running.speedups import WIDEST, compile_pair, prepare_pair

log = logging.getLogger(__name__)


class TimedPair(NamedTuple):
    """A target with drafters by name, the first of which is the one that is measured.

    Attributes:
        target: the target as it decodes with a drafter: padded, perhaps compiled.
        alone: the target as it decodes alone.
        plain_target: the target as it reads a whole sequence.
        drafters: the drafters as they decode.
        plain_drafters: the drafters with models that read a whole sequence.
        timings: c and v of each drafter.
        conditions: the reading of prompts with each drafter; answers are taken to have the most tokens.
        widths: number of tokens -> number to which target calls are padded.
        prompt: the tokens that were cached when calls were timed.
    """

    target: Decodable
    alone: Decodable
    plain_target: PreTrainedModel
    drafters: Mapping[str, Drafter]
    plain_drafters: Mapping[str, Drafter]
    timings: Mapping[str, CallTimings]
    conditions: Mapping[str, Conditions]
    widths: dict[int, int]
    prompt: list[int]

    @property
    def models(self) -> list[PreTrainedModel]:
        """Return the draft models, each once."""
        found = {id(model): model for drafter in self.plain_drafters.values() for model in models_of(drafter)}
        return list(found.values())


def load_and_time(cfg: DictConfig, names: Mapping[str, str], tasks: Sequence[Task], decodings: int) -> TimedPair:
    """Load the models, and time their calls and the reading of a prompt of mean length.

    Args:
        cfg: the config of `measure`.
        names: the label of each drafter -> its name. The first one's model is compiled if any is.
        tasks: the prompts.
        decodings: how often each prompt will be decoded, for the line that says about how long everything takes.

    Raises:
        ValueError: the context is too short for the timed calls, or a model cannot decode the sequences of
            measure.batch_sizes side by side.
    """
    device, largest = "cuda" if torch.cuda.is_available() else "cpu", cfg.measure.largest
    target, loaded = load_target(target_source(cfg)).to(device), dict[str, PreTrainedModel]()
    plain_drafters = {
        label: with_models(load_named(cfg, name, target, loaded), lambda model: model.to(device))
        for label, name in names.items()
    }
    first, context = next(iter(plain_drafters.values())), min(map(context_length, (target, *loaded.values())))
    prompt = timed_prompt(tasks, largest, context - WIDEST)
    if max(cfg.measure.batch_sizes) > 1:
        for model in (target, *models_of(first)):
            check_side_by_side(model, len(prompt) + largest + 1)
    log.info(
        "measure: roughly %s in all%s, by the first calls of the target; a closer estimate follows the timed calls",
        duration(rough_seconds(*first_times(target, tasks[0].prompt), tasks, decodings, cfg.measure)),
        ", and minutes to compile" if cfg.measure.compile else "",
    )
    if cfg.measure.compile:
        answered = [len(task.prompt) + task.options.max_new_tokens for task in tasks]
        longest = max([*answered, *(cfg.measure.contexts or ())])
        pair = compile_pair(target, first, prompt, longest + max(WIDEST, largest + 1), largest, cfg.measure.decode)
    else:
        pair = prepare_pair(target, first, prompt, largest, cfg.measure.pad)
    fast = {id(plain): model for plain, model in zip(models_of(first), models_of(pair.drafter), strict=True)}
    for model in loaded.values():
        if id(model) not in fast:
            pack(model)
    drafters = {label: with_models(one, replace_by(fast)) for label, one in plain_drafters.items()}
    timings = pair.time_calls(drafters, prompt, largest)
    mean = sum(len(task.prompt) for task in tasks) // len(tasks)
    conditions = {}
    for label, drafter in drafters.items():
        reading = measure_reading(pair.target, drafter, (prompt * (mean // len(prompt) + 1))[:mean])
        conditions[label] = Conditions(cfg.measure.max_new_tokens, timings[label].target[0], *reading)
    return TimedPair(
        pair.target, pair.alone, target, drafters, plain_drafters, timings, conditions, pair.widths, prompt
    )


def replace_by(fast: Mapping[int, Decodable]) -> Callable[[Decodable], Decodable]:
    """Return a function that replaces a model by its compiled form, if it has one."""
    return lambda model: fast.get(id(model), model)


@torch.inference_mode()
def first_times(target: PreTrainedModel, prompt: Sequence[int]) -> tuple[float, float]:
    """Return the seconds of a target call with one token and, per token, of reading a prompt, each timed once."""
    seconds = []
    for ids in (prompt[:1], prompt[:1], prompt):  # the first call is slower than all others
        began = now(target.device)
        target(input_ids=torch.tensor([list(ids)], device=target.device), use_cache=False)
        seconds.append(now(target.device) - began)
    return seconds[1], seconds[2] / len(prompt)


def rough_seconds(call: float, reading: float, tasks: Sequence[Task], decodings: int, measure: DictConfig) -> float:
    """Return about how many seconds a measurement takes, before its calls are timed and without compiling.

    Drafts are taken to save no time and to cost none, every answer to have the most tokens, and a call to take as long
    with several tokens as with one.

    Args:
        call: seconds of a target call with one token.
        reading: seconds per token in which the target reads a prompt.
        tasks: the prompts.
        decodings: how often each is decoded, with the drafters and without.
        measure: the settings.
    """
    sizes, contexts = measure.batch_sizes, measure.contexts or []
    rounds = 1 + bool(measure.pad) + len(contexts) + sum(size for size in sizes if size > 1)
    timing = rounds * (WARM_UP + REPEATS) * (measure.largest + 1) * call
    prompts = sum(len(task.prompt) for task in tasks) * reading
    return decodings * (prompts + len(tasks) * measure.max_new_tokens * call) + timing + sum(contexts) * reading


def expected_seconds(pair: TimedPair, prompts: int, decodings: int, batch_sizes: Sequence[int]) -> float:
    """Return the seconds that a measurement takes if drafts save no time and every answer has the most tokens.

    Args:
        pair: the pair.
        prompts: the number of prompts.
        decodings: how often each is decoded, with the drafters and without.
        batch_sizes: the numbers of sequences for which calls are timed.
    """
    timings, conditions = next(iter(pair.timings.values())), next(iter(pair.conditions.values()))
    one = conditions.reading + conditions.drafter_reading + conditions.tokens * conditions.call
    calls = (WARM_UP + REPEATS) * (timings.drafter + sum(timings.target))
    return prompts * decodings * one + calls * sum(size for size in batch_sizes if size > 1)
