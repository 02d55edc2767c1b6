"""Build a drafter for a target's vocabulary: with random weights, or from parts of a model that exists.

Shapes: V vocabulary, H the target's hidden size, K the drafter's hidden size.
"""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def build_drafter(config: dict[str, Any], vocab_size: int, special_ids: dict[str, int | None]) -> PreTrainedModel:
    """Build a drafter with random weights and the target's vocabulary.

    Args:
        config: fields of the architecture's Hugging Face config; `model_type` chooses the architecture.
        vocab_size: rows of the embedding, as many as the target has, padding included.
        special_ids: the bos, eos and pad token ids of the target's tokenizer.
    """
    fields = dict(config)
    model_type = fields.pop("model_type")
    drafter_config = AutoConfig.for_model(model_type, **fields, vocab_size=vocab_size, **special_ids)
    return AutoModelForCausalLM.from_config(drafter_config)


def special_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, int | None]:
    """Return the config fields of a tokenizer's special tokens, with None for one without a row in the embedding.

    An example is a padding token that was added to the tokenizer but not to the model. A model never sees its id.
    """
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, token in ids.items():
        if token is not None and token >= vocab_size:
            log.info("%s is %d, beyond the embedding's %d rows: it is left out of the config", name, token, vocab_size)
            ids[name] = None
    return ids


def take_layers(model: PreTrainedModel, numbers: Sequence[int]) -> PreTrainedModel:
    """Return a model of some layers of another, with its embedding, last normalisation and output embedding.

    The first and the last layers of a chat model already are a drafter of a kind, and a good start for finetuning
    (LayerSkip, arXiv 2404.16710, drafts with the first ones).

    Args:
        model: the model, which may be without weights (on the meta device). It is not changed.
        numbers: the layers to keep, in this order; -1 is the last one.

    Raises:
        ValueError: a layer does not exist, none is given, or the architecture does not allow to leave out layers.
    """
    prefix, count = layers_of(model)
    if not numbers:
        raise ValueError("the layers to keep are an empty list: give one or more")
    if unknown := [number for number in numbers if not -count <= number < count]:
        raise ValueError(
            f"the layers to keep are {list(numbers)}, but the target has no layer {unknown[0]}: it has 0 to {count - 1}"
        )
    kept = [number % count for number in numbers]
    config = config_of_layers(model, kept)
    weights = model.state_dict()
    renamed = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    for new, old in enumerate(kept):
        of_layer = f"{prefix}{old}."
        renamed |= {
            f"{prefix}{new}.{name.removeprefix(of_layer)}": value
            for name, value in weights.items()
            if name.startswith(of_layer)
        }
    with model.device:
        made = AutoModelForCausalLM.from_config(config).to(model.dtype)
    try:
        made.load_state_dict(renamed)
    except RuntimeError as problem:
        raise ValueError(f"{type(model).__name__} cannot be made of some of its layers: {problem}") from problem
    return made


def config_of_layers(model: PreTrainedModel, kept: Sequence[int]) -> Any:
    """Return the config of a model of some layers of another, which are numbered from 0."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count:  # one entry per layer, such as layer_types
            setattr(text, name, [value[number] for number in kept])
    text.num_hidden_layers = len(kept)
    return config


def layers_of(model: PreTrainedModel) -> tuple[str, int]:
    """Return the prefix of the names of a model's layers, and the number of layers."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{name}.", count
    raise ValueError(f"{type(model).__name__} has no list of {count} layers, so that none can be left out")


def project_embeddings(drafter: PreTrainedModel, input_VH: torch.Tensor, output_VH: torch.Tensor) -> PreTrainedModel:
    """Give a drafter the target's embeddings, projected to its hidden size, in place, and return it.

    The rows keep as much of their inner products as the size allows (Eckart and Young, 1936): their Gram matrix is, up
    to a factor, the nearest one of rank K to that of the target's rows. The factor gives the rows the root mean square
    of the drafter's random initialisation. If the drafter's embeddings are tied, both are the output embedding's.

    Args:
        drafter: a drafter with as many rows as the target.
        input_VH: the target's input embedding.
        output_VH: the target's output embedding.

    Raises:
        ValueError: the drafter's hidden size is larger than the target's.
    """
    given, made = drafter.get_input_embeddings(), drafter.get_output_embeddings()
    check_width(given.weight.shape[1], input_VH.shape[1])
    scale = getattr(drafter.config.get_text_config(), "initializer_range", 0.02)
    with torch.no_grad():
        for embedding, rows_VH in ((given, input_VH), (made, output_VH)):
            width = embedding.weight.shape[1]
            rows_VK = rows_VH.float() @ principal_directions(rows_VH, width)
            embedding.weight.copy_(rows_VK * (scale / rows_VK.square().mean().sqrt()))
    return drafter


def check_width(drafter: int, target: int) -> None:
    """Raise ValueError if a drafter's hidden size is larger than the target's, from which it is to be projected."""
    if drafter > target:
        raise ValueError(
            f"the drafter's hidden size is {drafter}, and init=projected takes at most the target's, {target}: give "
            f"drafter.hidden_size={target} or less, or init=scratch"
        )


def principal_directions(rows_NH: torch.Tensor, number: int) -> torch.Tensor:
    """Return the directions in which rows are largest, as orthonormal columns, shape (H, number).

    They are the eigenvectors of the rows' second moments, without subtracting the mean: projecting on them keeps as
    much of the rows' squared length as any projection on so many directions can.
    """
    moments_HH = rows_NH.float().mT @ rows_NH.float()
    return torch.linalg.eigh(moments_HH).eigenvectors.flip(-1)[:, :number]  # eigh sorts in ascending order


def transplant(
    model: PreTrainedModel,
    own: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> PreTrainedModel:
    """Give a model the vocabulary of another tokenizer, in place, and return the model.

    The row of each new token is the mean of the rows of the pieces into which the model's own tokenizer divides its
    text ("fast vocabulary transfer", Gee et al., arXiv 2402.09977). A special token gets the row of the model's
    own special token of the same name; a token without text of its own, the mean of all rows.

    Args:
        model: the model to be changed.
        own: the tokenizer that the model was trained with.
        tokenizer: the target's.
        vocab_size: the target's rows, padding included.
    """
    pieces = _pieces(own, tokenizer, vocab_size)
    text, tied = model.config.get_text_config(), bool(model.config.get_text_config().tie_word_embeddings)
    with torch.no_grad():
        embeddings = [model.get_input_embeddings(), *([] if tied else [model.get_output_embeddings()])]
        tables = [_means(embedding.weight, pieces) for embedding in embeddings]
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        embeddings = [model.get_input_embeddings(), *([] if tied else [model.get_output_embeddings()])]
        for embedding, table_VH in zip(embeddings, tables, strict=True):
            embedding.weight.copy_(table_VH)
            if getattr(embedding, "bias", None) is not None:
                embedding.bias.zero_()
    for name, token in special_ids(tokenizer, vocab_size).items():
        setattr(text, name, token)
        setattr(model.config, name, token)
        if model.generation_config is not None:
            setattr(model.generation_config, name, token)
    return model


def _pieces(own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[list[int]]:
    """Return, for each id of the new vocabulary, the ids of the old one whose rows are averaged; none for padding."""
    pieces: list[list[int]] = [[] for _ in range(vocab_size)]
    specials = set(tokenizer.all_special_ids)
    names = [token for token in range(min(len(tokenizer), vocab_size)) if token not in specials]
    texts = [_text(tokenizer, token) for token in names]
    encoded = own([text or " " for text in texts], add_special_tokens=False)["input_ids"]
    for token, text, ids in zip(names, texts, encoded, strict=True):
        pieces[token] = list(ids) if text else []
    for name in ("bos", "eos", "pad", "unk"):
        new, old = (getattr(one, f"{name}_token_id") for one in (tokenizer, own))
        if new is not None and old is not None and new < vocab_size:
            pieces[new] = [old]
    return pieces


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token inside a sequence, with its leading space; "" for a part of a character."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    alone, followed = tokenizer.decode([anchor]), tokenizer.decode([anchor, token])
    text = followed.removeprefix(alone)
    return "" if "\ufffd" in text else text


def _means(rows_VH: torch.Tensor, pieces: list[list[int]]) -> torch.Tensor:
    """Return the mean of each list of rows; of all rows for an empty list. Ids that have no row are left out."""
    kept = [[piece for piece in ids if piece < len(rows_VH)] for ids in pieces]
    flat = torch.tensor([piece for ids in kept for piece in ids], dtype=torch.long, device=rows_VH.device)
    owner = torch.tensor([number for number, ids in enumerate(kept) for _ in ids], dtype=torch.long, device=flat.device)
    sums_VH = rows_VH.new_zeros(len(pieces), rows_VH.shape[1]).index_add_(0, owner, rows_VH[flat])
    counts_V1 = torch.bincount(owner, minlength=len(pieces))[:, None]
    return torch.where(counts_V1 > 0, sums_VH / counts_V1.clamp(min=1), rows_VH.mean(0))
