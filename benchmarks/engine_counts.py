"""Pair the requests that an engine answered with and without a drafter, and report rates, ratios and block efficiency.

The first token of a text comes from the call that reads the prompt. Decoding is what follows: its tokens, its seconds
and its target calls are counted from there, so that ratio = τ / block cost holds exactly.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from drafter.decoding.generation import first_difference
from drafter.metrics import Counts, Estimate, by_prompt, estimate
from experiments.reporting.tabular import LEAST_PROMPTS, Table, with_interval_of
from experiments.running.engine_answers import Answer, decoding_counts

ALL = "all"  # the task of the pooled rows
NOTE = (
    "Rates are tokens per second of decoding, without the call that reads the prompt and yields the first token; the "
    "ratio of requests has the complete requests' time. In brackets: 95% bootstrap intervals over prompts; a row of "
    f"fewer than {LEAST_PROMPTS} prompts has none. τ is tokens per target call of decoding, accepted the share of "
    "drafted tokens that were accepted. A block's cost is the time per target call with drafts, relative to the "
    "target's time per token without; it is v + γc: c is the drafter's time per token when it decodes alone, relative "
    "to the target's, and v what remains, verification and all else."
)


class Measurement(NamedTuple):
    """An answer, and which request it belongs to.

    Attributes:
        prompt: the prompt's id.
        task: the prompt's task.
        repeat: the number of the pass over all prompts.
        decoder: "target" or "drafter", each alone, or "pair".
        gamma: the number of drafted tokens per block; 0 without a drafter.
        answer: what the engine answered.
    """

    prompt: str
    task: str
    repeat: int
    decoder: str
    gamma: int
    answer: Answer


class Pair(NamedTuple):
    """The answers to the same prompt in the same pass, with the drafter and without."""

    prompt: str
    drafted: Answer
    alone: Answer

    def decoding(self) -> Counts:
        """Return the counts after the first token."""
        return decoding_counts(self.drafted, self.alone)

    def request(self) -> Counts:
        """Return the counts of the complete requests; only the token rate is read from them."""
        tokens, baseline = self.drafted.generated, self.alone.generated
        return Counts(tokens, 0, 0, 0, self.drafted.seconds, baseline, self.alone.seconds)

    def first_difference(self) -> int | None:
        """Return the position of the first token in which the texts differ, or None."""
        return first_difference(self.drafted.tokens, self.alone.tokens)


class Summary(NamedTuple):
    """What was measured for a task and a gamma; see NOTE for the words.

    Attributes:
        task: the task, or ALL.
        gamma: drafted tokens per block.
        prompts: the number of prompts.
        rate_alone: the target's tokens per second.
        rate: the pair's.
        ratio: of the two.
        request_ratio: the same of complete requests.
        tau: tokens per target call.
        accepted: the share of drafted tokens that were accepted.
        block_cost: v + γc.
        c: the drafter's time per token.
        v: what remains of the block's cost.
        texts: the number of compared texts.
        differences: of each text that differs from the target's own, the position of the first token that does.
    """

    task: str
    gamma: int
    prompts: int
    rate_alone: float
    rate: float
    ratio: Estimate
    request_ratio: Estimate
    tau: Estimate
    accepted: float
    block_cost: float
    c: float
    v: float
    texts: int
    differences: list[int]

    def row(self) -> list[str]:
        """Return the cells of the table."""
        ratio, requests, tau = (
            with_interval_of(value, self.prompts) for value in (self.ratio, self.request_ratio, self.tau)
        )
        rates = [f"{self.rate_alone:.1f}", f"{self.rate:.1f}", ratio]
        counts = [requests, tau, f"{self.accepted:.0%}"]
        costs = [f"{self.block_cost:.2f}", f"{self.c:.3f}", f"{self.v:.2f}"]
        first = f", first difference at token {min(self.differences)}" if self.differences else ""
        equal = f"{self.texts - len(self.differences)} of {self.texts}{first}"
        return [self.task, str(self.gamma), str(self.prompts), *rates, *counts, *costs, equal]


def pairs(measurements: Iterable[Measurement], gamma: int, task: str = ALL) -> list[Pair]:
    """Return the pairs of a gamma and a task.

    Raises:
        KeyError: a request with the drafter has no request without, in the same pass.
    """
    chosen = [one for one in measurements if task in (ALL, one.task)]
    alone = {(one.prompt, one.repeat): one.answer for one in chosen if one.decoder == "target"}
    drafted = (one for one in chosen if one.decoder == "pair" and one.gamma == gamma)
    return [Pair(one.prompt, one.answer, alone[one.prompt, one.repeat]) for one in drafted]


def seconds_per_token(answers: Iterable[Answer]) -> float:
    """Return the time of decoding per token over all answers; NaN if no text has a second token."""
    found = [(one.decoding_seconds, one.generated - 1) for one in answers]
    tokens = sum(count for _, count in found)
    return sum(seconds for seconds, _ in found) / tokens if tokens else float("nan")


def summarise(measurements: Sequence[Measurement]) -> list[Summary]:
    """Return a summary of each task and gamma, and of all prompts if there are several tasks."""
    gammas = sorted({one.gamma for one in measurements if one.decoder == "pair"})
    tasks = list(dict.fromkeys(one.task for one in measurements))
    tasks += [ALL] if len(tasks) > 1 else []
    return [_summary(measurements, gamma, task) for task in tasks for gamma in gammas]


def _summary(measurements: Sequence[Measurement], gamma: int, task: str) -> Summary:
    found = pairs(measurements, gamma, task)
    ids = [pair.prompt for pair in found]
    decoding = by_prompt(ids, [pair.decoding() for pair in found])
    requests = by_prompt(ids, [pair.request() for pair in found])
    drafters = [one.answer for one in measurements if one.decoder == "drafter" and task in (ALL, one.task)]
    per_token = seconds_per_token(pair.alone for pair in found)
    c = seconds_per_token(drafters) / per_token
    calls = sum(pair.drafted.target_calls for pair in found)
    block_cost = sum(pair.drafted.decoding_seconds for pair in found) / max(calls, 1) / per_token
    drafted = sum(pair.drafted.drafted for pair in found)
    differences = [position for pair in found if (position := pair.first_difference()) is not None]
    return Summary(
        task,
        gamma,
        len(decoding),
        rate_alone=1 / per_token,
        rate=1 / seconds_per_token(pair.drafted for pair in found),
        ratio=estimate(decoding, "token_rate_ratio"),
        request_ratio=estimate(requests, "token_rate_ratio"),
        tau=estimate(decoding, "block_efficiency"),
        accepted=sum(pair.drafted.accepted for pair in found) / drafted if drafted else float("nan"),
        block_cost=block_cost,
        c=c,
        v=block_cost - gamma * c,
        texts=len(found),
        differences=differences,
    )


def table(engine: str, summaries: Sequence[Summary]) -> Table:
    """Return the table of an engine's summaries."""
    columns = ["task", "γ", "prompts", "tokens/s alone", "with drafter", "ratio", "ratio of requests", "τ"]
    columns += ["accepted", "block", "c", "v", "equal texts"]
    rows = [summary.row() for summary in summaries]
    return Table(f"engines-{engine}", f"Decoding with a drafter in {engine}", columns, rows, NOTE)


def record(measurement: Measurement) -> dict[str, Any]:
    """Return the JSON of a measurement, its text included."""
    return measurement._asdict() | {"answer": measurement.answer._asdict()}


def summary_record(summary: Summary) -> dict[str, Any]:
    """Return the JSON of a summary. A number that could not be measured, such as c of texts of one token, is null."""
    found = {
        name: value._asdict() if isinstance(value, Estimate) else value for name, value in summary._asdict().items()
    }
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in found.items()}
