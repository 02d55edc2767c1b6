"""Loading: where a model is, and everything that is read from there (tokenizer, config, weights).

A `ModelSource` is the one description of it. Each function here takes a `ModelSource`, or a plain path or hub name,
which is a source with default settings.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
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
from transformers.utils.hub import extract_commit_hash

from drafter.artifacts.storage import local_directory

CHECKSUM_ROWS = 4096  # of an embedding that are turned into float32 at once
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # weights that are stored as they are


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
            "revision": hub_commit(self),
            "trust_remote_code": self.trust_remote_code,
        }


Model = str | Path | ModelSource


@lru_cache
def hub_commit(source: ModelSource) -> str | None:
    """The commit that a hub model's revision stands for, the same for the whole process; None for a local model.

    Raises:
        OSError: it can neither be reached nor found among those that were downloaded before.
    """
    if local_directory(source.path):
        return None
    if re.fullmatch("[0-9a-f]{40}", source.revision or ""):
        return source.revision
    with _named(source.path):
        file = cached_file(_existing(source.path), "config.json", revision=source.revision)
    commit: str | None = extract_commit_hash(file, None)
    return commit or source.revision


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
    """The output embedding that `load_target` gives a causal LM, frozen.

    The other weights are not read where the embedding is stored in safetensors files, unquantised.
    """
    source = ModelSource.of(model)
    empty = meta_model(source)
    embedding, found = empty.get_output_embeddings(), _stored_head(source, empty)
    if found is None:
        embedding = load_model(source).get_output_embeddings()
    else:
        dtype = getattr(torch, source.dtype)
        embedding.load_state_dict({name: value.to(dtype) for name, value in found.items()}, assign=True)
    return OutputEmbedding(embedding).requires_grad_(False).eval()


def embedding_checksum(embedding: nn.Module) -> str:
    """16 hexadecimal digits that identify an output embedding: of its parameters' values, as float32.

    An embedding that is split over ranks is gathered, so that all of them have to call this.
    """
    found = hashlib.sha256()
    for name, parameter in embedding.named_parameters():
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        found.update(f"{name} {list(whole.shape)}".encode())
        for rows in whole.split(CHECKSUM_ROWS):
            found.update(rows.float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


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


def context_length(model: Any) -> int:
    """The longest sequence that a model, or a config, was made for, in tokens."""
    config = getattr(model, "config", model).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def context_limit(model: Model) -> int:
    """The longest sequence that a model was made for, in tokens, read from its config alone."""
    return context_length(load_config(model))


def load_generation_config(model: Model) -> GenerationConfig | None:
    """A model's generation_config.json; None where it has none."""
    source = ModelSource.of(model)
    try:
        return GenerationConfig.from_pretrained(_existing(source.path), revision=source.revision)
    except OSError:
        return None


def _stored_head(source: ModelSource, empty: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """The output embedding's parameters as they are stored; None where only transformers knows how to load them.

    A tensor that is stored under the head's own name is the head, whatever the config says: transformers ties the two
    embeddings only where one of them is missing, or both are equal (PreTrainedModel.tie_weights).
    """
    config, embedding = empty.config, empty.get_output_embeddings()
    elsewhere = getattr(config, "transformers_weights", None)
    prefix = next((name for name, module in empty.named_modules() if module is embedding), None)
    if elsewhere or prefix is None or any(True for _ in embedding.buffers()):
        return None
    if getattr(config, "quantization_config", None):
        return None
    own = {name: f"{prefix}.{name}" for name, _ in embedding.named_parameters()}
    tied = {name: empty.all_tied_weights_keys[key] for name, key in own.items() if key in empty.all_tied_weights_keys}
    stored, found = _stored(source, [*own.values(), *tied.values()]), {}
    for name, parameter in embedding.named_parameters():
        value = stored.get(own[name], stored.get(tied.get(name, "")))
        if value is None or value.shape != parameter.shape or value.dtype not in NUMBERS:
            return None
        found[name] = value
    return found


def _stored(source: ModelSource, names: list[str]) -> dict[str, torch.Tensor]:
    """Those of these tensors that a model's safetensors files have; none, if a file of theirs is missing."""

    def file(name: str) -> str | None:
        found: str | None = cached_file(
            _existing(source.path),
            name,
            revision=source.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    places: dict[str, str] = {}
    if file("model.safetensors"):  # which transformers prefers to parts beside it
        places = dict.fromkeys(names, "model.safetensors")
    elif index := file("model.safetensors.index.json"):
        known = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        places = {name: known[name] for name in names if name in known}
    files = {name: file(place) for name, place in places.items()}
    if not all(files.values()):
        return {}
    tensors = {}
    for name, path in files.items():
        with safe_open(path, "pt") as weights:
            if name in weights.keys():  # noqa: SIM118, it is no dictionary
                tensors[name] = weights.get_tensor(name)
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
