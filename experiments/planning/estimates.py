"""Estimate what each stage of a plan needs: tokens, operations, memory by part, disk and time.

The estimates follow from the config of the stage and the shapes of the two models; see `roofline` for the formulas. The
expected text lengths and block efficiency are in `scale.expected`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from omegaconf import DictConfig

from drafter.losses.chunked import CHUNK_ENTRIES
from experiments.planning.roofline import (
    Hardware,
    Shape,
    forward_seconds,
    generation_memory,
    loss_seconds,
    operations,
    training_memory,
    training_seconds,
    update_seconds,
)
from experiments.running.jobs import Job

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FIRST_ROUND = 16  # tokens; see engines.transformers_engine
ACTIVATIONS = 12  # numbers per token and hidden unit that a forward pass without gradients holds at once


class World(NamedTuple):
    """What the stages of a plan share: hardware, model shapes and expected lengths."""

    hardware: DictConfig
    gpus: int
    target: Shape
    drafter: Shape
    prompt: float
    response: float
    block_efficiency: float
    finetunings: int

    @property
    def length(self) -> float:
        """Return the length of a prompt with its response, in tokens."""
        return self.prompt + self.response

    def device(self, low: bool) -> Hardware:
        """Return the hardware with its speed in two-byte (`low`) or four-byte arithmetic."""
        fields = {str(name): value for name, value in self.hardware.items() if name not in ("flops", "float32_flops")}
        return Hardware(flops=self.hardware.flops if low else self.hardware.float32_flops, **fields)

    def training(self, cfg: DictConfig) -> tuple[Hardware, int]:
        """Return the hardware in the precision of training, and the bytes per number."""
        low = str(cfg.trainer.precision).startswith(("bf16", "16"))
        return self.device(low), 2 if low else 4

    def shares(self, cfg: DictConfig) -> tuple[int, int]:
        """Return how many devices hold one target together, and into how many shares the work is divided."""
        return (self.gpus, 1) if cfg.target.parallel == "tensor" else (1, self.gpus)


class StageEstimate(NamedTuple):
    """The estimate of one run: bytes of memory per device by part, bytes on disk, seconds on all devices."""

    name: str
    tokens: float
    operations: float
    memory: dict[str, float]
    disk: float
    seconds: float
    remedy: str  # what to change if it does not fit

    @property
    def total_memory(self) -> float:
        """Return the bytes of memory per device."""
        return sum(self.memory.values())


def estimates(job: Job, world: World) -> Iterator[StageEstimate]:
    """Yield the estimate of a stage, if the stage computes with a model."""
    how = {
        "pretrain": estimate_pretrain,
        "respond": estimate_respond,
        "cache": estimate_cache,
        "finetune": estimate_finetune,
        "evaluate": estimate_evaluate,
    }
    if job.stage in how:
        yield how[job.stage](job.cfg, world)


def estimate_pretrain(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate pretraining: next-token prediction on packed text."""
    settings, shape = cfg.pretrain, world.drafter
    tokens = settings.batch_size * settings.sequence_length * cfg.trainer.accumulate_grad_batches
    seconds, memory = training_cost(cfg, settings, world, tokens, settings.sequence_length, tokens)
    heldout = cfg.scale.heldout_tokens * num_validations(settings)
    judged = validation_seconds(cfg, world, heldout, settings.sequence_length, heldout)
    return StageEstimate(
        "pretrain",
        tokens * settings.max_steps,
        3 * operations(shape, tokens, settings.sequence_length / 2) * settings.max_steps,
        memory,
        (2 if shape.vocabulary <= 2**16 else 4) * (cfg.scale.pretraining_tokens or tokens * settings.max_steps),
        seconds * settings.max_steps + judged,
        "lower pretrain.batch_size and raise trainer.accumulate_grad_batches, or pretrain.gradient_checkpointing=true",
    )


def estimate_respond(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate batched generation, in rounds: a forward pass over the texts so far, then one per next token."""
    settings, width, shape = cfg.respond, BYTES[cfg.target.dtype], world.target
    device, number, (split, shares) = world.device(width < 4), num_responses(cfg), world.shares(cfg)
    sequences = max(1, settings.batch_tokens / (world.length + world.response))
    batches, seconds, begun, round_ = number / sequences / shares, 0.0, 0.0, FIRST_ROUND
    while begun < settings.max_new_tokens:
        alive = math.exp(-begun / world.response)  # assumes exponentially distributed lengths
        steps = min(round_, settings.max_new_tokens - begun)
        text = world.prompt + begun
        seconds += alive * forward_seconds(device, shape, sequences * text, text / 2, 0, width, split)
        one = forward_seconds(device, shape, sequences, text + steps / 2, sequences, width, split)
        seconds, begun, round_ = seconds + alive * steps * one, begun + steps, 2 * round_
    return StageEstimate(
        "respond",
        number * world.response,
        operations(shape, number * world.length, world.length / 2),
        generation_memory(shape, sequences, world.length + world.response, width, split) | process_memory(world),
        number * world.length * 4,
        0.0 if settings.by == "reference" else batches * seconds,
        "target.parallel=tensor, or lower respond.batch_tokens",
    )


def estimate_cache(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate one forward pass of the target per response; only the sparse format needs the output embedding."""
    width, shape, tokens = BYTES[cfg.target.dtype], world.target, cfg.cache.batch_tokens
    device, number, (split, shares) = world.device(width < 4), num_responses(cfg), world.shares(cfg)
    scored = world.response / world.length if cfg.cache.format.kind == "sparse" else 0.0
    one = forward_seconds(device, shape, tokens, world.length / 2, 0, width, split, tokens * scored)
    memory = generation_memory(shape, 0, 0, width, split)
    memory["activations"] = ACTIVATIONS * tokens * shape.hidden * width
    return StageEstimate(
        "cache",
        number * world.length,
        operations(shape, number * world.length, world.length / 2, number * world.length * scored),
        memory | process_memory(world),
        number * world.response * cached_bytes(cfg, shape),
        number * world.length / tokens / shares * one,
        "target.parallel=tensor, or lower cache.batch_tokens",
    )


def estimate_finetune(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate finetuning: the drafter's steps, and the target's forward passes or its cached output embedding."""
    settings, share = cfg.finetune, cfg.finetune.text_share
    samples = settings.batch_size * cfg.trainer.accumulate_grad_batches
    tokens = samples * ((1 - share) * world.length + share * settings.sequence_length)
    scored = samples * ((1 - share) * world.response + share * settings.sequence_length)
    seconds, memory = training_cost(cfg, settings, world, tokens, settings.sequence_length, scored, samples)
    answered, judged = samples * (1 - share) * settings.max_steps, num_validated(cfg, settings)
    seconds = seconds * settings.max_steps + target_seconds(cfg, world, answered + judged)
    seconds += validation_seconds(cfg, world, judged * world.length, world.length, judged * world.response)
    done = operations(world.target, (answered + judged) * world.length, world.length / 2) if not cfg.inputs.cache else 0
    done += 3 * operations(world.drafter, tokens, settings.sequence_length / 2, scored) * settings.max_steps
    return StageEstimate(
        "finetune",
        tokens * settings.max_steps,
        done,
        memory | target_memory(cfg, world, samples / cfg.trainer.accumulate_grad_batches),
        4 * world.drafter.parameters * (2 + num_kept_steps(cfg)),
        seconds,
        "cache the target (inputs.cache), or target.parallel=fsdp; lower finetune.batch_size and raise "
        "trainer.accumulate_grad_batches, or finetune.gradient_checkpointing=true",
    )


def target_seconds(cfg: DictConfig, world: World, samples: float) -> float:
    """Return the seconds, on all devices, for the target's logits of so many responses."""
    width, shape = BYTES[cfg.target.dtype], world.target
    device = world.device(width < 4)
    if cfg.inputs.cache:
        return 2 * shape.head * samples * world.response / world.gpus / (device.flops * device.efficiency)
    batches = samples / cfg.finetune.batch_size
    tokens = cfg.finetune.batch_size * world.length / world.gpus
    return batches * forward_seconds(device, shape, tokens, world.length / 2, 0, width)


def target_memory(cfg: DictConfig, world: World, samples: float) -> dict[str, float]:
    """Return the memory of the target per device. With FSDP it is the embeddings, a share and two whole layers."""
    width, shape = BYTES[cfg.target.dtype], world.target
    if cfg.inputs.cache:
        return {"target": shape.head * width}
    embeddings = shape.parameters - shape.multiplied + shape.head
    layers = shape.parameters - embeddings
    held = layers / world.gpus + 2 * layers / shape.layers if cfg.target.parallel == "fsdp" else layers
    activations = ACTIVATIONS * samples / world.gpus * world.length * shape.hidden
    return {"target": (embeddings + held + activations) * width}


def estimate_evaluate(cfg: DictConfig, world: World) -> StageEstimate:
    """Estimate decoding each prompt with the target alone, and with each drafter at each γ."""
    width, gammas = BYTES[cfg.target.dtype], cfg.evaluate.num_speculative_tokens
    drafters = sum(world.finetunings if "*" in path else 1 for path in cfg.drafters)
    split, shares = world.shares(cfg)

    def call_seconds(shape: Shape, tokens: int, width: int, split: int = 1) -> float:
        return forward_seconds(world.device(width < 4), shape, tokens, world.length, 1, width, split)

    prompts = len(cfg.task) * cfg.evaluate.prompts_per_task
    seconds = world.response * call_seconds(world.target, 1, width, split)
    for gamma in gammas:
        drafted = gamma if isinstance(gamma, int) else 3
        blocks = drafters * world.response / world.block_efficiency
        seconds += blocks * (
            drafted * call_seconds(world.drafter, 1, 4) + call_seconds(world.target, drafted + 1, width, split)
        )
    memory = generation_memory(world.target, 1, world.length, width, split)
    memory["drafters"] = 4 * drafters * world.drafter.parameters
    tokens = prompts * world.response * (1 + drafters * len(gammas))
    return StageEstimate(
        "evaluate",
        tokens,
        operations(world.target, tokens, world.length),
        memory | process_memory(world),
        0.0,
        prompts * seconds / shares,
        "target.parallel=tensor, or fewer drafters at once",
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
    checkpointing, shape = settings.gradient_checkpointing, world.drafter
    shards = world.gpus if "ModelParallel" in str(cfg.trainer.strategy) else 1
    widest = (samples * longest if samples else tokens) / world.gpus / pieces
    if samples:  # a finetuning: longer batches are computed in parts
        widest = min(widest, settings.batch_tokens)
    memory = training_memory(shape, widest, width, CHUNK_ENTRIES[device.kind], shards, checkpointing)
    seconds = training_seconds(device, shape, tokens / world.gpus, longest, scored / world.gpus, checkpointing)
    return seconds + (pieces - 1) * update_seconds(device, shape), memory | process_memory(world)


def validation_seconds(cfg: DictConfig, world: World, tokens: float, length: float, scored: float) -> float:
    """Return the seconds of validation on all devices: forward passes over `tokens`, loss at `scored` of them."""
    device, _ = world.training(cfg)
    done = operations(world.drafter, tokens, length / 2, scored)
    return (done / (device.flops * device.efficiency) + loss_seconds(device, world.drafter, scored)) / world.gpus


def num_validations(settings: DictConfig) -> int:
    """Return how many times a training run validates: at its start, at each interval and after its last step."""
    return int(1 + math.ceil(settings.max_steps / min(settings.validate_every, settings.max_steps)))


def num_validated(cfg: DictConfig, settings: DictConfig) -> float:
    """Return the number of responses in all validations of a finetuning."""
    return float(cfg.scale.num_responses / 10 * num_validations(settings))


def num_responses(cfg: DictConfig) -> float:
    """Return how many responses are generated, including those for validation."""
    number = cfg.scale.num_responses
    return float(number * (1.1 if "validation" in cfg.distillation.splits else 1))


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
    return shape.hidden * BYTES[how.dtype] + 16


def process_memory(world: World) -> dict[str, float]:
    """Return the memory of a process without a model."""
    return {"process": world.hardware.process_memory}
