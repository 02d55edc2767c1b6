"""Make a model narrower: keep the directions of its hidden states that matter most (SliceGPT, arXiv 2401.15024).

A model that normalises by the root mean square computes the same if its hidden states are rotated, as long as the
matrices that read them and write them are rotated too. After a rotation to the principal directions of the states, the
last of them can be left out. One rotation serves all layers, so that the result has the architecture of the original.

Shapes: V vocabulary, H hidden size, K the smaller hidden size, N states, B sequences, T tokens.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from drafter.models.initialization import check_width, principal_directions
from drafter.models.inspection import body

READING = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
WRITING = {"o_proj", "down_proj"}
BEFORE_ATTENTION, BEFORE_MLP = "input_layernorm", "post_attention_layernorm"
SCALED_BY = {"q_proj": BEFORE_ATTENTION, "k_proj": BEFORE_ATTENTION, "v_proj": BEFORE_ATTENTION}
SCALED_BY |= {"gate_proj": BEFORE_MLP, "up_proj": BEFORE_MLP}


@torch.no_grad()
def slice_hidden_states(model: PreTrainedModel, hidden_size: int, ids_BT: torch.Tensor) -> PreTrainedModel:
    """Return a model with a smaller hidden size and the same heads, whose embeddings are not tied.

    Args:
        model: a model of Llama's architecture or one like it (Qwen 2 and 3, Mistral, SmolLM). It is not changed.
        hidden_size: K.
        ids_BT: text by which the directions are chosen; a few thousand tokens are enough.

    Raises:
        ValueError: hidden_size is larger than the model's, or the architecture is another.
    """
    check_width(hidden_size, model.config.get_text_config().hidden_size)
    check_can_slice(model, hidden_size)
    states = model(input_ids=ids_BT.to(model.device), output_hidden_states=True, use_cache=False).hidden_states
    rows_NH = torch.cat([state_BTH.flatten(0, 1).float() for state_BTH in states])
    rows_NH = rows_NH / rows_NH.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # every state counts the same
    return rotate(model, principal_directions(rows_NH, hidden_size))


def check_can_slice(model: PreTrainedModel, size: int) -> None:
    """Raise if a model cannot be sliced to a hidden size, judging by the names and kinds of its parts.

    Raises:
        ValueError: the model has parts that are not Llama's; names the first. Or its heads do not divide the size.
    """
    inner: Any = body(model)
    known = READING | WRITING | {"lm_head"}
    for name, module in model.named_modules():
        part = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and part not in known:
            raise ValueError(_refusal(model, name))
        if isinstance(module, nn.LayerNorm):
            raise ValueError(_refusal(model, name))
        if part.endswith("norm") and part not in (BEFORE_ATTENTION, BEFORE_MLP, "norm", "q_norm", "k_norm"):
            raise ValueError(_refusal(model, name))
    if not isinstance(getattr(inner, "norm", None), nn.Module) or not hasattr(inner, "embed_tokens"):
        raise ValueError(_refusal(model, type(inner).__name__))
    if _gains_are_offsets(inner.norm):
        raise ValueError(_refusal(model, type(inner.norm).__name__))
    heads = model.config.get_text_config().num_attention_heads
    if size % heads:
        nearest = max(heads, size - size % heads)
        raise ValueError(
            f"init.hidden_size is {size}, must be a multiple of the target's {heads} attention heads, because "
            f"transformers refuses one that the heads do not divide: give {nearest} or {nearest + heads}"
        )


def _refusal(model: PreTrainedModel, part: str) -> str:
    return (
        f"{type(model).__name__} has '{part}', which no architecture like Llama's has: its layers cannot be made "
        f"narrower. Leave out init.hidden_size, or give init=projected"
    )


def _gains_are_offsets(norm: Any) -> bool:
    """Return whether a normalisation multiplies by 1 + weight, as Gemma's does."""
    weight = norm.weight
    probe = torch.ones(1, weight.shape[0], device="cpu")
    scaled = copy.deepcopy(norm).to_empty(device="cpu").float()
    nn.init.zeros_(scaled.weight)
    return bool(scaled(probe).abs().sum() > 0)


@torch.no_grad()
def rotate(model: Any, basis_HK: torch.Tensor) -> PreTrainedModel:
    """Return a model whose hidden states are the coordinates of another's in an orthonormal basis.

    The gains of the normalisations are multiplied into the matrices that follow them. What remains of a gain makes up
    for the number of coordinates, over which the root mean square is taken.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    text.hidden_size, text.tie_word_embeddings = basis_HK.shape[1], False
    config.tie_word_embeddings = False
    made = AutoModelForCausalLM.from_config(config).to(model.device, torch.float32)
    theirs: Any = body(model)
    ours: Any = body(made)
    basis_HK = basis_HK.to(model.device)
    gain = math.sqrt(basis_HK.shape[0] / basis_HK.shape[1])
    ours.embed_tokens.weight.copy_(theirs.embed_tokens.weight.float() @ basis_HK)
    for old, new in zip(theirs.layers, ours.layers, strict=True):
        for name, module in old.named_modules():
            part, twin = name.rpartition(".")[2], new.get_submodule(name)
            if part in READING:
                _copy(module, twin, (module.weight.float() * old.get_submodule(SCALED_BY[part]).weight) @ basis_HK)
            elif part in WRITING:
                _copy(module, twin, basis_HK.mT @ module.weight.float(), basis_HK)
            elif part in (BEFORE_ATTENTION, BEFORE_MLP):
                twin.weight.fill_(gain)
            elif part in ("q_norm", "k_norm"):
                twin.weight.copy_(module.weight)
    head = model.get_output_embeddings()
    _copy(head, made.get_output_embeddings(), (head.weight.float() * theirs.norm.weight) @ basis_HK)
    ours.norm.weight.fill_(gain)
    return made


def _copy(old: Any, new: Any, weight: torch.Tensor, basis_HK: torch.Tensor | None = None) -> None:
    """Set a linear module's weight, and its bias, which is rotated if the module writes hidden states."""
    new.weight.copy_(weight)
    if getattr(old, "bias", None) is not None:
        new.bias.copy_(old.bias if basis_HK is None else old.bias @ basis_HK)
