"""What all stages of a plan share, and the form of a stage's estimate."""

from typing import NamedTuple

from omegaconf import DictConfig

from experiments.planning.roofline import Hardware, Shape, forward_seconds

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    states: str | None = None  # the dtype of the target's states that the responses have (respond.states)

    @property
    def length(self) -> float:
        """Return the length of a prompt with its response, in tokens."""
        return self.prompt + self.response

    def device(self, low: bool) -> Hardware:
        """Return the hardware with its speed in two-byte (`low`) or four-byte arithmetic."""
        return Hardware.of({str(name): value for name, value in self.hardware.items()}, low)

    def call_seconds(self, shape: Shape, tokens: int, width: int, split: int = 1, sequences: int = 1) -> float:
        """Return the seconds of a model's call with so many tokens of each sequence, in numbers of `width` bytes."""
        device = self.device(width < 4)
        return forward_seconds(device, shape, sequences * tokens, self.length, sequences, width, split)

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


def num_responses(cfg: DictConfig) -> float:
    """Return how many responses are generated, including those for validation."""
    number = cfg.scale.num_responses
    return float(number * (1.1 if "validation" in cfg.distillation.splits else 1))


def process_memory(world: World) -> dict[str, float]:
    """Return the memory of a process without a model."""
    return {"process": world.hardware.process_memory}
