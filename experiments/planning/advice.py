"""Advise on the size of a drafter and on its start, from what drafts cost and from what a budget of training buys.

Nothing here predicts an acceptance rate: the table says what each size needs in order to pay, and what it would be
worth at three rates. Sources: the cost of a draft decides more than the drafter's quality, and grows with its depth far
more than with its width (Yan et al., arXiv 2402.01528); the throughput-optimal drafter of a pretrained family has about
1/200 of the target's parameters (Bozorgkhoo and Molybog, arXiv 2603.11053); the table of starts (docs/RESULTS.md).
"""

import math
from typing import NamedTuple

from omegaconf import DictConfig

from experiments.planning.roofline import Shape, training_seconds
from experiments.planning.world import BYTES, StageEstimate, World
from experiments.reporting.tabular import Table, number
from experiments.running.progress import duration

DEPTHS = (1, 2, 4)
FRACTIONS = (16, 8, 4)  # of the target's hidden size
HEAD_WIDTH = 32  # every hidden size is a multiple of it
RATES = (0.4, 0.6, 0.8)  # acceptance rates for which a speed-up is shown
GAMMAS = range(1, 9)
OPTIMAL_FRACTION = 1 / 200
MEASURED = 8  # tokens of pretraining per parameter, the most that the table of starts has


class Candidate(NamedTuple):
    """A size of drafter.

    Attributes:
        shape: its sizes.
        cost: the time of one draft, in calls of the target with one token.
        tokens_per_parameter: tokens that the budget buys if all of it goes to pretraining, without a teacher.
    """

    shape: Shape
    cost: float
    tokens_per_parameter: float


def check_hours(hours: float | None) -> None:
    """Raise ValueError unless the hours of training are None or a number above 0."""
    if hours is not None and not (isinstance(hours, int | float) and hours > 0):
        raise ValueError(f"plan.hours is {hours}, must be a number above 0, or null")


def advise(cfg: DictConfig, world: World, stages: list[StageEstimate], hours: float | None) -> str:
    """Return the section of the plan on the drafter's size and start, as Markdown.

    Args:
        cfg: the config of the pretraining.
        world: what the plan's stages share.
        stages: the estimates of the plan.
        hours: wall-clock time of training on all devices; None: that of the plan's pretraining and one finetuning.
    """
    own = [next((one.seconds for one in stages if one.name == name), 0.0) for name in ("pretrain", "finetune")]
    seconds = sum(own) if hours is None else hours * 3600
    verification = verification_costs(cfg, world)
    found = candidates(cfg, world, seconds)
    columns = ["layers", "hidden", "parameters", "c", "cost of a draft", "break-even α"]
    columns += [*(f"speed-up at α = {rate}" for rate in RATES), f"tokens / parameter in {duration(seconds)}"]
    rows = []
    for one in found:
        needed = break_even(one.cost, verification)
        speedups = [best_speedup(rate, one.cost, verification) for rate in RATES]
        rows.append(
            [
                str(one.shape.layers),
                str(one.shape.hidden),
                number(one.shape.parameters),
                f"{one.shape.active / world.target.active:.2%}",
                f"{one.cost:.3f}",
                f"{needed:.2f}" if needed < 1 else "none",
                *(f"{value:.2f} (γ = {gamma})" for value, gamma in speedups),
                f"{one.tokens_per_parameter:.3g}",
            ]
        )
    note = (
        "c is the drafter's share of the target's parameters, α the acceptance rate, which no plan knows. The cost of "
        f"a draft is in calls of the target; speed-ups are at the best γ up to {max(GAMMAS)}, for one sequence. Tokens "
        "per parameter are what that time would buy if all of it went to pretraining."
    )
    table = Table("advice", "Which drafter?", columns, rows, note)
    return f"## {table.title}\n\n{table.markdown()}\n\n{advice(choose(found, world.target), world.target, seconds)}\n"


def candidates(cfg: DictConfig, world: World, seconds: float) -> list[Candidate]:
    """Return drafters of several depths and widths, with what they cost and what so many seconds of pretraining buy."""
    trained, _ = world.training(cfg)
    tokens = cfg.pretrain.batch_size * cfg.pretrain.sequence_length / world.gpus
    one_call = world.call_seconds(world.target, 1, BYTES[cfg.target.dtype], world.shares(cfg)[0])
    found = []
    for hidden in sorted({multiple_of_head(world.target.hidden / fraction) for fraction in FRACTIONS}):
        for layers in DEPTHS:
            shape = llama_shape(layers, hidden, world.target.vocabulary)
            step = training_seconds(trained, shape, tokens, cfg.pretrain.sequence_length, tokens)
            bought = seconds / step * tokens * world.gpus / shape.parameters
            found.append(Candidate(shape, world.call_seconds(shape, 1, BYTES["float32"]) / one_call, bought))
    return found


def llama_shape(layers: int, hidden: int, vocabulary: int) -> Shape:
    """Return the shape of a Llama with the sizes of `size_overrides`."""
    parameters = vocabulary * hidden + layers * (4 * hidden**2 + 9 * hidden**2 + 2 * hidden) + hidden
    return Shape(parameters, parameters, layers, hidden, hidden, vocabulary, 2 * hidden * layers)


def size_overrides(shape: Shape) -> str:
    """Return the overrides that give a drafter these sizes: tied embeddings, MLPs three times as wide, narrow heads."""
    heads = shape.hidden // HEAD_WIDTH
    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": 3 * shape.hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": "true",
    }
    return " ".join(f"drafter.{name}={value}" for name, value in sizes.items())


def multiple_of_head(size: float) -> int:
    """Return the next multiple of HEAD_WIDTH.

    >>> multiple_of_head(32), multiple_of_head(32.5)
    (32, 64)
    """
    return HEAD_WIDTH * max(1, math.ceil(size / HEAD_WIDTH))


def verification_costs(cfg: DictConfig, world: World) -> dict[int, float]:
    """Return, for each gamma, the time of the target's call with gamma + 1 tokens, in calls with one token."""
    width, (split, _) = BYTES[cfg.target.dtype], world.shares(cfg)
    one_call = world.call_seconds(world.target, 1, width, split)
    return {gamma: world.call_seconds(world.target, gamma + 1, width, split) / one_call for gamma in GAMMAS}


def best_speedup(rate: float, cost: float, verification: dict[int, float]) -> tuple[float, int]:
    """Return the highest speed-up at an acceptance rate that is the same at each position, and its gamma.

    With it, a block has (1 - α^(γ + 1)) / (1 - α) tokens (Leviathan et al., arXiv 2211.17192, equation 1).

    >>> best_speedup(0.5, 0.0, {1: 1.0, 2: 1.0})
    (1.75, 2)
    """
    return max(
        ((1 - rate ** (gamma + 1)) / (1 - rate) / (gamma * cost + verified), gamma)
        for gamma, verified in verification.items()
    )


def break_even(cost: float, verification: dict[int, float]) -> float:
    """Return the lowest acceptance rate at which some gamma pays, to two decimal places; 1 if none below it does.

    >>> break_even(0.1, {1: 1.0})
    0.11
    """
    return next((rate / 100 for rate in range(100) if best_speedup(rate / 100, cost, verification)[0] > 1), 1.0)


def choose(found: list[Candidate], target: Shape) -> Candidate:
    """Return the candidate of at most two layers whose parameters are nearest to OPTIMAL_FRACTION of the target's."""
    wanted = target.active * OPTIMAL_FRACTION
    return min(
        (one for one in found if one.shape.layers <= 2),
        key=lambda one: max(one.shape.parameters / wanted, wanted / one.shape.parameters),
    )


def advice(chosen: Candidate, target: Shape, seconds: float) -> str:
    """Return what to do, and what it rests on."""
    shape, bought = chosen.shape, chosen.tokens_per_parameter
    size = (
        f"Size: `{size_overrides(shape)}`. An additional layer makes a draft slower than additional width does (arXiv "
        "2402.01528), and the best drafter of a pretrained family has about 1/200 of the target's parameters (arXiv "
        "2603.11053): of the drafters with one or two layers, this is the nearest, with "
        f"1/{target.active / shape.active:.0f}."
    )
    if not seconds:
        return size
    start = f"Start: all of {duration(seconds)} would buy {bought:.2g} tokens of pretraining per parameter"
    if bought <= MEASURED:
        start += (
            ". With so few, the table of starts found no use for pretraining in the domain (docs/RESULTS.md): give the "
            "time to finetuning (init.steps=0), and try optimizer=muon."
        )
    else:
        start += (
            f", more than the {MEASURED} that the table of starts has measured (docs/RESULTS.md). `make table-starts` "
            "measures for your pair what pretraining adds."
        )
    return f"{size}\n\n{start}"
