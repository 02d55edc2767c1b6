"""Prepare a pair of models for timed decoding, and decode prompts with the target alone and with drafters."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.decoding.decoders import Decodable, Padded
from drafter.decoding.drafting import Drafter, compiled_with, models_of
from drafter.decoding.evaluation import Task
from drafter.decoding.generation import Decoded
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from drafter.decoding.timings import CallTimings, measure_call_timings, measure_several
from drafter.models.packing import pack
from experiments.running.inputs import plain

WIDEST = 16  # the most tokens of a call to which another one may be padded
COMPILED_GAMMAS = (3, 7)  # of which calls are compiled if none are chosen: packed products have rows in fours


def check_gammas(cfg: DictConfig, section: str) -> None:
    """Refuse a largest γ below 1, and γ to decode with that are not among those up to it.

    Args:
        cfg: the config.
        section: its part with `largest` and `decode`.

    Raises:
        ValueError: names the setting, its value, and what is allowed.
    """
    largest, decoded = cfg[section].largest, cfg[section].decode
    if largest < 1:
        raise ValueError(f"{section}.largest is {largest}, must be at least 1")
    if decoded is not None and (not decoded or not all(1 <= gamma <= largest for gamma in decoded)):
        raise ValueError(
            f"{section}.decode is {plain(decoded)}, must be null or some of 1 to {section}.largest={largest}"
        )


class Prepared(NamedTuple):
    """A pair whose calls are as fast as this project makes them.

    Attributes:
        target: the target, padded and perhaps compiled.
        drafter: the drafter, its model perhaps compiled.
        widths: number of tokens -> number to which target calls are padded.
        alone: the target as it decodes alone, in its faster way.
    """

    target: Decodable
    drafter: Drafter
    widths: dict[int, int]
    alone: Decodable

    def time_calls(self, drafters: Mapping[str, Drafter], prompt: list[int], largest: int) -> dict[str, CallTimings]:
        """Return the times of calls with each drafter, those with one token being of the target as it decodes alone.

        Args:
            drafters: the drafters by name.
            prompt: the tokens that are cached.
            largest: the largest γ.
        """
        found = measure_several(self.target, drafters, prompt, largest)
        if self.alone is self.target:
            return found
        single = measure_call_timings(self.alone, self.drafter, prompt, 1).target[0]
        return {name: one._replace(target=[single, *one.target[1:]]) for name, one in found.items()}


def prepare_pair(target: PreTrainedModel, drafter: Drafter, prompt: list[int], largest: int, pad: bool) -> Prepared:
    """Pack the weights of both models, in place, and pad target calls to widths that take less time.

    Args:
        target: the target.
        drafter: the drafter.
        prompt: the tokens that are cached when calls are timed.
        largest: the largest γ.
        pad: whether to look for widths that take less time.
    """
    for model in (target, *models_of(drafter)):
        pack(model)
    widths: dict[int, int] = {}
    if pad:
        most = min(max(largest, WIDEST - 1), len(prompt) - 1)
        widths = measure_call_timings(target, drafter, prompt, most).widths()
    padded = Padded(target, widths)
    return Prepared(padded, drafter, widths, padded)


def compile_pair(
    target: PreTrainedModel,
    drafter: Drafter,
    prompt: list[int],
    longest: int,
    largest: int,
    decode: Sequence[int] | None,
) -> Prepared:
    """Compile the target, and the drafter's model if it has one. A compiled call has packed weights of its own.

    Args:
        target: the target.
        drafter: the drafter.
        prompt: the tokens that are cached when calls are timed.
        longest: the number of tokens of the longest sequence.
        largest: the largest γ.
        decode: the γ that are decoded, for each of which a call is compiled; None for some up to the largest.
    """
    gammas = {largest, *(decode or (gamma for gamma in COMPILED_GAMMAS if gamma < largest))}
    of_target, of_drafter = compiled_with(target, drafter, longest, gammas)
    seconds = [measure_call_timings(one, of_drafter, prompt, 1).target[0] for one in (of_target, target)]
    widths = {count: width for count, width in of_target.widths.items() if count < width}
    return Prepared(of_target, of_drafter, widths, of_target if seconds[0] <= seconds[1] else target)


class DecodedPrompt(NamedTuple):
    """What the target alone generates for a prompt, and what it generates with each drafter at each γ."""

    baseline: Decoded
    drafted: dict[tuple[str, int], Decoded]


def decode_prompt(
    task: Task,
    target: Decodable,
    drafters: Mapping[str, Drafter],
    gammas: Mapping[str, Sequence[int]],
    seed: int,
    alone: Decodable | None = None,
) -> DecodedPrompt:
    """Decode a prompt with the target alone, then with each drafter at each of its γ.

    Args:
        task: the prompt.
        target: the target.
        drafters: the drafters by name.
        gammas: the γ of each drafter, by the same names.
        seed: the run's seed.
        alone: the target as it decodes alone; None: as it does with a drafter.
    """
    generator = task.random(target.device, seed)
    baseline = autoregressive_decode(alone or target, task.prompt, task.options, generator)
    drafted = {}
    for name, drafter in drafters.items():
        for gamma in gammas[name]:
            drafted[name, gamma] = speculative_decode(target, drafter, task.prompt, gamma, task.options, generator)
    return DecodedPrompt(baseline, drafted)
