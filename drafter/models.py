"""Causal LMs as this project uses them: a drafter with random weights, hidden states, heads, sizes."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


def build_drafter(config: dict[str, Any], vocab_size: int, special_ids: dict[str, int | None]) -> PreTrainedModel:
    """A drafter with random weights and the target's vocabulary.

    Args:
        config: fields of the architecture's Hugging Face config; `model_type` chooses the architecture.
        vocab_size: rows of the embedding: the target's own, its padding included.
        special_ids: bos/eos/pad token ids, as in the target's tokenizer.
    """
    fields = dict(config)
    model_type = fields.pop("model_type")
    drafter_config = AutoConfig.for_model(model_type, **fields, vocab_size=vocab_size, **special_ids)
    return AutoModelForCausalLM.from_config(drafter_config)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The config fields that name a tokenizer's special tokens."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def context_length(model: Any) -> int:
    """The longest sequence that a model, or a config, was made for, in tokens."""
    config = getattr(model, "config", model).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def context_of_fields(config: dict[str, Any]) -> int:
    """`context_length` of a model that `build_drafter` would build from these fields."""
    fields = dict(config)
    return context_length(AutoConfig.for_model(fields.pop("model_type"), **fields))


def num_parameters(model: nn.Module) -> int:
    """Parameters, a tied one counted once; of a trimmed drafter (see trimming) without the rows that its head lost."""
    uncounted = sum(getattr(module, "uncounted_parameters", 0) for module in model.modules())
    return sum(parameter.numel() for parameter in model.parameters()) - uncounted


def hidden_states(model: PreTrainedModel, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The last hidden states, shape (B, T, hidden): what the output embedding turns into logits.

    The mask is 1 at real tokens; padding stands on the right, so that positions count from the first token.
    """
    return model.base_model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output embedding of the last hidden states, neither scaled nor capped after it."""
    training = model.training
    model.eval()  # dropout would make the two differ
    ids = torch.arange(min(8, vocabulary_rows(model)), device=model.device)[None]
    ours = model.get_output_embeddings()(hidden_states(model, ids, torch.ones_like(ids)))
    theirs = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    # Logits that are not finite are somebody else's to report.
    return not theirs.isfinite().all() or torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))


def check_drafter_head(drafter: PreTrainedModel) -> None:
    """Refuse an architecture whose logits the losses, which see hidden states and the output embedding, would not know.

    Raises:
        ValueError: it scales or caps its logits after the output embedding.
    """
    if not has_plain_head(drafter):
        raise ValueError(
            f"{type(drafter).__name__} changes its logits after the output embedding (a scale or a soft cap): "
            f"choose an architecture that does not, as a drafter"
        )


def vocabulary_rows(model: PreTrainedModel) -> int:
    """How many tokens a model scores, padding included."""
    return int(model.get_output_embeddings().out_features)
