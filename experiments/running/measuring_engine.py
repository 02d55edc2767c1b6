"""Measure a pair by the counters of an engine that serves it: find the servers, ask them, and pool what they count."""

from collections.abc import Sequence
from typing import NamedTuple

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from drafter.data.engines import Limits
from drafter.data.http_client import HttpClient, Retries, ServerError
from drafter.data.served import check_vocabulary
from drafter.decoding.drafting import models_of
from drafter.decoding.evaluation import Task
from drafter.metrics import by_prompt, estimate
from drafter.models.loading import load_tokenizer
from drafter.models.trimming import read_kept
from experiments.reporting.engine_section import EngineFigures
from experiments.reporting.measurement import MeasuredRow
from experiments.running.engine_answers import ASK, Answer, decoding_counts, reported_gamma
from experiments.running.inputs import target_source
from experiments.running.measuring import GREEDY, Answers
from experiments.running.named_drafters import model_of
from experiments.running.predictions import expected_counts
from experiments.running.progress import Progress
from experiments.running.timed_pair import TimedPair

RETRIES = Retries(retries=1, patience=0.0)


class Servers(NamedTuple):
    """The servers of a pair.

    Attributes:
        engine: llama-server, vllm or sglang.
        drafted: asks the server with the drafter.
        alone: asks the server without it; None if there is none.
        gamma: γ of the server with the drafter.
        limits: how an answer ends.
    """

    engine: str
    drafted: HttpClient
    alone: HttpClient | None
    gamma: int
    limits: Limits

    def ask(self, client: HttpClient, prompt: list[int]) -> Answer:
        """Return a server's greedy answer to a prompt."""
        try:
            return ASK[self.engine](client, prompt, self.limits, self.gamma if client is self.drafted else 0)
        finally:
            client.close()  # a server ends a connection that is idle while the other one is asked


Pair = tuple[Answer, Answer | None]  # the answers to a prompt with the drafter and without


def check_engine_settings(cfg: DictConfig) -> None:
    """Refuse settings of an engine that cannot be used, before any server is asked.

    Raises:
        ValueError: names the setting, its value, and what is allowed.
    """
    measure = cfg.measure
    if measure.engine is None:
        for name in ("url", "url_alone", "engine_gamma"):
            if measure[name] is not None:
                raise ValueError(
                    f"measure.{name} is {measure[name]}, so measure.engine must be one of {', '.join(ASK)}"
                )
        return
    if measure.engine not in ASK:
        raise ValueError(f"measure.engine is {measure.engine}, must be null or one of {', '.join(ASK)}")
    if measure.url is None:
        raise ValueError("measure.url is null: give the address of the server with the drafter, or no measure.engine")
    if measure.url == measure.url_alone:
        raise ValueError(f"measure.url_alone is measure.url, {measure.url}: it must be a server without a drafter")
    for url in filter(None, (measure.url, measure.url_alone)):
        HttpClient(url)
    model = model_of(measure.drafter)
    if model and read_kept(model) is not None:
        raise ValueError(
            f"measure.drafter is {measure.drafter}, whose output embedding is trimmed by its kept_tokens.json. No "
            f"engine reads it: its drafts differ from those here. Measure a copy without that file"
        )
    gamma = measure.engine_gamma
    if gamma is not None and not 1 <= gamma <= measure.largest:
        raise ValueError(f"measure.engine_gamma is {gamma}, must be 1 to measure.largest={measure.largest}")


def find_servers(cfg: DictConfig, tasks: Sequence[Task]) -> Servers | None:
    """Ask each server of the config for a first answer, and find out γ; None if no engine is given.

    Raises:
        ServerError: a server does not answer, has another vocabulary, drafts nothing, or drafts where it must not.
        ValueError: γ is not known, or not among those that are predicted.
    """
    measure = cfg.measure
    if measure.engine is None:
        return None
    tokenizer = load_tokenizer(target_source(cfg))
    limits = Limits(1.0, measure.max_new_tokens, list(tasks[0].options.stop_ids))
    clients = [HttpClient(url, limits=RETRIES) if url else None for url in (measure.url, measure.url_alone)]
    drafted, alone = clients
    assert drafted is not None
    servers = Servers(measure.engine, drafted, alone, 0, limits)
    answer = first_answer(servers, drafted, tasks, tokenizer)
    if not answer.drafted:
        raise ServerError(
            f"{drafted.url} drafted nothing in an answer of {answer.generated} tokens: measure.url must be a server "
            f"that was started with the drafter (the page of a measurement without measure.engine has the command)"
        )
    if alone and (other := first_answer(servers, alone, tasks, tokenizer)).drafted:
        raise ServerError(
            f"{alone.url} drafted {other.drafted} tokens: measure.url_alone must be a server without a drafter"
        )
    try:
        reported = reported_gamma(measure.engine, drafted, answer)
    finally:
        drafted.close()
    return servers._replace(gamma=find_gamma(cfg, reported, drafted.url))


def first_answer(
    servers: Servers, client: HttpClient, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase
) -> Answer:
    """Return the first answer in which a block has room for drafts, after a check of the server's vocabulary."""
    for task in tasks:
        answer = servers.ask(client, task.prompt)
        check_vocabulary(client.url, tokenizer, answer.tokens, answer.text, servers.limits.stop_ids)
        if answer.generated > 2:
            return answer
    return answer


def find_gamma(cfg: DictConfig, reported: int | None, url: str) -> int:
    """Return γ of a server: as it reports it, or as the config says.

    Raises:
        ValueError: neither says it, the two differ, or it is above the largest γ that is predicted.
    """
    given, largest = cfg.measure.engine_gamma, cfg.measure.largest
    if given is None and reported is None:
        raise ValueError(
            f"measure.engine_gamma is null, and {url} does not report γ: set it to the γ that the server was started "
            f"with (llama-server reports it if it was started with --metrics)"
        )
    if given is not None and reported not in (None, given):
        raise ValueError(f"measure.engine_gamma is {given}, but {url} reports γ = {reported}: leave the setting out")
    gamma = given or reported
    assert gamma is not None
    if gamma > largest:
        raise ValueError(f"{url} has γ = {gamma}, but measure.largest is {largest}: set measure.largest={gamma}")
    return int(gamma)


def ask_servers(servers: Servers, tasks: Sequence[Task]) -> list[Pair]:
    """Return both servers' answers to each prompt, one request after the other, each server first in turn."""
    pairs = []
    with Progress(f"measure: {servers.engine}", "prompt") as progress:
        for number, task in enumerate(tasks):
            clients = [servers.drafted, *([servers.alone] if servers.alone else [])]
            order = list(reversed(clients)) if number % 2 else clients
            found = {id(client): servers.ask(client, task.prompt) for client in order}
            pairs.append((found[id(servers.drafted)], found[id(servers.alone)] if servers.alone else None))
            progress(number + 1, len(tasks))
    return pairs


def summarise_engine(
    servers: Servers,
    pairs: Sequence[Pair],
    pair: TimedPair,
    tasks: Sequence[Task],
    answers: Answers,
    rows: Sequence[MeasuredRow],
) -> EngineFigures:
    """Return what an engine counted, pooled over prompts, beside what this project finds at the same γ.

    Args:
        servers: the servers.
        pairs: their answers to each prompt.
        pair: the pair here. Its first drafter is the one that is measured.
        tasks: the prompts, decoded greedily.
        answers: what the target generated here.
        rows: the drafters' rows of the page.
    """
    label = next(iter(pair.plain_drafters))
    known = [(task.prompt_id, *both) for task, both in zip(tasks, pairs, strict=True) if both[0].target_calls]
    counts = by_prompt([name for name, *_ in known], [decoding_counts(one, alone) for _, one, alone in known])
    drafted = [one for _, one, _ in known]
    alones = [alone for *_, alone in known if alone]
    calls, drafts = (sum(getattr(one, name) for one in drafted) for name in ("target_calls", "drafted"))
    row = next(row for row in rows if (row.drafter, row.gamma) == (label, servers.gamma))
    stops = set(servers.limits.stop_ids)
    same = [
        without_end(one.tokens, stops) == without_end(own, stops)
        for (one, _), own in zip(pairs, answers.tokens[GREEDY], strict=True)
    ]
    return EngineFigures(
        engine=servers.engine,
        gamma=servers.gamma,
        tau=estimate(counts, "block_efficiency"),
        accepted=sum(one.accepted for one in drafted) / drafts,
        drafts_per_call=drafts / calls,
        rate=token_rate(drafted),
        rate_alone=token_rate(alones) if alones else None,
        ratio=estimate(counts, "token_rate_ratio") if alones else None,
        own_tau=own_block_efficiency(pair, tasks, answers, servers.gamma),
        own_speedup=row.measured,
        own_prediction=row.predicted.value,
        equal=(sum(same), len(same)),
    )


def token_rate(answers: Sequence[Answer]) -> float:
    """Return the tokens per second after the first token of each answer."""
    return sum(one.generated - 1 for one in answers) / sum(one.decoding_seconds for one in answers)


def without_end(tokens: Sequence[int], stops: set[int]) -> list[int]:
    """Return a text's tokens without the one that ends it, which some engines leave out.

    >>> without_end([5, 6, 2], {2}), without_end([5, 6], {2})
    ([5, 6], [5, 6])
    """
    return list(tokens[:-1] if tokens and tokens[-1] in stops else tokens)


def own_block_efficiency(pair: TimedPair, tasks: Sequence[Task], answers: Answers, gamma: int) -> float:
    """Return τ of greedy decoding here, counted as engines do: the blocks begin after the first token.

    It follows from what the target generated. At temperature 0 this is τ of decoding.
    """
    label, drafter = next(iter(pair.plain_drafters.items()))
    texts, models = answers.tokens[GREEDY], models_of(drafter)
    chosen = [number for number, text in enumerate(texts) if len(text) > 1]
    after_first = [tasks[one]._replace(prompt=[*tasks[one].prompt, texts[one][0]]) for one in chosen]
    accepts = [answers.accepts[id(models[0])][GREEDY][one][1:] for one in chosen] if models else None
    rest = [texts[one][1:] for one in chosen]
    return expected_counts(after_first, rest, pair.plain_target, drafter, pair.timings[label], gamma, accepts).ratios()[
        gamma - 1
    ][0]
