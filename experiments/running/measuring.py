"""Measure a pair on prompts that need no prepared data: predictions from what the target generates, then decoding."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter.data.prompts import encode_prompts
from drafter.data.sources import entries, source_of
from drafter.decoding.acceptance import RULES
from drafter.decoding.decoders import Decodable
from drafter.decoding.drafting import Drafter, models_of
from drafter.decoding.evaluation import Task, row_of
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode
from drafter.decoding.timings import CallTimings
from drafter.warping import Sampling
from experiments.running.inputs import plain
from experiments.running.predictions import acceptance_by_rule, block_efficiencies, expected_counts
from experiments.running.speedups import decode_prompt

GREEDY, SAMPLED = "greedy", "sampled"
SEVERAL = 2  # γ that are decoded for each drafter, unless the config names them
BISECTIONS = 12  # of the interval from 0 to 1, to find the acceptance rate that is needed
Prompt = tuple[str, str]  # its kind of task, and its text


def read_prompts(cfg: DictConfig) -> list[Prompt]:
    """Return the first prompts of the file in measure.prompts, or of the built-in ones, one of each kind in turn.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no prompt, or a row has no text where the template expects it.
    """
    if cfg.measure.prompts is None:
        by_kind = [[(kind, text) for text in texts] for kind, texts in plain(cfg.prompts).items()]
        prompts = [one for one in chain.from_iterable(zip_longest(*by_kind)) if one]
    else:
        source = source_of({"path": cfg.measure.prompts, "template": cfg.measure.template}, "measure.prompts")
        prompts = [("prompts", one.text) for one in entries(source) if not one.left_out]
    if not prompts:
        raise ValueError(f"measure.prompts is {cfg.measure.prompts}, which has no prompt: give a row for each prompt")
    return prompts[: cfg.measure.num_prompts]


def encode_tasks(
    cfg: DictConfig, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, context: int, stops: list[int]
) -> dict[str, list[Task]]:
    """Return the prompts as tasks, decoded greedily and sampled.

    Raises:
        ValueError: a prompt and its answer exceed the context.
    """
    settings = cfg.measure
    encoded = encode_prompts(tokenizer, [text for _, text in prompts], settings.max_new_tokens, context)
    samplings = {GREEDY: Sampling(0.0), SAMPLED: Sampling(settings.temperature, settings.top_p)}
    return {
        name: [
            Task(kind, f"{kind}:{number}", text, ids, DecodingOptions(settings.max_new_tokens, sampling, stops))
            for number, ((kind, text), ids) in enumerate(zip(prompts, encoded, strict=True))
        ]
        for name, sampling in samplings.items()
    }


def timed_prompt(tasks: Sequence[Task], largest: int, most: int) -> list[int]:
    """Return the tokens that are cached when calls are timed: as many as a sequence has on average while it grows.

    Args:
        tasks: the prompts.
        largest: the largest γ; the calls repeat the first tokens, so that there must be more than this.
        most: the most tokens that leave room for the calls in the context.

    Raises:
        ValueError: the context is too short.
    """
    if most <= largest:
        raise ValueError(
            f"measure.largest is {largest}, and the context has room for {most} tokens beside the calls that are "
            f"timed: lower measure.largest"
        )
    growing = [len(task.prompt) + task.options.max_new_tokens // 2 for task in tasks]
    length = min(max(sum(growing) // len(growing), largest + 1), most)
    tokens = list(chain.from_iterable(task.prompt for task in tasks))
    return (tokens * (length // len(tokens) + 1))[:length]


class Conditions(NamedTuple):
    """What a speed-up depends on beside τ and the cost of a block, as means over the prompts.

    Attributes:
        tokens: generated tokens of an answer.
        call: seconds of a target call with one token.
        reading: seconds in which the target reads a prompt.
        drafter_reading: seconds in which the draft model reads it; 0 without one.
    """

    tokens: float
    call: float
    reading: float = 0.0
    drafter_reading: float = 0.0

    def speedup(self, block_efficiency: float, cost: float) -> float:
        """Return the token rate relative to the target alone, with the time in which prompts are read.

        >>> without_reading, with_reading = Conditions(100, 0.01), Conditions(100, 0.01, 0.5, 0.1)
        >>> round(without_reading.speedup(2.0, 1.25), 2), round(with_reading.speedup(2.0, 1.25), 2)
        (1.62, 1.23)

        Args:
            block_efficiency: τ.
            cost: of a block, in target calls with one token.
        """
        alone = self.reading + (self.tokens - 1) * self.call
        blocks = max(self.tokens / block_efficiency - 1, 0)
        return alone / (self.reading + self.drafter_reading + blocks * cost * self.call)


class Answers(NamedTuple):
    """What the target generates alone, and how probable it is that a model's drafts are accepted.

    Attributes:
        tokens: greedy or sampled -> the tokens of each prompt's answer.
        accepts: draft model by id -> greedy, or the acceptance rule of the sampled answers -> for each answer the
            acceptance probabilities of its tokens, shape (L,).
    """

    tokens: dict[str, list[list[int]]]
    accepts: dict[int, dict[str, list[torch.Tensor]]]


def generate_answers(
    tasks: Mapping[str, Sequence[Task]],
    target: Decodable,
    plain_target: PreTrainedModel,
    models: Sequence[PreTrainedModel],
    seed: int,
    advance: Callable[[], None],
) -> Answers:
    """Let the target answer each prompt greedily and sampled, and let the models read the answers.

    Args:
        tasks: the prompts, decoded greedily and sampled.
        target: the target as it decodes.
        plain_target: the same as it reads an answer at once.
        models: the draft models.
        seed: the run's seed.
        advance: is called after each answer.
    """
    answers = Answers({name: [] for name in tasks}, {id(model): {} for model in models})
    for name, of_name in tasks.items():
        rules = {GREEDY: "ratio"} if name == GREEDY else {rule: rule for rule in RULES}
        for task in of_name:
            tokens = autoregressive_decode(target, task.prompt, task.options, task.random(target.device, seed)).tokens
            answers.tokens[name].append(tokens)
            for model in models:
                found = acceptance_by_rule(task, tokens, plain_target, model, list(rules.values()))
                for key, rule in rules.items():
                    answers.accepts[id(model)].setdefault(key, []).append(found[rule])
            advance()
    return answers


class Prediction(NamedTuple):
    """τ, the cost of a block in target calls, and the speed-up, with the prompts' reading, at one γ."""

    block_efficiency: float
    cost: float
    speedup: float


def predict_all(
    tasks: Mapping[str, Sequence[Task]],
    answers: Answers,
    target: PreTrainedModel,
    drafter: Drafter,
    timings: CallTimings,
    conditions: Conditions,
    largest: int,
) -> dict[str, list[Prediction]]:
    """Return the predictions at γ = 1 … largest: greedy, and for sampled answers by acceptance rule.

    The rules are one for drafts without a model, which count as certain. The lengths of the answers take the place of
    those in the conditions.
    """
    models, found = models_of(drafter), {}
    for key in (GREEDY, *RULES):
        name = GREEDY if key == GREEDY else SAMPLED
        of_name = conditions._replace(tokens=mean_length(answers.tokens[name]))
        accepts = answers.accepts[id(models[0])][key] if models else None
        pairs = expected_counts(tasks[name], answers.tokens[name], target, drafter, timings, largest, accepts).ratios()
        found[key] = [Prediction(*pair, of_name.speedup(*pair)) for pair in pairs]
    return found


def mean_length(answers: Sequence[Sequence[int]]) -> float:
    """Return the mean number of tokens."""
    return sum(map(len, answers)) / len(answers)


class Requirement(NamedTuple):
    """What a draft model would need to make some γ pay, each with all else unchanged.

    Attributes:
        acceptance_rate: more than this acceptance rate; None if none is enough.
        ratio: a c below this; None if no drafter is cheap enough.
    """

    acceptance_rate: float | None
    ratio: float | None


def find_requirement(
    accepts: Sequence[torch.Tensor], timings: CallTimings, conditions: Conditions, largest: int, factor: float
) -> Requirement:
    """Return what a draft model would need, by the prediction times a factor.

    Its acceptance rate rises by the same share of each token's rejection probability, so that hard tokens stay hard.

    Args:
        accepts: the acceptance probabilities of the tokens of each answer, shape (L,).
        timings: c and v.
        conditions: see `Conditions`.
        largest: the largest γ.
        factor: measured by predicted speed-up, where both are known.
    """

    def raised(share: float) -> list[torch.Tensor]:
        return [accept_L + (1 - accept_L) * share for accept_L in accepts]

    def pays(share: float) -> bool:
        efficiencies = block_efficiencies(raised(share), largest)
        speedups = [conditions.speedup(one, timings.block(gamma)) for gamma, one in enumerate(efficiencies, start=1)]
        return factor * max(speedups) > 1

    rate = None
    if pays(1.0):
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        rate = float(torch.cat(raised(high)).mean())
    cheapest = [
        most_ratio(efficiency, gamma, timings, conditions, factor)
        for gamma, efficiency in enumerate(block_efficiencies(accepts, largest), start=1)
    ]
    ratio = max(cheapest)
    return Requirement(rate, ratio if ratio > 0 else None)


def most_ratio(
    block_efficiency: float, gamma: int, timings: CallTimings, conditions: Conditions, factor: float
) -> float:
    """Return the largest c at which a γ pays: where cγ + v and the reading of prompts take the target's own time."""
    one = conditions
    time = factor * (one.reading + (one.tokens - 1) * one.call) - one.reading - one.drafter_reading
    blocks = max(one.tokens / block_efficiency - 1, 1e-9)
    cost: float = time / (blocks * one.call)
    return (cost - timings.scoring(gamma)) / (gamma + timings.drafter_replays)


def choose_gammas(predictions: Sequence[Prediction], decode: Sequence[int] | None) -> list[int]:
    """Return the γ to decode with: those of the config, or the two with the highest predicted speed-up."""
    if decode is not None:
        return list(decode)
    order = sorted(range(len(predictions)), key=lambda index: predictions[index].speedup, reverse=True)
    return sorted(index + 1 for index in order[:SEVERAL])


def decode_all(
    tasks: Sequence[Task],
    target: Decodable,
    alone: Decodable,
    drafters: Mapping[str, Drafter],
    gammas: Mapping[str, Sequence[int]],
    seed: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Decode every prompt with the target alone and, right after it, with each drafter at its γ; return rows of counts.

    Args:
        tasks: the prompts.
        target: the target.
        alone: the target as it decodes alone.
        drafters: the drafters by name.
        gammas: the γ of each drafter.
        seed: the run's seed.
        advance: is called after each prompt.
    """
    rows = []
    for task in tasks:
        found = decode_prompt(task, target, drafters, gammas, seed, alone)
        for (name, gamma), decoded in found.drafted.items():
            rows.append({"drafter": name, **row_of(task, gamma, task.options.rule, decoded, found.baseline)})
        advance()
    return rows
