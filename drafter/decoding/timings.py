"""What a call costs, and what follows from it: the speed-up of speculative decoding at each gamma.

With c the time of a drafter's call over a target's of one token, and v(gamma) that of a target's call of gamma + 1
tokens over one of one, a block costs c gamma + v(gamma) target calls and gives tau(gamma) tokens: the speed-up is
tau / (c gamma + v). (Leviathan et al., arXiv 2211.17192, theorem 3.8, has v = 1; MBSU has that and c by parameters.)
"""

import statistics
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from drafter.decoding.capabilities import decoder_of
from drafter.decoding.decoders import Compiled, now

REPEATS = 15


class Costs(NamedTuple):
    """Seconds of one drafter call, and of target calls of 1, 2 ... tokens."""

    drafter: float
    target: list[float]

    @property
    def ratio(self) -> float:
        """c: a drafter's call over the target's of one token."""
        return self.drafter / self.target[0]

    def verification(self, gamma: int) -> float:
        """v(gamma): a target's call of gamma + 1 tokens over one of one."""
        return self.target[gamma] / self.target[0]

    def block(self, gamma: int) -> float:
        """What a block costs, in target calls of one token."""
        return self.ratio * gamma + self.verification(gamma)


@torch.inference_mode()
def measure(
    target: PreTrainedModel | Compiled, drafter: PreTrainedModel | Compiled, text: list[int], largest: int
) -> Costs:
    """The median wall-clock time of each kind of call behind a text, all kinds in turn.

    Raises:
        ValueError: the text is shorter than the longest call.
    """
    if len(text) <= largest:
        raise ValueError(
            f"the text has {len(text)} tokens, and calls of up to gamma + 1 = {largest + 1} of them are timed: give a "
            f"longer prompt, or a smaller gamma"
        )
    kinds = {("drafter", 1): decoder_of(drafter)}
    slow = decoder_of(target)
    for decoder in (slow, kinds["drafter", 1]):
        decoder.feed([text], [0], 1)
    kinds |= {("target", count): slow for count in range(1, largest + 2)}
    seconds: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    for _ in range(REPEATS + 2):
        for (model, count), decoder in kinds.items():
            began = now(slow.model.device)
            decoder.feed([text[:count]], [len(text)], count)
            seconds[model, count].append(now(slow.model.device) - began)
    medians = {kind: statistics.median(times[2:]) for kind, times in seconds.items()}  # the first ones warm up
    return Costs(medians["drafter", 1], [medians["target", count] for count in range(1, largest + 2)])
