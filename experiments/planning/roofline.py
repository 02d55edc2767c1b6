"""What a stage will take, before it runs: operations, bytes, seconds and memory of a call, from shapes alone.

A call of a model takes the longer of its arithmetic and its reading of the weights (the roofline), and a fixed time a
layer, which is what small models and single tokens mostly cost. Sources: 2 operations a weight and token, three times
that with the gradients (Kaplan et al., arXiv 2001.08361, section 2.1); activations of 34 bytes a token and hidden unit
in two-byte arithmetic, without the attention matrix, which fused attention does not keep (Korthikanti et al., arXiv
2205.05198, section 4.1).
"""

from typing import NamedTuple

from transformers import PreTrainedModel

from drafter.models.inspection import num_parameters

MASTER, GRADIENT, MOMENTS = 4, 4, 8  # bytes a parameter of float32 training with AdamW
CACHED_ACTIVATION = 34 / 2  # numbers kept a token, layer and hidden unit for the backward pass
OPTIMIZER_BYTES = 7 * 4  # read weight, gradient, two moments; write weight and moments


class Hardware(NamedTuple):
    """One device: operations a second in the precision of training, bytes a second, and what it has room for."""

    name: str
    kind: str  # cpu or cuda
    flops: float
    bandwidth: float
    memory: float
    efficiency: float  # of `flops`, in products of a real model
    seconds_per_layer: float  # of a call, beside arithmetic and memory: launching kernels, Python
    process_memory: float  # what a process takes before there is a model


class Shape(NamedTuple):
    """What of a model its cost depends on. `multiplied`: parameters that each token is multiplied with."""

    parameters: int
    multiplied: int
    layers: int
    hidden: int
    attended: int  # numbers of a query, of all heads
    vocabulary: int
    kv_width: int  # numbers that the key-value cache keeps a token, of all layers

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        """From a model, which may be without weights (see models.meta_model)."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        total, layers = num_parameters(model), config.num_hidden_layers
        kv_width = 2 * groups * width * layers
        return cls(total, total - looked_up, layers, config.hidden_size, heads * width, config.vocab_size, kv_width)

    @property
    def head(self) -> int:
        """Parameters of the output embedding."""
        return self.vocabulary * self.hidden


def operations(shape: Shape, tokens: float, context: float, scored: float | None = None) -> float:
    """Of a forward pass over `tokens` that attend to `context` each; `scored` of them meet the output embedding."""
    scored = tokens if scored is None else scored
    body = shape.multiplied - shape.head
    return 2 * body * tokens + 2 * shape.head * scored + 4 * shape.layers * shape.attended * context * tokens


def forward_seconds(
    hardware: Hardware,
    shape: Shape,
    tokens: float,
    context: float,
    sequences: float,
    width: int,
    split: int = 1,
    scored: float | None = None,
) -> float:
    """Of a forward pass over `tokens` in all, of which each sequence has `context` before it in its cache."""
    arithmetic = operations(shape, tokens, context, scored) / split / (hardware.flops * hardware.efficiency)
    read = (shape.parameters * width + sequences * context * shape.kv_width * width) / split
    return max(arithmetic, read / hardware.bandwidth) + shape.layers * hardware.seconds_per_layer


def training_seconds(
    hardware: Hardware, shape: Shape, tokens: float, length: float, scored: float, checkpointing: bool = False
) -> float:
    """Of an optimizer step over `tokens` in sequences of `length`; `scored` of them have a loss."""
    passes = 4 if checkpointing else 3
    arithmetic = passes * operations(shape, tokens, length / 2, scored) / (hardware.flops * hardware.efficiency)
    return arithmetic + loss_seconds(hardware, shape, scored) + update_seconds(hardware, shape)


def loss_seconds(hardware: Hardware, shape: Shape, scored: float) -> float:
    """Of a distance between two distributions and its gradient: a dozen passes over logits in float32."""
    return 12 * 4 * scored * shape.vocabulary / hardware.bandwidth


def update_seconds(hardware: Hardware, shape: Shape) -> float:
    """Of AdamW's step, and the launches of a forward and a backward pass."""
    return shape.parameters * OPTIMIZER_BYTES / hardware.bandwidth + 3 * shape.layers * hardware.seconds_per_layer


def training_memory(
    shape: Shape, tokens: float, width: int, chunk_entries: int, shards: int, checkpointing: bool
) -> dict[str, float]:
    """Bytes by part, of one device that sees `tokens` a step, with the model split over `shards` of them."""
    kept = tokens * shape.hidden * width * shape.layers * (1 if checkpointing else CACHED_ACTIVATION)
    one_layer = tokens * shape.hidden * width * CACHED_ACTIVATION if checkpointing else 0
    return {
        "weights": MASTER * shape.parameters / shards,
        "gradients": GRADIENT * shape.parameters / shards,
        "optimizer": MOMENTS * shape.parameters / shards,
        "activations": kept + one_layer,
        # Logits of a chunk, of both models, and their gradients; and the head's own gradient.
        "logits": 6 * 4 * max(chunk_entries, 128 * shape.vocabulary) + 4 * shape.head,
    }


def generation_memory(shape: Shape, sequences: float, length: float, width: int, split: int) -> dict[str, float]:
    """Bytes by part, of one device that decodes so many sequences side by side; `split` of them share the model."""
    return {
        "weights": shape.parameters * width / split,
        "key-value cache": sequences * length * shape.kv_width * width / split,
        "logits": 3 * 4 * sequences * shape.vocabulary,
    }
