"""Put together what was measured about a pair: tables of all drafters and γ, and what would make a γ pay."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from drafter.decoding.drafting import models_of, without_model
from drafter.decoding.evaluation import Task
from drafter.decoding.timings import CallTimings
from drafter.metrics import Estimate, by_prompt, estimate, paired_difference, read_row
from drafter.models.compatibility import Difference
from drafter.models.inspection import num_active_parameters
from experiments.reporting.measurement import (
    Calls,
    MeasuredRow,
    Measurement,
    best_row,
    fastest_other,
    measured_speedup,
)
from experiments.running.batches import batch_rows
from experiments.running.dry_run import counted
from experiments.running.inputs import plain
from experiments.running.measuring import (
    GREEDY,
    Answers,
    Conditions,
    Prediction,
    Requirement,
    find_requirement,
    mean_length,
)
from experiments.running.predictions import ExpectedCounts, expected_counts
from experiments.running.timed_pair import TimedPair

Predictions = Mapping[str, Mapping[str, Sequence[Prediction]]]  # by label, then greedy or the acceptance rule


def summarise(
    cfg: DictConfig,
    pair: TimedPair,
    tasks: Sequence[Task],
    answers: Answers,
    predictions: Predictions,
    counts: Sequence[Mapping[str, Any]],
    differences: Sequence[Difference],
) -> Measurement:
    """Return all that was found, without the settings of engines.

    Args:
        cfg: the config of `measure`.
        pair: the pair with its timings. Its first drafter is the one that is measured.
        tasks: the prompts, decoded greedily.
        answers: what the target generated.
        predictions: the predictions of each drafter.
        counts: the rows of counts.jsonl.
        differences: the harmless differences of the two models.
    """
    label, largest = next(iter(pair.drafters)), cfg.measure.largest
    drafter, timings = pair.plain_drafters[label], pair.timings[label]
    models, has_model = models_of(drafter), bool(models_of(drafter)) and not without_model(drafter)
    rows = all_rows(pair, tasks, answers, predictions, counts)
    best, other = best_row(rows, label), fastest_other(rows, label)
    requirement = Requirement(None, None)
    if has_model:
        conditions = pair.conditions[label]._replace(tokens=mean_length(answers.tokens[GREEDY]))
        factor = measured_speedup(best) / best.predicted.value
        accepts = answers.accepts[id(models[0])][GREEDY]
        requirement = find_requirement(accepts, timings, conditions, largest, factor)
    source = "built-in prompts" if cfg.measure.prompts is None else f"prompts of {cfg.measure.prompts}"
    replays = {"target": timings.target_replays, "drafter": timings.drafter_replays}
    return Measurement(
        target=cfg.target.path,
        drafter=cfg.measure.drafter,
        label=label,
        has_model=has_model,
        compatibility=compatibility(bool(models), differences),
        parameters=[
            f"The target is a {type(pair.plain_target).__name__} with {counted(pair.plain_target)}.",
            *(
                f"The drafter is a {type(one).__name__} with {counted(one)}: c = {size_ratio(pair, one):.2%}."
                for one in models
            ),
        ],
        size_ratio=size_ratio(pair, models[0]) if models else 0.0,
        prompts=f"{len(tasks)} {source}",
        lengths=(mean_length([task.prompt for task in tasks]), mean_length(answers.tokens[GREEDY])),
        temperature=cfg.measure.temperature,
        calls=Calls(
            timings.drafter,
            timings.target[0],
            [timings.verification(gamma) for gamma in range(1, largest + 1)],
            [name for name, has_states in replays.items() if has_states],
            pair.widths,
            cfg.measure.compile,
        ),
        acceptance_rates={
            key: float(torch.cat(list(of_key)).mean()) for key, of_key in answers.accepts[id(models[0])].items()
        }
        if has_model
        else {},
        by_rule={key: [one.block_efficiency for one in found] for key, found in predictions[label].items()},
        rows=rows,
        differs=any(one.what != "context" for one in differences),
        equal=(sum(row["like_the_target"] for row in counts), len(counts)),
        needed_rate=requirement.acceptance_rate,
        needed_ratio=requirement.ratio,
        rival=None if other is None else difference(counts, other, best),
        batches=batch_rows(pair, tasks, answers, plain(cfg.measure.batch_sizes), largest),
    )


def compatibility(has_model: bool, differences: Sequence[Difference]) -> list[str]:
    """Return sentences on how a target and a drafter fit together."""
    if not has_model:
        return ["The drafter has no model: it proposes tokens of the text so far, for any target."]
    return ["The two models give the same meaning to every token id.", *(f"They differ, {one}." for one in differences)]


def size_ratio(pair: TimedPair, model: Any) -> float:
    """Return a draft model's active parameters divided by the target's."""
    return num_active_parameters(model) / num_active_parameters(pair.plain_target)


def all_rows(
    pair: TimedPair,
    tasks: Sequence[Task],
    answers: Answers,
    predictions: Predictions,
    counts: Sequence[Mapping[str, Any]],
) -> list[MeasuredRow]:
    """Return a row for each drafter and γ."""
    rows, written = [], answers.tokens[GREEDY]
    for label, drafter in pair.plain_drafters.items():
        models, largest = models_of(drafter), len(predictions[label][GREEDY])
        # Where memory alone counts, a target call takes as long for any number of tokens.
        bound = CallTimings(size_ratio(pair, models[0]) if models else 0.0, [1.0] * (largest + 1))
        accepts = answers.accepts[id(models[0])][GREEDY] if models else None
        expected, of_bound = (
            expected_counts(tasks, written, pair.plain_target, drafter, timings, largest, accepts)
            for timings in (pair.timings[label], bound)
        )
        intervals = predicted_speedups(expected, pair.conditions[label])
        for gamma, (found, (efficiency, cost), speedup) in enumerate(
            zip(predictions[label][GREEDY], of_bound.ratios(), intervals, strict=True), start=1
        ):
            measured = by_prompt_of(counts, label, gamma)
            rows.append(
                MeasuredRow(
                    drafter=label,
                    gamma=gamma,
                    block_efficiency=found.block_efficiency,
                    cost=found.cost,
                    memory_bound=efficiency / cost,
                    predicted=speedup._replace(value=found.speedup),
                    measured=estimate(measured, "token_rate_ratio") if measured else None,
                )
            )
    return rows


def predicted_speedups(expected: ExpectedCounts, conditions: Conditions) -> list[Estimate]:
    """Return the predicted speed-up at each γ, with its interval from resampling prompts.

    The times of calls and of reading a prompt of mean length are taken to be exact.

    Args:
        expected: what is expected of decoding each answer.
        conditions: the times. The lengths of the answers take the place of those in the conditions.
    """

    def speedup(sums: np.ndarray) -> np.ndarray:
        found = [
            conditions._replace(tokens=tokens / prompts).speedup(tokens / blocks, cost / blocks)
            for prompts, tokens, blocks, cost in sums.reshape(-1, 4).tolist()
        ]
        return np.array(found).reshape(sums.shape[:-1])

    estimates, tokens_N = [], expected.tokens_N
    for blocks_N, costs_N in zip(expected.blocks_NG.T, expected.costs_NG.T, strict=True):
        rows_N4 = np.stack([np.ones(len(tokens_N)), tokens_N, blocks_N, costs_N], axis=-1)
        estimates.append(estimate({str(number): row for number, row in enumerate(rows_N4)}, speedup))
    return estimates


def by_prompt_of(counts: Sequence[Mapping[str, Any]], drafter: str, gamma: int) -> dict[str, Any]:
    """Return the counts of a drafter at one γ by prompt; none if it was not decoded."""
    chosen = [row for row in counts if (row["drafter"], row["gamma"]) == (drafter, gamma)]
    return by_prompt([row["prompt"] for row in chosen], [read_row(row) for row in chosen])


def difference(counts: Sequence[Mapping[str, Any]], row: MeasuredRow, reference: MeasuredRow) -> Estimate:
    """Return how much higher the speed-up of one row is than that of another, paired by prompt."""
    of_both = [by_prompt_of(counts, one.drafter, one.gamma) for one in (row, reference)]
    return paired_difference(of_both[0], of_both[1], "token_rate_ratio")
