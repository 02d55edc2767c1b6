"""Estimate operations, bytes, seconds and memory of model calls from shapes alone.

The time of a call is the larger of its arithmetic and of reading the weights (the roofline), plus a fixed time per
layer, which dominates for small models and single tokens. Of a mixture of experts, a call reads those that its tokens
meet. Sources: 2 operations per weight and token, three times as
many with gradients (Kaplan et al., arXiv 2001.08361, section 2.1); 34 bytes of activations per token and hidden unit
in two-byte arithmetic, without the attention matrix, which fused attention does not keep (Korthikanti et al., arXiv
2205.05198, section 4.1).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from drafter.models.inspection import num_expert_parameters, num_parameters

MASTER, GRADIENT, MOMENTS = 4, 4, 8  # bytes per parameter of float32 training with AdamW
CACHED_ACTIVATION = 34 / 2  # numbers kept per token, layer and hidden unit for the backward pass
OPTIMIZER_BYTES = 7 * 4  # read weight, gradient and two moments; write weight and moments


class Hardware(NamedTuple):
    """One device: operations per second in the precision of training, bytes per second, and bytes of memory."""

    name: str
    kind: str  # cpu or cuda
    flops: float
    bandwidth: float
    memory: float
    efficiency: float  # the part of `flops` that the products of a real model reach
    seconds_per_layer: float  # of a call, in addition to arithmetic and memory: kernel launches, Python
    process_memory: float  # bytes that a process takes without a model

    @classmethod
    def of(cls, fields: Mapping[str, Any], low: bool) -> "Hardware":
        """Return the hardware of a config with its speed in two-byte (`low`) or four-byte arithmetic."""
        others = {name: value for name, value in fields.items() if name not in ("flops", "float32_flops")}
        return cls(flops=fields["flops" if low else "float32_flops"], **others)


class Shape(NamedTuple):
    """The sizes that determine the cost of a model; `multiplied` counts the parameters that each token multiplies.

    A token meets the share `met` of the `routed` parameters, those of a mixture's experts.
    """

    parameters: int
    multiplied: int
    layers: int
    hidden: int
    attended: int  # numbers per query, over all heads
    vocabulary: int
    kv_width: int  # numbers per token in the key-value cache, over all layers
    routed: int = 0
    met: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        """Return the shape of a model, which may be without weights (see models.loading.meta_model)."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        total, layers = num_parameters(model), config.num_hidden_layers
        kv_width = 2 * groups * width * layers
        routed, met = num_expert_parameters(model)
        multiplied = total - looked_up - routed + met
        attended, share = heads * width, met / routed if routed else 1.0
        return cls(total, multiplied, layers, config.hidden_size, attended, config.vocab_size, kv_width, routed, share)

    @property
    def active(self) -> int:
        """Return the number of parameters that a token meets (see inspection.num_active_parameters)."""
        return round(self.read(1))

    def read(self, tokens: float) -> float:
        """Return the number of parameters that a call with so many tokens reads, if they choose experts at random."""
        return self.parameters - self.routed * (1 - self.met) ** max(tokens, 1)

    @property
    def head(self) -> int:
        """Return the number of parameters of the output embedding."""
        return self.vocabulary * self.hidden


def operations(shape: Shape, tokens: float, context: float, scored: float | None = None) -> float:
    """Return the operations of a forward pass.

    Each of `tokens` attends to `context` tokens; the output embedding is applied to `scored` of them.
    """
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
    """Return the seconds of a forward pass over `tokens` in all; each sequence has `context` tokens in its cache."""
    arithmetic = operations(shape, tokens, context, scored) / split / (hardware.flops * hardware.efficiency)
    read = (shape.read(tokens) * width + sequences * context * shape.kv_width * width) / split
    return max(arithmetic, read / hardware.bandwidth) + shape.layers * hardware.seconds_per_layer


def training_seconds(
    hardware: Hardware, shape: Shape, tokens: float, length: float, scored: float, checkpointing: bool = False
) -> float:
    """Return the seconds of an optimizer step over `tokens` in sequences of `length`; `scored` tokens have a loss."""
    passes = 4 if checkpointing else 3
    arithmetic = passes * operations(shape, tokens, length / 2, scored) / (hardware.flops * hardware.efficiency)
    return arithmetic + loss_seconds(hardware, shape, scored) + update_seconds(hardware, shape)


def loss_seconds(hardware: Hardware, shape: Shape, scored: float) -> float:
    """Return the seconds of a loss and its gradient: about twelve passes over logits in float32."""
    return 12 * 4 * scored * shape.vocabulary / hardware.bandwidth


def update_seconds(hardware: Hardware, shape: Shape) -> float:
    """Return the seconds of AdamW's step, and of the kernel launches of a forward and a backward pass."""
    return shape.parameters * OPTIMIZER_BYTES / hardware.bandwidth + 3 * shape.layers * hardware.seconds_per_layer


def training_memory(
    shape: Shape, tokens: float, width: int, chunk_entries: int, shards: int, checkpointing: bool
) -> dict[str, float]:
    """Return the bytes by part on one device that sees `tokens` per step; `shards` devices share the model."""
    kept = tokens * shape.hidden * width * shape.layers * (1 if checkpointing else CACHED_ACTIVATION)
    one_layer = tokens * shape.hidden * width * CACHED_ACTIVATION if checkpointing else 0
    return {
        "weights": MASTER * shape.parameters / shards,
        "gradients": GRADIENT * shape.parameters / shards,
        "optimizer": MOMENTS * shape.parameters / shards,
        "activations": kept + one_layer,
        # Logits of a chunk for both models, their gradients, and the gradient of the output embedding.
        "logits": 6 * 4 * max(chunk_entries, 128 * shape.vocabulary) + 4 * shape.head,
    }


def generation_memory(shape: Shape, sequences: float, length: float, width: int, split: int) -> dict[str, float]:
    """Return the bytes by part on one device that decodes `sequences` at once; `split` devices share the model."""
    return {
        "weights": shape.parameters * width / split,
        "key-value cache": sequences * length * shape.kv_width * width / split,
        "logits": 3 * 4 * sequences * shape.vocabulary,
    }
