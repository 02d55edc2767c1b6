"""Choose γ and the acceptance rule for each engine from the predictions for a pair."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.exporting.serving import followed_rule, serving, serving_ngrams, vllm_lookup, vllm_speculation
from experiments.reporting.measurement import EngineSetting, Measurement
from experiments.running.named_drafters import exit_layer, parse


def engine_settings(
    target: str, drafter: str, speedups: Mapping[str, Sequence[float]], kinds: Sequence[str] = ("hf", "gguf")
) -> list[EngineSetting]:
    """Return how each engine serves a draft model.

    Where an engine has the choice of the rule, it is the one whose sampled answers have the highest prediction.

    Args:
        target: the target's path or name.
        drafter: the drafter's.
        speedups: "greedy", or the acceptance rule -> the predicted speed-up at γ = 1, 2, …
        kinds: the formats whose engines are wanted (see `serving`).
    """
    chosen = better_rule(speedups)
    found = []
    for kind in kinds:
        for engine in serving(kind, target, drafter, 1):
            rule = followed_rule(engine, chosen)
            gamma = best_gamma([speedups["greedy"], *([speedups[rule]] if rule else [])])
            lines = serving(kind, target, drafter, gamma, chosen, sets_gamma=True)[engine]
            sampled = speedups[rule][gamma - 1] if rule else None
            found.append(EngineSetting(engine, rule, gamma, speedups["greedy"][gamma - 1], sampled, lines))
    return found


def better_rule(speedups: Mapping[str, Sequence[float]]) -> str:
    """Return the acceptance rule with the higher prediction, of the two that vLLM has."""
    return max(("ratio", "argmax"), key=lambda rule: max(speedups[rule]))


def ngram_settings(
    target: str, label: str, sizes: tuple[int, int], speedups: Mapping[str, Sequence[float]]
) -> list[EngineSetting]:
    """Return how engines look drafts up in the prompt.

    Args:
        target: the target's path or name.
        label: what the drafter without a model is called.
        sizes: the smallest and the largest n of its n-grams.
        speedups: "greedy", or the acceptance rule -> the predicted speed-up at γ = 1, 2, …
    """
    gamma = best_gamma([speedups["greedy"], speedups["ratio"]])
    greedy, sampled = (speedups[key][gamma - 1] for key in ("greedy", "ratio"))
    lines = serving_ngrams(target, *sizes, gamma)
    return [
        EngineSetting(f"{engine}, {label}", "ratio", gamma, greedy, sampled, text) for engine, text in lines.items()
    ]


def add_settings(found: Measurement, speedups: Mapping[str, Mapping[str, Sequence[float]]]) -> Measurement:
    """Return a measurement with the settings of engines: of its drafter, and of prompt lookup where that is faster.

    A drafter that differs from its target in what engines compare is to be exported first, which adjusts it.

    Args:
        found: the measurement.
        speedups: label -> "greedy", or the acceptance rule -> the predicted speed-up at γ = 1, 2, …
    """
    engines: list[EngineSetting] = []
    export, of_drafter = None, None
    if found.has_model and exit_layer(found.drafter) is None:  # which no engine has
        exported = f"exports/{Path(found.drafter).name}-hf"
        export = export_command(found.target, found.drafter) if found.differs else None
        served = exported if export else found.drafter
        engines = engine_settings(found.target, served, speedups[found.label])
        of_drafter = vllm_speculation(served, 1, better_rule(speedups[found.label]))
    rival = found.best_rival()
    faster = rival.drafter if rival and found.rival and found.rival.low > 0 else None
    for label in (found.label, faster):
        parsed = parse(label) if label else None
        if label and parsed and not (parsed.responses or parsed.otherwise):
            engines += ngram_settings(found.target, label, parsed.sizes, speedups[label])
            of_drafter = vllm_lookup(*parsed.sizes, 1) if label == found.label else of_drafter
    found = found._replace(engines=engines, export=export)
    if not found.batches:
        return found
    gammas = {row.batch_size: row.gamma for row in found.batches}
    config = scheduled(of_drafter, gammas) if of_drafter and max(gammas.values()) else None
    return found._replace(schedule=str(vllm_schedule(gammas)), speculative_config=config)


def best_gamma(speedups: Sequence[Sequence[float]]) -> int:
    """Return the γ with the highest mean speed-up.

    >>> best_gamma([[1.0, 1.2, 1.1], [1.0, 1.1, 1.3]])
    3
    """
    means = [sum(values) for values in zip(*speedups, strict=True)]
    return means.index(max(means)) + 1


def export_command(target: str, drafter: str) -> str:
    """Return the command that exports a drafter for engines, and so adjusts it to the target."""
    return f"python -m experiments.export export.drafter={shlex.quote(drafter)} target.path={shlex.quote(target)}"


def scheduled(config: Mapping[str, Any], gammas: Mapping[int, int]) -> dict[str, Any]:
    """Return vLLM's `--speculative-config` with the best γ by batch size.

    vLLM drafts the smaller of `num_speculative_tokens` and the schedule's γ, so that the first is the largest γ.

    >>> scheduled({"method": "ngram", "num_speculative_tokens": 1}, {1: 4, 16: 2})  # doctest: +NORMALIZE_WHITESPACE
    {'method': 'ngram', 'num_speculative_tokens': 4,
     'num_speculative_tokens_per_batch_size': [[1, 15, 4], [16, 4096, 2]]}

    Args:
        config: that of the drafter, with any γ.
        gammas: batch size -> γ; 0 for no drafts.
    """
    schedule = vllm_schedule(gammas)
    return {
        **config,
        "num_speculative_tokens": max(gammas.values()),
        "num_speculative_tokens_per_batch_size": schedule,
    }


def vllm_schedule(gammas: Mapping[int, int], most: int = 4096) -> list[list[int]]:
    """Return the best γ by batch size as vLLM's `num_speculative_tokens_per_batch_size`.

    Each entry has the smallest and the largest batch size, and γ. A size between two that were timed has the γ of the
    smaller one, and those above the last one have its γ.

    >>> vllm_schedule({1: 4, 4: 4, 16: 1, 64: 0})
    [[1, 15, 4], [16, 63, 1], [64, 4096, 0]]

    Args:
        gammas: batch size -> γ; 0 for no drafts.
        most: the largest batch size of the schedule.
    """
    sizes = sorted(gammas)
    entries: list[list[int]] = []
    for size, following in zip(sizes, [*sizes[1:], most + 1], strict=True):
        first = size if entries else 1
        if entries and entries[-1][2] == gammas[size]:
            entries[-1][1] = following - 1
        else:
            entries.append([first, following - 1, gammas[size]])
    return entries
