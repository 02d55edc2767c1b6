"""Time the calls of a measured pair with long sequences in the cache, and predict the speed-up there."""

import logging
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.decoding.drafting import models_of
from drafter.decoding.evaluation import Task
from drafter.decoding.timings import DRAFTS, REPEATS, WARM_UP, CallTimings
from drafter.models.inspection import num_active_parameters
from drafter.models.loading import context_length, context_limit
from experiments.reporting.measurement import ContextRow
from experiments.running.batches import speedups_with
from experiments.running.inputs import target_source
from experiments.running.measuring import Answers
from experiments.running.named_drafters import model_of, model_source
from experiments.running.speedups import WIDEST, Prepared
from experiments.running.timed_pair import TimedPair

log = logging.getLogger(__name__)


def check_contexts(cfg: DictConfig) -> None:
    """Refuse contexts that cannot be timed, before anything is loaded.

    Raises:
        ValueError: a context is not longer than the largest γ, longer than that of a model, or both models are to be
            compiled on a GPU.
    """
    measure, target = cfg.measure, target_source(cfg)
    contexts, model = list(measure.contexts or []), model_of(str(measure.drafter))
    if not contexts:
        return
    if min(contexts) <= measure.largest:
        raise ValueError(
            f"measure.contexts is {contexts}, must be numbers above measure.largest={measure.largest}: the timed calls "
            f"repeat the first tokens"
        )
    limits = {target.path: context_limit(target)}
    if model:
        limits[model] = context_limit(model_source(cfg, model))
    if max(contexts) > min(limits.values()):
        found = ", ".join(f"{path} has a context of {limit} tokens" for path, limit in limits.items())
        raise ValueError(f"measure.contexts has {max(contexts)}, and {found}: give at most {min(limits.values())}")
    if measure.compile and torch.cuda.is_available():
        raise ValueError(
            f"measure.contexts is {contexts} and measure.compile is true: on a GPU every compiled call attends to "
            f"the whole cache, so that one for {max(contexts)} tokens would slow down all others; leave one of the two "
            f"out"
        )


def context_rows(
    pair: TimedPair,
    tasks: Sequence[Task],
    answers: Answers,
    contexts: Sequence[int],
    largest: int,
    expected: Callable[[int], CallTimings] | None,
) -> list[ContextRow]:
    """Return c, v(γ) and the predicted speed-ups of the first drafter for each number of tokens in the cache.

    Args:
        pair: the pair.
        tasks: the prompts, decoded greedily.
        answers: what the target generated, from which τ is taken.
        contexts: the numbers of tokens. Where a model's context ends, there are fewer, so that the calls fit.
        largest: the largest γ.
        expected: gives the roofline's timings for so many tokens; None to leave them out.
    """
    label = next(iter(pair.drafters))
    drafter, rows = pair.drafters[label], []
    prepared = Prepared(pair.target, drafter, pair.widths, pair.alone)
    for cached in (cached_tokens(pair, context, largest) for context in contexts):
        log.info("measure: timing calls with %s tokens in the cache", f"{cached:,}")
        timings = prepared.time_calls({label: drafter}, long_prompt(tasks, cached), largest)[label]
        row = row_of(pair, tasks, answers, timings, largest, cached)
        by_roofline = row_of(pair, tasks, answers, expected(cached), largest, cached) if expected else None
        rows.append(row._replace(roofline=by_roofline))
    return rows


def row_of(
    pair: TimedPair, tasks: Sequence[Task], answers: Answers, timings: CallTimings, largest: int, cached: int
) -> ContextRow:
    """Return c, v(γ) and the predicted speed-ups that follow from the timings with so many tokens in the cache."""
    verification = [timings.verification(gamma) for gamma in range(1, largest + 1)]
    return ContextRow(
        cached, timings.ratio, verification, speedups_with(pair, tasks, answers, timings, largest), roofline=None
    )


def cached_tokens(pair: TimedPair, context: int, largest: int) -> int:
    """Return how many tokens are cached for a context, so that the calls do not exceed that of either model."""
    models = [pair.plain_target, *models_of(next(iter(pair.plain_drafters.values())))]
    return min(context, min(map(context_length, models)) - max(WIDEST, largest + 1))


def long_prompt(tasks: Sequence[Task], length: int) -> list[int]:
    """Return so many tokens: those of all prompts, repeated."""
    tokens = list(chain.from_iterable(task.prompt for task in tasks))
    return (tokens * (length // len(tokens) + 1))[:length]


def context_seconds(pair: TimedPair, tasks: Sequence[Task], contexts: Sequence[int]) -> float:
    """Return about how many seconds `context_rows` takes, from the times of short prompts and of calls after them.

    Both grow with attention as its operations do, beside the two of each parameter (Kaplan et al., arXiv 2001.08361,
    section 2.1): 4 per layer, hidden unit and token that is attended to.
    """
    (timings, *_), (conditions, *_) = pair.timings.values(), pair.conditions.values()
    mean = sum(len(task.prompt) for task in tasks) // len(tasks)
    read = (conditions.reading + conditions.drafter_reading) / mean * (1 if pair.alone is pair.target else 2)
    calls = (WARM_UP + REPEATS) * (DRAFTS * timings.drafter + sum(timings.target))
    attention = [attention_share(pair.plain_target, context) for context in contexts]
    return sum(
        read * context * (1 + share / 2) + calls * (1 + share)
        for context, share in zip(contexts, attention, strict=True)
    )


def attention_share(model: PreTrainedModel, context: int) -> float:
    """Return the operations of a token's attention to a context, divided by those of a model's parameters."""
    config = model.config.get_text_config()
    share: float = 2 * config.num_hidden_layers * config.hidden_size * context / num_active_parameters(model)
    return share
