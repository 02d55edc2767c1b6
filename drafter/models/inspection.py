"""What a causal LM is like: hidden states, head, positions, sizes."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from drafter.models.loading import context_length

log = logging.getLogger(__name__)


def check_positions(model: PreTrainedModel, longest: int, what: str) -> None:
    """Refuse sequences that are longer than a learned table of positions; of rotary positions, warn.

    Args:
        longest: tokens of the longest sequence.
        what: which sequences those are.

    Raises:
        ValueError: names the model's architecture, its context and what is too long.
    """
    context = context_length(model)
    if longest <= context:
        return
    told = f"{what} have up to {longest} tokens, and {type(model).__name__} was made for {context}"
    # A table has a row a position, and with some architectures (OPT) a few more.
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    learned = [table for table in tables if table is not model.get_input_embeddings()]
    if any(context <= table.num_embeddings <= context + 8 for table in learned):
        raise ValueError(f"{told}, with a learned position each: shorten them, or give the model more positions")
    log.warning("%s: positions beyond that are new to it", told)


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
    return body(model)(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state


def body(model: PreTrainedModel) -> nn.Module:
    """All of a model but its output embedding; where its class names another prefix than it uses, by the usual name."""
    inner = model.base_model
    return inner if inner is not model else getattr(model, "model", model)


# What scales or caps logits behind the output embedding, in the configs of transformers; each is neutral at these.
NEUTRAL = (None, 0, 1)
HEAD_FIELDS = {"final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier"}


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output embedding of the last hidden states, and nothing is done to either.

    A soft cap is not seen at the small logits of random weights. So the output embedding's output is replaced by large
    numbers for one forward: they are the model's logits, or the head is not plain. On the meta device that works as
    well, since what follows the output embedding is computed; a model that takes no such forward is judged by the
    fields of its config.
    """
    training, empty = model.training, model.device.type == "meta"
    model.eval()  # dropout would make the two differ
    ids = torch.arange(min(8, vocabulary_rows(model)), device=model.device)[None]
    given: list[torch.Tensor] = []

    def replace(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        given.append(inputs[0])
        return _large(output)

    # On the meta device nobody can look into a mask, so that it is given as it is used.
    mask = {"attention_mask": torch.ones(1, 1, ids.numel(), ids.numel(), dtype=torch.bool)} if empty else {}
    try:
        with model.get_output_embeddings().register_forward_hook(replace):
            logits = model(input_ids=ids, use_cache=False, **mask).logits
    except (RuntimeError, ValueError, NotImplementedError):
        if not empty:
            raise
        return all(getattr(model.config.get_text_config(), name, None) in NEUTRAL for name in HEAD_FIELDS)
    finally:
        model.train(training)
    if len(given) != 1 or not torch.equal(logits.float(), _large(logits).float()):
        return False
    return empty or _is_given_hidden_states(model, ids, given[0])


def _is_given_hidden_states(model: PreTrainedModel, ids_BT: torch.Tensor, given_BTH: torch.Tensor) -> bool:
    """Whether the output embedding is given the last hidden states themselves."""
    training = model.training
    hidden_BTH = hidden_states(model.eval(), ids_BT, torch.ones_like(ids_BT))
    model.train(training)
    if not hidden_BTH.isfinite().all():
        return True  # somebody else's to report
    return torch.allclose(given_BTH, hidden_BTH, rtol=1e-2, atol=1e-2 * float(hidden_BTH.abs().max()))


def _large(logits: torch.Tensor) -> torch.Tensor:
    """Numbers from -100 to 100 of the shape of these logits, whole ones, so that every type of floats has them."""
    device = "cpu" if logits.device.type == "meta" else logits.device
    return (torch.arange(logits.numel(), device=device) * 37 % 201 - 100).to(logits.dtype).view(logits.shape)


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
