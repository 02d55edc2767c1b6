"""Which γ is best for so many sequences side by side: predicted from timed calls, then decoded."""

from collections.abc import Sequence
from itertools import cycle, islice

from drafter.decoding.clock import now
from drafter.decoding.drafting import Drafter, models_of
from drafter.decoding.evaluation import Task
from drafter.decoding.speculative import autoregressive_decode_batch, speculative_decode_batch
from drafter.decoding.timings import CallTimings, measure_several
from experiments.reporting.measurement import BatchRow
from experiments.running.measuring import GREEDY, Answers
from experiments.running.predictions import expected_counts
from experiments.running.timed_pair import TimedPair

ROUNDS = 2  # how often all prompts are decoded, without and with the drafter in turn


def batch_rows(
    pair: TimedPair, tasks: Sequence[Task], answers: Answers, sizes: Sequence[int], largest: int
) -> list[BatchRow]:
    """Return the best γ of the first drafter for each number of sequences; none if only single ones are asked for.

    With it, or with the one nearest to paying, the prompts are also decoded side by side.

    Args:
        pair: the target and the drafters, not compiled.
        tasks: the prompts, decoded greedily.
        answers: what the target generated for them.
        sizes: the numbers of sequences.
        largest: the largest γ.
    """
    if list(sizes) == [1]:
        return []
    label, drafter = next(iter(pair.plain_drafters.items()))
    rows = []
    for size in sizes:
        timings = pair.timings[label]
        if size > 1:
            timings = measure_several(pair.plain_target, {label: drafter}, pair.prompt, largest, size)[label]
        speedups = speedups_with(pair, tasks, answers, timings, largest)
        best = max(speedups)
        gamma = speedups.index(best) + 1
        measured = decode_side_by_side(pair, drafter, tasks, size, gamma) if size > 1 else None
        rows.append(BatchRow(size, timings.ratio, gamma if best > 1 else 0, best, measured))
    return rows


def decode_side_by_side(pair: TimedPair, drafter: Drafter, tasks: Sequence[Task], size: int, gamma: int) -> float:
    """Return the token rate of so many sequences side by side, relative to the target alone, with the reading.

    Where there are fewer prompts than sequences, they are repeated. As one sequence ends, the next one takes its place.
    """
    chosen = list(islice(cycle(tasks), max(size, len(tasks))))
    prompts, options = [task.prompt for task in chosen], chosen[0].options
    seconds, tokens = [0.0, 0.0], [0, 0]
    ways = (
        lambda: autoregressive_decode_batch(pair.plain_target, prompts, options, batch_size=size),
        lambda: speculative_decode_batch(pair.plain_target, drafter, prompts, gamma, options, batch_size=size),
    )
    for _ in range(ROUNDS):
        for number, decode in enumerate(ways):
            began = now(pair.plain_target.device)
            tokens[number] += sum(len(one.tokens) for one in decode())
            seconds[number] += now(pair.plain_target.device) - began
    return tokens[1] / seconds[1] / (tokens[0] / seconds[0])


def speedups_with(
    pair: TimedPair, tasks: Sequence[Task], answers: Answers, timings: CallTimings, largest: int
) -> list[float]:
    """Return the first drafter's predicted speed-up at each γ with other timings, without the reading of prompts."""
    drafter = next(iter(pair.plain_drafters.values()))
    models = models_of(drafter)
    accepts = answers.accepts[id(models[0])][GREEDY] if models else None
    found = expected_counts(
        tasks, answers.tokens[GREEDY], pair.plain_target, drafter, timings, largest, accepts
    ).ratios()
    return [efficiency / cost for efficiency, cost in found]
