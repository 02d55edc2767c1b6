"""Loading: where a model is, and everything that is read from there (tokenizer, config, weights).

A `ModelSource` is the one description of it. Each function here takes a `ModelSource`, or a plain path or hub name,
which is a source with default settings.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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

from drafter.models import context_length
from drafter.storage import local_directory


class ModelSource(NamedTuple):
    """Where a model is, and how it is loaded.

    Attributes:
        path: a local directory, or a name on the hub.
        revision: branch, tag or commit of a hub model; None: its main branch.
        dtype: the type of the weights once they are loaded, e.g. "float32".
        trust_remote_code: whether code that comes with the model may be run.
        parallel: how the weights are split over ranks ("tensor", "fsdp"), or None.
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    parallel: str | None = None

    @classmethod
    def of(cls, model: "str | Path | ModelSource") -> "ModelSource":
        """The source itself, or a path as a source with default settings."""
        return model if isinstance(model, ModelSource) else cls(str(model))

    def where(self) -> dict[str, Any]:
        """The arguments that every `from_pretrained` of transformers takes.

        Raises:
            OSError: the path looks like a local one, and there is no such directory.
        """
        return {
            "pretrained_model_name_or_path": _existing(self.path),
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }


Model = str | Path | ModelSource


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model."""
    source = ModelSource.of(model)
    with _named(source.path):
        return AutoTokenizer.from_pretrained(**source.where())


def load_config(model: Model) -> Any:
    """The config of a model."""
    source = ModelSource.of(model)
    with _named(source.path):
        return AutoConfig.from_pretrained(**source.where())


def load_model(model: Model, **how: Any) -> PreTrainedModel:
    """A causal LM with trainable weights."""
    source = ModelSource.of(model)
    with _named(source.path):
        loaded = AutoModelForCausalLM.from_pretrained(**source.where(), dtype=getattr(torch, source.dtype), **how)
    return loaded.train()


def load_target(model: Model) -> PreTrainedModel:
    """The target: any Hugging Face causal LM, frozen, in eval mode; with parallel="tensor" split over all ranks.

    Raises:
        OSError: the path is neither a local model directory nor a reachable hub model.
    """
    source, split = ModelSource.of(model), {}
    if source.parallel == "tensor":
        split["distributed_config"] = DistributedConfig(tp_size=dist.get_world_size())
    return load_model(source, **split).requires_grad_(False).eval()


class OutputEmbedding(nn.Module):
    """All of a target that is needed where its hidden states are cached."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding

    def get_output_embeddings(self) -> nn.Module:
        """What a PreTrainedModel calls it."""
        return self.embedding


def load_output_embedding(model: Model) -> OutputEmbedding:
    """A causal LM's output embedding, frozen; the other weights are not read where they are stored as safetensors."""
    source = ModelSource.of(model)
    empty = meta_model(source)
    embedding = empty.get_output_embeddings()
    names = {parameter: name for name, parameter in empty.named_parameters()}
    found = _stored(source, [names[parameter] for parameter in embedding.parameters()])
    if found is None:
        embedding = load_model(source).get_output_embeddings()
    else:
        embedding.to_empty(device="cpu")
        with torch.no_grad():
            for parameter, value in zip(embedding.parameters(), found, strict=True):
                parameter.copy_(value)
    return OutputEmbedding(embedding.to(getattr(torch, source.dtype))).requires_grad_(False).eval()


def meta_model(model: Model, shape: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal LM of the right shapes, without weights; of `shape`, its config's fields, where those are given."""
    source = ModelSource.of(model)
    if shape:
        fields = dict(shape)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        config = load_config(source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)


def vocabulary_width(model: Model) -> int:
    """How many tokens a model scores: its embedding's rows, padding included, read from its config alone."""
    return int(load_config(model).get_text_config().vocab_size)


def context_limit(model: Model) -> int:
    """The longest sequence that a model was made for, in tokens, read from its config alone."""
    return context_length(load_config(model))


def generation_eos(model: Model) -> int | list[int] | None:
    """The ids that end a response, by the model's generation config; None where it says nothing of them."""
    source = ModelSource.of(model)
    try:
        return GenerationConfig.from_pretrained(_existing(source.path), revision=source.revision).eos_token_id
    except OSError:  # a model without one; generation then ends where its config says
        return load_config(source).eos_token_id


def _stored(source: ModelSource, names: list[str]) -> list[torch.Tensor] | None:
    """These tensors of a model's safetensors files; None where it has none, or other names."""

    def file(name: str) -> str | None:
        found: str | None = cached_file(
            _existing(source.path),
            name,
            revision=source.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    index = file("model.safetensors.index.json")
    places = (
        json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        if index
        else dict.fromkeys(names, "model.safetensors")
    )
    if not set(names) <= set(places) or not all(file(places[name]) for name in names):
        return None
    tensors = []
    for name in names:
        with safe_open(file(places[name]), "pt") as weights:
            if name not in weights.keys():  # noqa: SIM118, it is no dictionary
                return None
            tensors.append(weights.get_tensor(name))
    return tensors


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Put the model's name before what the hub's client says of it."""
    try:
        yield
    except OSError as problem:
        raise OSError(f"cannot load '{path}', as a local directory or from the hub: {problem}") from problem


def _existing(path: str) -> str:
    """The path itself; a local-looking one that is not there is named instead of being asked of the hub."""
    if local := local_directory(path):
        return str(local)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise OSError("the directory does not exist")
    return path
