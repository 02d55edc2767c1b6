"""Properties of a causal LM: hidden states, output embedding, positions, number of parameters."""

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from drafter.models.loading import context_length

log = logging.getLogger(__name__)


def check_positions(model: PreTrainedModel, longest: int, what: str) -> None:
    """Raise on sequences that are longer than a table of learned positions; warn if the positions are of another kind.

    Args:
        model: the model that will read the sequences.
        longest: tokens of the longest sequence.
        what: a description of the sequences, for the message.

    Raises:
        ValueError: the model has learned positions, and fewer than `longest`.
    """
    context = context_length(model)
    if longest <= context:
        return
    problem = f"{what} have up to {longest} tokens, and {type(model).__name__} was made for {context}"
    # A table has one row per position, and with some architectures (OPT) a few more.
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    learned = [table for table in tables if table is not model.get_input_embeddings()]
    if any(context <= table.num_embeddings <= context + 8 for table in learned):
        raise ValueError(f"{problem}, with a learned position each: shorten them, or give the model more positions")
    log.warning("%s: it was not trained at the positions beyond that", problem)


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters. Tied ones count once, and rows removed by `trimming` do not count."""
    uncounted = sum(getattr(module, "uncounted_parameters", 0) for module in model.modules())
    return sum(parameter.numel() for parameter in _unpacked(model).parameters()) - uncounted


def _unpacked(model: nn.Module) -> nn.Module:
    """Return the model itself or, of quantised weights, which pack several into one number, the model without them."""
    config = getattr(model, "config", None)
    if not getattr(config, "quantization_config", None):
        return model
    with torch.device("meta"):
        return type(model)(config)


# Config fields for the number of experts that each token meets.
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")


def num_expert_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return the numbers of parameters of a mixture's routed experts: of all, and of those that a token meets.

    Shared experts, which every token meets, are none of them. Without a known field in the config all are met.
    """
    fields = model.config.get_text_config()
    known = [getattr(fields, name, None) for name in CHOSEN]
    chosen = next((number for number in known if isinstance(number, int)), None)
    counted, active = 0, 0
    if chosen is None:
        return counted, active
    for module in _unpacked(model).modules():
        if "Experts" in type(module).__name__:
            stacked = [one for one in module.parameters(recurse=False) if one.dim() > 1]
            sizes = [(len(one), one.numel()) for one in stacked]
        elif isinstance(module, nn.ModuleList) and any("Expert" in type(one).__name__ for one in module):
            sizes = [(len(module), sum(parameter.numel() for parameter in module.parameters()))]
        else:
            continue
        counted += sum(size for _, size in sizes)
        active += sum(size * min(chosen, experts) // experts for experts, size in sizes)
    return counted, active


def num_active_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters that a token meets: all, but for the experts that a router leaves out.

    A call with one token reads these from memory, so that c and the memory-bound speed-up are ratios of them.
    """
    counted, active = num_expert_parameters(model)
    return num_parameters(model) - counted + active


def hidden_states(model: PreTrainedModel, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """Return the last hidden states, shape (B, T, H), the input of the output embedding.

    The mask is 1 at real tokens; None means that all are. Padding has to be on the right, so that positions count from
    the first token.
    """
    return body(model)(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state


def body(model: PreTrainedModel) -> nn.Module:
    """Return a model without its output embedding. If `base_model` is wrong, return the attribute `model`."""
    inner = model.base_model
    return inner if inner is not model else getattr(model, "model", model)


# Config fields of transformers that scale or cap the logits after the output embedding, and their neutral values.
NEUTRAL = (None, 0, 1)
HEAD_FIELDS = {"final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier"}


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether the logits are the output embedding applied to the last hidden states, without any change.

    A soft cap has no visible effect on the small logits of random weights. Therefore one forward pass runs with the
    output of the output embedding replaced by large numbers: the head is plain if these arrive as the model's logits.
    This also works on the meta device, since the replaced values are real. A model that cannot run on the meta device
    is judged by its config fields.
    """
    training, empty = model.training, model.device.type == "meta"
    model.eval()  # with dropout, two forward passes would differ
    ids = torch.arange(min(8, vocabulary_rows(model)), device=model.device)[None]
    inputs_of_head: list[torch.Tensor] = []

    def replace(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        inputs_of_head.append(inputs[0])
        return _large(output)

    # On the meta device, transformers cannot inspect a mask, so it is passed in its final form.
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
    if len(inputs_of_head) != 1 or not torch.equal(logits.float(), _large(logits).float()):
        return False
    return empty or _are_hidden_states(model, ids, inputs_of_head[0])


def _are_hidden_states(model: PreTrainedModel, ids_BT: torch.Tensor, input_BTH: torch.Tensor) -> bool:
    """Return whether the input of the output embedding is the last hidden states without any change."""
    training = model.training
    hidden_BTH = hidden_states(model.eval(), ids_BT, torch.ones_like(ids_BT))
    model.train(training)
    if not hidden_BTH.isfinite().all():
        return True  # weights that are not finite are reported elsewhere
    return torch.allclose(input_BTH, hidden_BTH, rtol=1e-2, atol=1e-2 * float(hidden_BTH.abs().max()))


def _large(logits: torch.Tensor) -> torch.Tensor:
    """Return integers from -100 to 100 in the shape of the logits, exact in every floating-point type."""
    device = "cpu" if logits.device.type == "meta" else logits.device
    return (torch.arange(logits.numel(), device=device) * 37 % 201 - 100).to(logits.dtype).view(logits.shape)


def check_drafter_head(drafter: PreTrainedModel) -> None:
    """Raise if the losses, which compute logits from hidden states and output embedding, would see other logits.

    Raises:
        ValueError: the model scales or caps its logits after the output embedding.
    """
    if not has_plain_head(drafter):
        raise ValueError(
            f"{type(drafter).__name__} changes its logits after the output embedding (a scale or a soft cap): "
            f"choose an architecture that does not for the drafter"
        )


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of a model's output embedding, padding included."""
    return int(model.get_output_embeddings().out_features)
