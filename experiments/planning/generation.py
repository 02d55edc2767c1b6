"""Estimate batched generation: the responses, and what the target writes itself."""

from omegaconf import DictConfig

from drafter.decoding.side_by_side import FREE_SHARE
from experiments.planning.roofline import forward_seconds, generation_memory, operations
from experiments.planning.world import BYTES, StageEstimate, World, num_responses, process_memory
from experiments.running.recipes import INSTRUCTIONS, self_sources
from experiments.running.self_writing import message_limit, wanted

TEMPLATE = 16  # tokens of a chat template before the message of the user
USABLE = 0.8  # the share of the messages that the target writes itself and that can be used


def estimate_respond(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate the generation of the responses."""
    settings, width, shape = cfg.respond, BYTES[cfg.target.dtype], world.target
    number, sequences = num_responses(cfg), max(1, settings.batch_tokens / (world.length + world.response))
    seconds = generation_seconds(cfg, world, number, world.prompt, world.response, settings.batch_tokens)
    return StageEstimate(
        "respond",
        number * world.response,
        operations(shape, number * world.length, world.length / 2),
        generation_memory(shape, sequences, world.length + world.response, width, world.shares(cfg)[0])
        | process_memory(world),
        number * (world.length * 4 + world.response * shape.hidden * BYTES.get(settings.states, 0)),
        0.0 if settings.by == "reference" else seconds,
        "target.parallel=tensor, or lower respond.batch_tokens",
    )


def generation_seconds(
    cfg: DictConfig, world: World, number: float, prompt: float, response: float, batch_tokens: int
) -> float:
    """Return the seconds, on all devices, in which the target generates texts side by side.

    Each step computes the next token of all sequences; a forward pass is added whenever prompts are read.

    Args:
        cfg: the config of the stage.
        world: hardware and shapes.
        number: of texts.
        prompt: tokens before each.
        response: tokens of each, on average.
        batch_tokens: tokens of a batch, with padding.
    """
    width, shape, (split, shares) = BYTES[cfg.target.dtype], world.target, world.shares(cfg)
    device, sequences = world.device(width < 4), max(1, batch_tokens / (prompt + 2 * response))
    together = max(1, sequences / FREE_SHARE)  # prompts that are read together
    prompts = forward_seconds(device, shape, together * prompt, prompt / 2, 0, width, split) / together
    step = forward_seconds(device, shape, sequences, prompt + response / 2, sequences, width, split)
    return number / shares * (prompts + response / sequences * step)


def estimate_prepare(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate what the target writes itself: messages as long as prompts, and in pretraining text their answers too.

    One message in five is expected to be left out. A message of pretraining text is generated after its beginning in
    the template, and its answer after the message.
    """
    tokens, seconds, budget = 0.0, 0.0, cfg.generation.batch_tokens
    for source in self_sources(cfg):
        is_text, limit = source.part != INSTRUCTIONS, message_limit(cfg, source)
        message = min(world.prompt, limit)
        answer = min(world.response, source.settings.max_answer_tokens) if is_text else 0.0
        number = wanted(cfg, source) / (message + answer if is_text else 1) / USABLE
        tokens += number * (message + answer)
        seconds += generation_seconds(cfg, world, number, TEMPLATE, message, budget)
        if is_text:
            seconds += generation_seconds(cfg, world, number, message, answer, budget)
    width, length = BYTES[cfg.target.dtype], world.length + world.response
    memory = generation_memory(world.target, max(1, budget / length), length, width, world.shares(cfg)[0])
    return StageEstimate(
        "prepare",
        tokens,
        operations(world.target, tokens, world.length / 2),
        memory | process_memory(world),
        tokens * 4,
        seconds,
        "target.parallel=tensor, or lower generation.batch_tokens",
    )
