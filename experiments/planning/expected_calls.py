"""The roofline's call timings of a pair on given hardware, beside those that are measured."""

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.decoding.drafting import models_of
from drafter.decoding.stateful import keeps_states
from drafter.decoding.timings import CallTimings
from drafter.models.loading import load_config
from experiments.planning.roofline import Hardware, Shape, forward_seconds
from experiments.running.inputs import plain, target_source
from experiments.running.named_drafters import model_of, model_source
from experiments.running.timed_pair import TimedPair


def check_hardware(cfg: DictConfig) -> None:
    """Refuse hardware whose roofline would not be shown, or not be right.

    Raises:
        ValueError: there are no contexts to show it for, or a model has states.
    """
    if cfg.get("hardware") is None:
        return
    if not cfg.measure.contexts:
        raise ValueError(
            f"hardware is {cfg.hardware.name}, and measure.contexts has none to show its roofline for: give some, such "
            f"as [128,1024], or leave out hardware"
        )
    target, model = target_source(cfg), model_of(str(cfg.measure.drafter))
    for source in (target, *([model_source(cfg, model)] if model else [])):
        if keeps_states(load_config(source)):
            raise ValueError(
                f"hardware is {cfg.hardware.name}, and {source.path} has states, while the roofline is that of "
                f"attention: leave out hardware"
            )


def expected_timings(cfg: DictConfig, pair: TimedPair) -> Callable[[int], CallTimings] | None:
    """Return a function that gives the roofline's call timings for a number of tokens in the cache.

    Args:
        cfg: the config of `measure`. Without hardware, there is no function.
        pair: the pair. Its first drafter is meant, whose drafts take no time if it has no model.
    """
    if cfg.get("hardware") is None:
        return None
    fields, largest, target = plain(cfg.hardware), cfg.measure.largest, pair.plain_target
    drafter = next(iter(models_of(next(iter(pair.plain_drafters.values())))), None)

    def timings(context: int) -> CallTimings:
        of_target = [call_seconds(fields, target, count, context) for count in range(1, largest + 2)]
        of_drafter = call_seconds(fields, drafter, 1, context) if drafter is not None else 0.0
        return CallTimings(of_drafter, of_target)

    return timings


def call_seconds(fields: Mapping[str, Any], model: PreTrainedModel, tokens: int, context: int) -> float:
    """Return the roofline's seconds of a call with so many tokens of one sequence and a context in the cache.

    Args:
        fields: the fields of a hardware config.
        model: the model. Its numbers are as wide as its parameters.
        tokens: the tokens of the call.
        context: the tokens in the cache.
    """
    width = model.dtype.itemsize
    return forward_seconds(Hardware.of(fields, width < 4), Shape.of(model), tokens, context, 1, width)
