"""The time of model calls, and the speed-up of speculative decoding that follows from it for each gamma.

Let c be the time of a drafter call and v(gamma) that of a target call with gamma + 1 tokens, both divided by the time
of a target call with one token. A block then takes as long as c gamma + v(gamma) target calls and gives tau(gamma)
tokens, so the speed-up is tau / (c gamma + v). Leviathan et al. (arXiv 2211.17192, theorem 3.8) assume v = 1; so does
the memory-bound speed-up (MBSU), with c from the numbers of parameters.

A model with states reads the accepted tokens of a block again if a draft was rejected (see `stateful`). A block is
taken to do so always, and to read gamma tokens again: this overestimates its time by what the accepted blocks save.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from drafter.decoding.batched import RaggedDecoder
from drafter.decoding.capabilities import check_side_by_side, decoder_of
from drafter.decoding.clock import now
from drafter.decoding.decoders import CachedModel, Decodable, plain_model
from drafter.decoding.drafting import Drafter, models_of, without_model
from drafter.decoding.generation import Generation
from drafter.decoding.stateful import StatefulDecoder

REPEATS = 15
WARM_UP = 2
READINGS = 3  # of a whole prompt, which take long
DRAFTS = 3  # drafter calls that are timed in a row, as in a block: the first one finds other data in the CPU's cache
LEAST_GAIN = 0.05  # of the time of a call, for which it is padded


class CallTimings(NamedTuple):
    """The seconds of model calls.

    Attributes:
        drafter: of a drafter call with one token, as a mean over those of a block; without a draft model, of a proposal
            of a block's drafts.
        target: of target calls with 1, 2, … tokens.
        drafter_replays: the drafter has states.
        target_replays: the target has states.
    """

    drafter: float
    target: list[float]
    drafter_replays: bool = False
    target_replays: bool = False

    @property
    def ratio(self) -> float:
        """The ratio c of a drafter call to a target call with one token."""
        return self.drafter / self.target[0]

    def verification(self, gamma: int) -> float:
        """Return v(gamma), the ratio of a target call with gamma + 1 tokens to one with one token."""
        return self.target[gamma] / self.target[0]

    def widths(self) -> dict[int, int]:
        """Return the padding that pays: number of tokens -> a larger one whose target calls took less time.

        Padding would change the states of a target that has any.

        >>> CallTimings(0.1, [1.0, 1.7, 2.0, 1.3, 1.25]).widths()
        {2: 5, 3: 5}
        """
        cheapest: dict[int, int] = {}
        for count, seconds in enumerate([] if self.target_replays else self.target, start=1):
            least = min(self.target[count - 1 :])
            if least < (1 - LEAST_GAIN) * seconds:
                cheapest[count] = self.target.index(least, count) + 1
        return cheapest

    def block(self, gamma: int) -> float:
        """Return the time of a block, c gamma + v(gamma) and the replays, in target calls with one token."""
        return self.drafting(gamma) + self.scoring(gamma)

    def drafting(self, gamma: int) -> float:
        """Return the time in which a draft model drafts gamma tokens, with its replay."""
        return self.ratio * (gamma + self.drafter_replays)

    def scoring(self, drafts: int) -> float:
        """Return the time in which the target scores so many drafts, with its replay. There is none without drafts."""
        replay = self.verification(drafts - 1) if drafts and self.target_replays else 0
        return self.verification(drafts) + replay


def measure_call_timings(target: Decodable, drafter: Drafter, prompt: list[int], largest: int) -> CallTimings:
    """Return the median wall-clock time of each kind of call, with a prompt in the cache.

    Args:
        target: the target.
        drafter: the drafter. Beside a draft model, the time of proposals without a model is left out.
        prompt: the tokens that are cached first; the timed calls repeat its beginning.
        largest: the largest gamma; target calls with 1 to largest + 1 tokens are timed.

    Raises:
        ValueError: the prompt is shorter than the longest call.
    """
    return measure_several(target, {"": drafter}, prompt, largest)[""]


@torch.inference_mode()
def measure_several(
    target: Decodable, drafters: Mapping[str, Drafter], prompt: list[int], largest: int, rows: int = 1
) -> dict[str, CallTimings]:
    """Return the same for several drafters by name, of calls with one sequence or with several of the same length.

    The kinds of calls take turns, so that a change in the machine's speed affects all alike. A draft model that several
    drafters have is timed once.

    Args:
        target: see `measure_call_timings`.
        drafters: see `measure_call_timings`.
        prompt: see `measure_call_timings`.
        largest: see `measure_call_timings`.
        rows: the number of sequences that are decoded side by side.

    Raises:
        ValueError: the prompt is shorter than the longest call, or a model cannot decode side by side.
    """
    if len(prompt) <= largest:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, and calls with up to gamma + 1 = {largest + 1} of them are timed: "
            f"give a longer prompt or a smaller gamma"
        )
    capacity = len(prompt) + largest + 1

    def started(model: Decodable) -> CachedModel:
        if rows > 1:
            check_side_by_side(plain_model(model), capacity)
        made = decoder_of(model) if rows == 1 else RaggedDecoder(plain_model(model), capacity)
        made.forward([prompt] * rows, [0] * rows, 1)
        return made

    def call(decoder: CachedModel, count: int) -> Callable[[], object]:
        return partial(decoder.forward, [prompt[:count]] * rows, [len(prompt)] * rows, count)

    def draft(decoder: CachedModel) -> None:
        for start in range(len(prompt), len(prompt) + drafts):
            decoder.forward([prompt[:1]] * rows, [start] * rows, 1)

    of_target, decoders, drafts = started(target), dict[int, CachedModel](), min(DRAFTS, largest)
    calls: dict[str, Callable[[], object]] = {}
    for name, drafter in drafters.items():
        if models := models_of(drafter):
            key = id(models[0])
            decoders[key] = decoders.get(key) or started(models[0])
            calls[f"model {key}"] = partial(draft, decoders[key])
        else:
            sequence = Generation(list(prompt), len(prompt), len(prompt) + largest)
            calls[name] = partial(without_model(drafter)[0].propose, sequence, largest)
    longer = {f"target {count}": call(of_target, count) for count in range(1, largest + 2)}
    seconds = median_seconds({**calls, **longer}, of_target.model.device, WARM_UP + REPEATS)
    found = {}
    for name, drafter in drafters.items():
        models = models_of(drafter)
        own = seconds[f"model {id(models[0])}"] / drafts if models else rows * seconds[name]
        replays = bool(models) and isinstance(decoders[id(models[0])], StatefulDecoder)
        found[name] = CallTimings(
            own, [seconds[one] for one in longer], replays, isinstance(of_target, StatefulDecoder)
        )
    return found


@torch.inference_mode()
def measure_reading(target: Decodable, drafter: Drafter, prompt: list[int]) -> tuple[float, float]:
    """Return the median time in which the target, and the draft model if there is one, read a prompt, in seconds."""
    models = {"target": target, "drafter": next(iter(models_of(drafter)), None)}
    calls = {
        name: partial(lambda one: decoder_of(one).forward([prompt], [0], 1), model)
        for name, model in models.items()
        if model is not None
    }
    seconds = median_seconds(calls, target.device, WARM_UP + READINGS)
    return seconds["target"], seconds.get("drafter", 0.0)


def median_seconds(calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median time of each call, in seconds, without the first repeats. The calls take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = now(device)
            call()
            seconds[name].append(now(device) - began)
    return {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}
