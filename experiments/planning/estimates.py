"""Estimate what each stage of a plan needs: tokens, operations, memory by part, disk and time.

The estimates follow from a stage's config, `scale.expected` and the shapes of both models (formulas: `roofline`).
"""

import math
from collections.abc import Iterator

from omegaconf import DictConfig

from drafter.losses.chunked import CHUNK_ENTRIES
from experiments.planning.generation import estimate_prepare, estimate_respond
from experiments.planning.roofline import (
    Shape,
    forward_seconds,
    generation_memory,
    loss_seconds,
    operations,
    training_memory,
    training_seconds,
    update_seconds,
)
from experiments.planning.world import BYTES, StageEstimate, World, num_responses, process_memory
from experiments.running.data_settings import turns_of
from experiments.running.jobs import Job
from experiments.running.named_drafters import model_of
from experiments.running.recipes import self_sources

TURNS = 2  # the answers per conversation of a task that evaluates all of them, as in MT-Bench
ACTIVATIONS = 12  # numbers per token and hidden unit that a forward pass without gradients holds at once


def estimates(job: Job, world: World) -> Iterator[StageEstimate]:
    """Yield the estimate of a stage, if the stage computes with a model."""
    how = {
        "prepare": estimate_prepare,
        "pretrain": estimate_pretrain,
        "respond": estimate_respond,
        "cache": estimate_cache,
        "finetune": estimate_finetune,
        "evaluate": estimate_evaluate,
    }
    if job.stage in how and (job.stage != "prepare" or self_sources(job.cfg)):
        yield how[job.stage](job.cfg, world)


def estimate_pretrain(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate pretraining on packed text: the drafter's steps, and the target's forward passes if it is distilled."""
    settings = cfg.pretrain
    shape = trained_shape(world.drafter, settings)
    tokens = pretraining_tokens(cfg)
    seconds, memory = training_cost(cfg, settings, world, tokens, settings.sequence_length, tokens)
    heldout = cfg.scale.heldout_tokens * num_validations(settings)
    judged = validation_seconds(cfg, world, settings, heldout, settings.sequence_length, heldout)
    done = pretraining_operations(cfg, world.drafter, world.target) * settings.max_steps
    if settings.distillation.weight:
        taught, length = tokens * settings.max_steps + heldout, settings.sequence_length
        at_once = tokens / world.gpus / cfg.trainer.accumulate_grad_batches
        done += operations(world.target, heldout, length / 2)
        judged += taught / world.gpus / at_once * target_pass_seconds(cfg, world, at_once, length)
        held_at_once = min(at_once, settings.distillation.batch_tokens or at_once)
        memory = memory | target_memory(cfg, world, held_at_once)
    return StageEstimate(
        "pretrain",
        tokens * settings.max_steps,
        done,
        memory,
        (2 if shape.vocabulary <= 2**16 else 4) * (cfg.scale.pretraining_tokens or tokens * settings.max_steps),
        seconds * settings.max_steps + judged,
        "lower pretrain.batch_size and raise trainer.accumulate_grad_batches, or pretrain.gradient_checkpointing=true",
    )


def estimate_cache(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate one forward pass of the target per response, with the output embedding at the response's tokens.

    If the responses have the states that the cache stores, there is only the output embedding.
    """
    width, shape, tokens = BYTES[cfg.target.dtype], world.target, cfg.cache.batch_tokens
    device, number, (split, shares) = world.device(width < 4), num_responses(cfg), world.shares(cfg)
    read, scored = number * world.length, number * world.response
    one = forward_seconds(device, shape, tokens, world.length / 2, 0, width, split, tokens * scored / read)
    seconds = read / tokens / shares * one
    memory = generation_memory(shape, 0, 0, width, split)
    memory["activations"] = ACTIVATIONS * tokens * shape.hidden * width
    if cfg.cache.format.kind == "exact" and cfg.cache.format.dtype == world.states:
        memory, read = {"weights": shape.head * width}, 0.0
        seconds = operations(shape, 0, 0, scored) / (device.flops * device.efficiency) / shares
    return StageEstimate(
        "cache",
        read,
        operations(shape, read, world.length / 2, scored),
        memory | process_memory(world),
        scored * cached_bytes(cfg, shape),
        seconds,
        "target.parallel=tensor, or lower cache.batch_tokens",
    )


def estimate_finetune(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate finetuning: the drafter's steps, and the target's forward passes or its cached output embedding."""
    settings, share = cfg.finetune, cfg.finetune.text_share
    samples = settings.batch_size * cfg.trainer.accumulate_grad_batches
    tokens, scored = finetuning_tokens(cfg, world.prompt, world.response)
    seconds, memory = training_cost(cfg, settings, world, tokens, settings.sequence_length, scored, samples)
    answered, judged = samples * (1 - share) * settings.max_steps, num_validated(cfg, settings)
    seconds = seconds * settings.max_steps + target_seconds(cfg, world, judged)
    seconds += target_seconds(cfg, world, answered, trained_shape(world.target, settings))
    seconds += validation_seconds(cfg, world, settings, judged * world.length, world.length, judged * world.response)
    done = finetuning_operations(cfg, world.drafter, world.target) * settings.max_steps
    done += target_operations(cfg, world.target, judged)
    per_pass = samples / cfg.trainer.accumulate_grad_batches / world.gpus * world.length
    return StageEstimate(
        "finetune",
        tokens * settings.max_steps,
        done,
        memory | target_memory(cfg, world, per_pass),
        4 * world.drafter.parameters * (2 + num_kept_steps(cfg)),
        seconds,
        "cache the target (inputs.cache), or target.parallel=fsdp; lower finetune.batch_size and raise "
        "trainer.accumulate_grad_batches, or finetune.gradient_checkpointing=true",
    )


def pretraining_tokens(cfg: DictConfig) -> int:
    """Return the tokens of one step of pretraining."""
    return int(cfg.pretrain.batch_size * cfg.pretrain.sequence_length * cfg.trainer.accumulate_grad_batches)


def pretraining_operations(cfg: DictConfig, drafter: Shape, target: Shape) -> float:
    """Return the operations of one step of pretraining, with the target's forward pass if it is distilled."""
    settings, tokens = cfg.pretrain, pretraining_tokens(cfg)
    context = settings.sequence_length / 2
    taught = operations(target, tokens, context) if settings.distillation.weight else 0.0
    return 3 * operations(trained_shape(drafter, settings), tokens, context) + taught


def finetuning_tokens(cfg: DictConfig, prompt: float, response: float) -> tuple[float, float]:
    """Return the tokens of one step of finetuning, and those with a loss, for such prompts and responses."""
    settings, share = cfg.finetune, cfg.finetune.text_share
    samples = settings.batch_size * cfg.trainer.accumulate_grad_batches
    answered, text = samples * (1 - share), samples * share * settings.sequence_length
    return answered * (prompt + response) + text, answered * response + text


def finetuning_operations(cfg: DictConfig, drafter: Shape, target: Shape) -> float:
    """Return the operations of one step of finetuning, with those of the target's logits."""
    settings, share, expected = cfg.finetune, cfg.finetune.text_share, cfg.scale.expected
    samples = settings.batch_size * cfg.trainer.accumulate_grad_batches
    tokens, scored = finetuning_tokens(cfg, expected.prompt_tokens, expected.response_tokens)
    trained = 3 * operations(trained_shape(drafter, settings), tokens, settings.sequence_length / 2, scored)
    known = trained_shape(target, settings) if cfg.inputs.cache else target
    return trained + target_operations(cfg, known, samples * (1 - share))


def target_operations(cfg: DictConfig, target: Shape, responses: float) -> float:
    """Return the operations for the logits of so many responses; with a cache, of the output embedding alone."""
    expected = cfg.scale.expected
    if cfg.inputs.cache:
        return float(2 * target.head * responses * expected.response_tokens)
    length = expected.prompt_tokens + expected.response_tokens
    return operations(target, responses * length, length / 2, responses * expected.response_tokens)


def target_seconds(cfg: DictConfig, world: World, samples: float, shape: Shape | None = None) -> float:
    """Return the seconds, on all devices, for the target's logits of so many responses.

    With a cache, they are those of `shape`'s output embedding; in training it has the rows of kept and sampled tokens.
    """
    if cfg.inputs.cache:
        device, shape = world.device(BYTES[cfg.target.dtype] < 4), shape or world.target
        return 2 * shape.head * samples * world.response / world.gpus / (device.flops * device.efficiency)
    batches = samples / cfg.finetune.batch_size
    tokens = cfg.finetune.batch_size * world.length / world.gpus
    return batches * target_pass_seconds(cfg, world, tokens, world.length)


def target_pass_seconds(cfg: DictConfig, world: World, tokens: float, length: float) -> float:
    """Return the seconds of a forward pass of the target over so many tokens on one device."""
    width = BYTES[cfg.target.dtype]
    return forward_seconds(world.device(width < 4), world.target, tokens, length / 2, 0, width)


def target_memory(cfg: DictConfig, world: World, tokens: float) -> dict[str, float]:
    """Return the memory of the target per device, where a forward pass has so many tokens.

    With FSDP it is the embeddings, a share and two whole layers.
    """
    width, shape = BYTES[cfg.target.dtype], world.target
    if cfg.inputs.get("cache"):
        return {"target": shape.head * width}
    embeddings = shape.active - shape.multiplied + shape.head
    layers = shape.parameters - embeddings
    held = layers / world.gpus + 2 * layers / shape.layers if cfg.target.parallel == "fsdp" else layers
    activations = ACTIVATIONS * tokens * shape.hidden
    return {"target": (embeddings + held + activations) * width}


def estimate_evaluate(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate decoding each prompt with the target alone, and with each drafter at each γ by each acceptance rule."""
    width, gammas, batch = BYTES[cfg.target.dtype], cfg.evaluate.num_speculative_tokens, cfg.evaluate.batch_size
    numbers = {path: world.finetunings if "*" in path else 1 for path in cfg.drafters}
    drafters, models = sum(numbers.values()), sum(number for path, number in numbers.items() if model_of(path))
    split, shares = world.shares(cfg)

    answers = [TURNS if turns_of(name, how) == "all" else 1 for name, how in cfg.task.items()]
    prompts = sum(answers) * cfg.evaluate.prompts_per_task
    # At temperature 0 the acceptance rules are the same.
    warmth = [cfg.evaluate.sampling.get("temperature", how.temperature) for how in cfg.task.values()]
    rules = [len(cfg.evaluate.acceptance_rules) if one else 1 for one in warmth]
    times = sum(a * b for a, b in zip(answers, rules, strict=True)) / sum(answers)
    seconds = world.response * world.call_seconds(world.target, 1, width, split, batch)
    for gamma in gammas:
        drafted = gamma if isinstance(gamma, int) else 3
        blocks = times * world.response / world.block_efficiency
        seconds += blocks * (
            models * drafted * world.call_seconds(world.drafter, 1, 4, sequences=batch)
            + drafters * world.call_seconds(world.target, drafted + 1, width, split, batch)
        )
    memory = generation_memory(world.target, batch, world.length, width, split)
    memory["drafters"] = 4 * models * world.drafter.parameters
    tokens = prompts * world.response * (1 + drafters * len(gammas) * times)
    return StageEstimate(
        "evaluate",
        tokens,
        operations(world.target, tokens, world.length),
        memory | process_memory(world),
        0.0,
        prompts * seconds / batch / shares,
        "target.parallel=tensor, fewer drafters at once, or a smaller evaluate.batch_size",
    )


def training_cost(
    cfg: DictConfig,
    settings: DictConfig,
    world: World,
    tokens: float,
    longest: int,
    scored: float,
    samples: float | None = None,
) -> tuple[float, dict[str, float]]:
    """Return the seconds of an optimizer step on all devices, and the memory per device."""
    (device, width), pieces = world.training(cfg), cfg.trainer.accumulate_grad_batches
    checkpointing, shape = settings.gradient_checkpointing, trained_shape(world.drafter, settings)
    shards = world.gpus if "ModelParallel" in str(cfg.trainer.strategy) else 1
    widest = (samples * longest if samples else tokens) / world.gpus / pieces
    if samples:  # a finetuning: longer batches are computed in parts
        widest = min(widest, settings.batch_tokens)
    memory = training_memory(shape, widest, width, CHUNK_ENTRIES[device.kind], shards, checkpointing)
    seconds = training_seconds(device, shape, tokens / world.gpus, longest, scored / world.gpus, checkpointing)
    return seconds + (pieces - 1) * update_seconds(device, shape), memory | process_memory(world)


def validation_seconds(
    cfg: DictConfig, world: World, settings: DictConfig, tokens: float, length: float, scored: float
) -> float:
    """Return the seconds of validation on all devices: forward passes over `tokens`, loss at `scored` of them."""
    (device, _), shape = world.training(cfg), world.drafter
    if settings.sampled_tokens is None:  # with a sample, validation has all tokens
        shape = trained_shape(shape, settings)
    done = operations(shape, tokens, length / 2, scored)
    return (done / (device.flops * device.efficiency) + loss_seconds(device, shape, scored)) / world.gpus


def trained_shape(shape: Shape, settings: DictConfig) -> Shape:
    """Return a model's shape in training: its output embedding has the kept and sampled tokens alone, if given.

    The embedding is still stored completely, with its gradient and the optimizer's state.
    """
    rows = settings.kept_tokens + (settings.sampled_tokens or 0) if settings.kept_tokens else shape.vocabulary
    return shape._replace(vocabulary=rows, multiplied=shape.multiplied - (shape.vocabulary - rows) * shape.hidden)


def num_validations(settings: DictConfig) -> int:
    """Return how many times a training run validates: at its start, at each interval and after its last step."""
    if not settings.max_steps:
        return 0
    return int(1 + math.ceil(settings.max_steps / min(settings.validate_every, settings.max_steps)))


def num_validated(cfg: DictConfig, settings: DictConfig) -> float:
    """Return the number of responses in all validations of a finetuning."""
    return float(settings.validation_share * cfg.scale.num_responses / 10 * num_validations(settings))


def num_kept_steps(cfg: DictConfig) -> int:
    """Return how many drafters are kept during finetuning."""
    every = cfg.finetune.keep_every
    return (cfg.finetune.max_steps - 1) // every if every else 0


def cached_bytes(cfg: DictConfig, shape: Shape) -> float:
    """Return the bytes per response token in the cache."""
    how = cfg.cache.format
    if how.kind == "sparse":
        ids = 2 if shape.vocabulary <= 2**16 else 4
        # Two more numbers: the log-probability of the response's token and of the tokens outside the top_k.
        return (how.top_k + how.num_samples) * (ids + BYTES[how.dtype]) + 2 * BYTES[how.dtype] + 16
    return shape.hidden * BYTES[how.dtype] + 8 + 16  # log Z and the most likely token take four bytes each
