"""Advise on the size of a drafter and on its start, from what drafts cost and from what a budget of training buys.

Nothing here predicts an acceptance rate: the table says what each size needs in order to pay, and what it would be
worth at three rates. Sources: the cost of a draft decides more than the drafter's quality, and grows with its depth far
more than with its width (Yan et al., arXiv 2402.01528); the throughput-optimal drafter of a pretrained family has about
1/200 of the target's parameters (Bozorgkhoo and Molybog, arXiv 2603.11053); a model from scratch wants about 20 tokens
per parameter (Hoffmann et al., arXiv 2203.15556).
"""

from typing import NamedTuple

from omegaconf import DictConfig

from experiments.planning.roofline import Shape, forward_seconds, training_seconds
from experiments.planning.world import BYTES, StageEstimate, World
from experiments.reporting.tabular import Table, number
from experiments.running.progress import duration

DEPTHS = (1, 2, 4)
FRACTIONS = (16, 8, 4)  # of the target's hidden size
MULTIPLE = 32  # of which every hidden size is one, so that heads of 32 divide it
RATES = (0.4, 0.6, 0.8)  # acceptance rates for which a speed-up is shown
GAMMAS = range(1, 9)
OPTIMAL_FRACTION = 1 / 200
TOKENS_PER_PARAMETER = 20


class Candidate(NamedTuple):
    """A size of drafter.

    Attributes:
        shape: its sizes.
        cost: the time of one draft, in calls of the target with one token.
        tokens_per_parameter: pretraining tokens per parameter that the budget buys.
    """

    shape: Shape
    cost: float
    tokens_per_parameter: float


def advise(cfg: DictConfig, world: World, stages: list[StageEstimate], hours: float | None) -> str:
    """Return the section of the plan on the drafter's size and start, as Markdown.

    Args:
        cfg: the config of the pretraining.
        world: what the plan's stages share.
        stages: the estimates of the plan.
        hours: wall-clock time of training on all devices; None: that of the plan's own pretraining and one finetuning.
    """
    own = [next(one.seconds for one in stages if one.name == name) for name in ("pretrain", "finetune")]
    seconds = hours * 3600 if hours else sum(own)
    verification = verification_costs(cfg, world)
    found = candidates(cfg, world, seconds)
    chosen = choose(found, world.target)
    columns = [
        "layers",
        "hidden",
        "parameters",
        "c",
        "a draft costs",
        "α to pay",
        *(f"at α = {rate}" for rate in RATES),
    ]
    rows = []
    for one in found:
        needed = break_even(one.cost, verification)
        speedups = [best_speedup(rate, one.cost, verification) for rate in RATES]
        rows.append(
            [
                str(one.shape.layers),
                str(one.shape.hidden),
                number(one.shape.parameters),
                f"{one.shape.parameters / world.target.parameters:.2%}",
                f"{one.cost:.3f}",
                f"{needed:.2f}" if needed < 1 else "never",
                *(f"{value:.2f} (γ = {gamma})" for value, gamma in speedups),
                f"{one.tokens_per_parameter:.3g}",
            ]
        )
    table = Table("advice", "Which drafter?", [*columns, f"tokens / parameter in {duration(seconds)}"], rows)
    return f"## {table.title}\n\n{table.markdown()}\n\n{advice(chosen, seconds)}\n"


def candidates(cfg: DictConfig, world: World, seconds: float) -> list[Candidate]:
    """Return drafters of several depths and widths, with what they cost and what so many seconds of pretraining buy."""
    width = BYTES[cfg.target.dtype]
    device, (trained, _) = world.device(width < 4), world.training(cfg)
    one_call = forward_seconds(device, world.target, 1, world.length, 1, width)
    tokens = cfg.pretrain.batch_size * cfg.pretrain.sequence_length / world.gpus
    found = []
    for hidden in sorted({round_up(world.target.hidden / fraction) for fraction in FRACTIONS}):
        for layers in DEPTHS:
            shape = llama_shape(layers, hidden, world.target.vocabulary)
            step = training_seconds(trained, shape, tokens, cfg.pretrain.sequence_length, tokens)
            bought = seconds / step * tokens * world.gpus / shape.parameters
            found.append(Candidate(shape, forward_seconds(device, shape, 1, world.length, 1, width) / one_call, bought))
    return found


def llama_shape(layers: int, hidden: int, vocabulary: int) -> Shape:
    """Return the shape of a Llama with tied embeddings, and three times the hidden size inside its MLPs."""
    parameters = vocabulary * hidden + layers * (4 * hidden**2 + 9 * hidden**2 + 2 * hidden) + hidden
    return Shape(parameters, parameters, layers, hidden, hidden, vocabulary, 2 * hidden * layers)


def round_up(size: float) -> int:
    """Return the next multiple of MULTIPLE."""
    return MULTIPLE * max(1, -(-int(size) // MULTIPLE))


def verification_costs(cfg: DictConfig, world: World) -> dict[int, float]:
    """Return, for each gamma, the time of the target's call with gamma + 1 tokens, in calls with one token."""
    width = BYTES[cfg.target.dtype]
    device = world.device(width < 4)
    one, *several = (
        forward_seconds(device, world.target, tokens, world.length, 1, width)
        for tokens in (1, *(g + 1 for g in GAMMAS))
    )
    return {gamma: seconds / one for gamma, seconds in zip(GAMMAS, several, strict=True)}


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
    """Return the candidate of two layers whose parameters are nearest to the optimal fraction of the target's."""
    wanted = target.parameters * OPTIMAL_FRACTION
    return min(
        (one for one in found if one.shape.layers == 2),
        key=lambda one: max(one.shape.parameters / wanted, wanted / one.shape.parameters),
    )


def advice(chosen: Candidate, seconds: float) -> str:
    """Return what to do, and what it rests on."""
    shape, bought = chosen.shape, chosen.tokens_per_parameter
    size = (
        f"Size: {shape.layers} layers of width {shape.hidden} (drafter.num_hidden_layers={shape.layers} "
        f"drafter.hidden_size={shape.hidden}), the nearest here to 1/200 of the target's parameters (arXiv 2603.11053 "
        "on pretrained families). A layer costs a draft more than width does (arXiv 2402.01528): prefer width to depth."
    )
    start = f"Start: {duration(seconds)} buy {bought:.3g} tokens of pretraining per parameter, "
    if bought < TOKENS_PER_PARAMETER:
        start += (
            "fewer than the 20 that a model from scratch wants (arXiv 2203.15556): start from a smaller sibling of the "
            "target (init=existing) or from its own layers (init=layers), and give the time to finetuning."
        )
    else:
        start += (
            "more than the 20 that a model from scratch wants (arXiv 2203.15556): random weights (init=scratch) are as "
            "good as other starts."
        )
    return f"{size}\n\n{start} docs/RESULTS.md has what each start was worth."
