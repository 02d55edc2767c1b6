"""The time of model calls, and the speed-up of speculative decoding that follows from it for each gamma.

Let c be the time of a drafter call and v(gamma) that of a target call with gamma + 1 tokens, both divided by the time
of a target call with one token. A block then takes as long as c gamma + v(gamma) target calls and gives tau(gamma)
tokens, so the speed-up is tau / (c gamma + v). Leviathan et al. (arXiv 2211.17192, theorem 3.8) assume v = 1; so does
the memory-bound speed-up (MBSU), with c from the numbers of parameters.

A model with states reads the accepted tokens of a block again if a draft was rejected (see `stateful`). A block is
taken to do so always, and to read gamma tokens again: this overestimates its time by what the accepted blocks save.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from drafter.decoding.capabilities import decoder_of
from drafter.decoding.clock import now
from drafter.decoding.decoders import Decodable
from drafter.decoding.drafting import Drafter, models_of, without_model
from drafter.decoding.generation import Generation
from drafter.decoding.stateful import StatefulDecoder

REPEATS = 15
WARM_UP = 2
LEAST_GAIN = 0.05  # of the time of a call, for which it is padded


class CallTimings(NamedTuple):
    """The seconds of model calls.

    Attributes:
        drafter: of a drafter call with one token; without a draft model, of a proposal of a block's drafts.
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


@torch.inference_mode()
def measure_call_timings(target: Decodable, drafter: Drafter, prompt: list[int], largest: int) -> CallTimings:
    """Return the median wall-clock time of each kind of call, with a prompt in the cache.

    The kinds of calls take turns, so that a change in the machine's speed affects all alike.

    Args:
        target: the target.
        drafter: the drafter. Beside a draft model, the time of proposals without a model is left out.
        prompt: the tokens that are cached first; the timed calls repeat its beginning.
        largest: the largest gamma; target calls with 1 to largest + 1 tokens are timed.

    Raises:
        ValueError: the prompt is shorter than the longest call.
    """
    if len(prompt) <= largest:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, and calls with up to gamma + 1 = {largest + 1} of them are timed: "
            f"give a longer prompt or a smaller gamma"
        )
    models, decoder = models_of(drafter), decoder_of(target)
    of_model = decoder_of(models[0]) if models else None
    for one in (decoder, of_model):
        if one:
            one.forward([prompt], [0], 1)
    draft: Callable[[], object]
    if of_model:
        draft = partial(of_model.forward, [prompt[:1]], [len(prompt)], 1)
    else:
        sequence = Generation(list(prompt), len(prompt), len(prompt) + largest)
        draft = partial(without_model(drafter)[0].propose, sequence, largest)
    calls = [draft]
    calls += [partial(decoder.forward, [prompt[:count]], [len(prompt)], count) for count in range(1, largest + 2)]
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(WARM_UP + REPEATS):
        for times, call in zip(seconds, calls, strict=True):
            began = now(decoder.model.device)
            call()
            times.append(now(decoder.model.device) - began)
    of_drafter, *of_target = (statistics.median(times[WARM_UP:]) for times in seconds)
    replays = (isinstance(one, StatefulDecoder) for one in (of_model, decoder))
    return CallTimings(of_drafter, of_target, *replays)
