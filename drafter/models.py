"""The frozen target, the trainable drafter, and what their configs say of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils import cached_file


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or a hub model."""
    with _named(path):
        return AutoTokenizer.from_pretrained(_existing(path), revision=revision)


def load_target(
    path: str,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    parallel: str | None = None,
) -> PreTrainedModel:
    """The target: any Hugging Face causal LM, frozen, in eval mode; with parallel="tensor" split over all ranks.

    Raises:
        OSError: the path is neither a local model directory nor a reachable hub model.
    """
    split = {}
    if parallel == "tensor":
        split["distributed_config"] = DistributedConfig(tp_size=dist.get_world_size())
    model = load_model(path, revision, dtype, trust_remote_code, **split)
    return model.requires_grad_(False).eval()


class OutputEmbedding(nn.Module):
    """All of a target that is needed where its hidden states are cached."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding

    def get_output_embeddings(self) -> nn.Module:
        """What a PreTrainedModel calls it."""
        return self.embedding


def load_output_embedding(
    path: str, revision: str | None = None, dtype: str = "float32", trust_remote_code: bool = False, **_: Any
) -> OutputEmbedding:
    """A causal LM's output embedding, frozen; the other weights are not read where they are stored as safetensors."""
    model = meta_model(path, revision, trust_remote_code)
    embedding = model.get_output_embeddings()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = _stored(path, revision, [names[parameter] for parameter in embedding.parameters()])
    if found is None:
        embedding = load_model(path, revision, dtype, trust_remote_code).get_output_embeddings()
    else:
        embedding.to_empty(device="cpu")
        with torch.no_grad():
            for parameter, value in zip(embedding.parameters(), found, strict=True):
                parameter.copy_(value)
    return OutputEmbedding(embedding.to(getattr(torch, dtype))).requires_grad_(False).eval()


def meta_model(
    path: str, revision: str | None = None, trust_remote_code: bool = False, shape: dict[str, Any] | None = None
) -> PreTrainedModel:
    """A causal LM of the right shapes, without weights; of `shape`, its config's fields, where those are given."""
    if shape:
        fields = dict(shape)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        with _named(path):
            config = AutoConfig.from_pretrained(_existing(path), revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_model(
    path: str, revision: str | None = None, dtype: str = "float32", trust_remote_code: bool = False, **how: Any
) -> PreTrainedModel:
    """A causal LM from a local directory or the hub, with trainable weights in `dtype`."""
    with _named(path):
        model = AutoModelForCausalLM.from_pretrained(
            _existing(path), revision=revision, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, **how
        )
    return model.train()


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


def vocabulary_width(path: str, revision: str | None = None) -> int:
    """How many tokens a model scores: its embedding's rows, padding included, read from its config alone."""
    with _named(path):
        config = AutoConfig.from_pretrained(_existing(path), revision=revision)
    return int(config.get_text_config().vocab_size)


def context_limit(path: str, revision: str | None = None) -> int:
    """The longest sequence that a model was made for, in tokens, read from its config alone."""
    with _named(path):
        config = AutoConfig.from_pretrained(_existing(path), revision=revision)
    return _context(config.get_text_config())


def context_length(model: PreTrainedModel) -> int:
    """The longest sequence that the model was made for, in tokens."""
    return _context(model.config)


def generation_eos(path: str, revision: str | None = None, **_: Any) -> int | list[int] | None:
    """The ids that end a response, by the model's generation config; None where it says nothing of them."""
    try:
        return GenerationConfig.from_pretrained(_existing(path), revision=revision).eos_token_id
    except OSError:  # a model without one; generation then ends where its config says
        with _named(path):
            return AutoConfig.from_pretrained(_existing(path), revision=revision).eos_token_id


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


def _stored(path: str, revision: str | None, names: list[str]) -> list[torch.Tensor] | None:
    """These tensors of a model's safetensors files; None where it has none, or other names."""

    def file(name: str) -> str | None:
        found: str | None = cached_file(
            _existing(path),
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    index = file("model.safetensors.index.json")
    places = json.loads(Path(index).read_text())["weight_map"] if index else dict.fromkeys(names, "model.safetensors")
    if not set(names) <= set(places) or not all(file(places[name]) for name in names):
        return None
    tensors = []
    for name in names:
        with safe_open(file(places[name]), "pt") as weights:
            if name not in weights.keys():  # noqa: SIM118, it is no dictionary
                return None
            tensors.append(weights.get_tensor(name))
    return tensors


def _context(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def vocabulary_rows(model: PreTrainedModel) -> int:
    """How many tokens a model scores, padding included."""
    return int(model.get_output_embeddings().out_features)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Put the model's name before what the hub's client says of it."""
    try:
        yield
    except OSError as problem:
        raise OSError(f"cannot load '{path}', as a local directory or from the hub: {problem}") from problem


def _existing(path: str) -> str:
    """The path itself; a local-looking one that is not there is named instead of being asked of the hub."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if looks_local and "/" in path:
        raise OSError("the directory does not exist")
    return path
