"""Load a model's tokenizer, config and weights from a local directory or from the hub."""

import hashlib
import json
from pathlib import Path
from typing import Any

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
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file

from drafter.models.source import Model, ModelSource, existing, named

CHECKSUM_ROWS = 4096  # rows of an embedding that are converted to float32 at once
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # the types of unquantised weights


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. Its attribute `template_settings` says how its chat template is rendered."""
    source = ModelSource.from_model(model)
    with named(source.path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source.where())
    tokenizer.template_settings = source.template
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write a tokenizer's files. They do not depend on how it was loaded.

    transformers also writes whether the tokenizer came from a local directory and whether the hub was used. The same
    target would then have another fingerprint on a machine with HF_HUB_OFFLINE=1.
    """
    for field in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(field, None)
    tokenizer.save_pretrained(directory)


def load_config(model: Model) -> Any:
    """Load the config of a model."""
    source = ModelSource.from_model(model)
    with named(source.path):
        return AutoConfig.from_pretrained(**source.where())


def check_quantisation(model: Model) -> None:
    """Check that transformers can load the weights of a model, if they are quantised.

    Raises:
        ValueError: it cannot, for example because a package is missing; names the method and what transformers says.
    """
    fields = getattr(load_config(model), "quantization_config", None)
    if not fields:
        return
    known = fields if isinstance(fields, dict) else fields.to_dict()
    try:
        AutoHfQuantizer.from_config(fields, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, ValueError, RuntimeError) as problem:
        reason = " ".join(str(problem).split()).rstrip(".")
        raise ValueError(
            f"'{ModelSource.from_model(model).path}' has weights that are quantised by {known.get('quant_method')}, "
            f"which cannot be loaded here: {reason}. Or give the checkpoint that is not quantised"
        ) from problem


def load_model(model: Model, **options: Any) -> PreTrainedModel:
    """Load a causal LM with trainable weights.

    Raises:
        ValueError: its weights are quantised, and cannot be loaded here.
    """
    source = ModelSource.from_model(model)
    check_quantisation(source)
    with named(source.path):
        loaded = AutoModelForCausalLM.from_pretrained(**source.where(), dtype=getattr(torch, source.dtype), **options)
    return loaded.train()


def load_target(model: Model) -> PreTrainedModel:
    """Load the target: any Hugging Face causal LM, frozen, in eval mode; with parallel="tensor" split over all ranks.

    Raises:
        OSError: the path is neither a local model directory nor a reachable hub model.
    """
    source, options = ModelSource.from_model(model), {}
    if source.parallel == "tensor":
        options["distributed_config"] = DistributedConfig(tp_size=dist.get_world_size())
    return load_model(source, **options).requires_grad_(False).eval()


class OutputEmbedding(nn.Module):
    """The only part of a target that is needed if its hidden states are cached."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the embedding, under the name of the method of PreTrainedModel."""
        return self.embedding


def load_output_embedding(model: Model) -> OutputEmbedding:
    """Load the output embedding of a causal LM, frozen, as `load_target` would load it.

    The other weights are not read if the embedding is stored unquantised in safetensors files.
    """
    source = ModelSource.from_model(model)
    empty = meta_model(source)
    embedding, tensors = empty.get_output_embeddings(), _stored_head(source, empty)
    if tensors is None:
        embedding = load_model(source).get_output_embeddings()
    else:
        dtype = getattr(torch, source.dtype)
        embedding.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, assign=True)
    return OutputEmbedding(embedding).requires_grad_(False).eval()


def embedding_checksum(embedding: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify an output embedding by its parameters' values in float32.

    An embedding that is split over ranks is gathered, so all ranks have to call this function.
    """
    checksum = hashlib.sha256()
    for name, parameter in embedding.named_parameters():
        value = parameter.detach()
        full = value.full_tensor() if isinstance(value, DTensor) else value
        checksum.update(f"{name} {list(full.shape)}".encode())
        for rows in full.split(CHECKSUM_ROWS):
            checksum.update(rows.float().cpu().numpy().tobytes())
    return checksum.hexdigest()[:16]


def meta_model(model: Model, shape: dict[str, Any] | None = None) -> PreTrainedModel:
    """Build a causal LM without weights (on the meta device) from its config, or from the config fields `shape`."""
    source = ModelSource.from_model(model)
    if shape:
        fields = dict(shape)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        config = load_config(source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)


def vocabulary_width(model: Model) -> int:
    """Return the number of rows of a model's embedding, padding included, read from its config alone."""
    return int(load_config(model).get_text_config().vocab_size)


def context_length(model: Any) -> int:
    """Return the maximum sequence length of a model or config in tokens: 2**31 if it has no limit."""
    config = getattr(model, "config", model).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def context_limit(model: Model) -> int:
    """Return the maximum sequence length of a model in tokens, read from its config alone."""
    return context_length(load_config(model))


def load_generation_config(model: Model) -> GenerationConfig | None:
    """Load a model's generation_config.json. Return None if it has none."""
    source = ModelSource.from_model(model)
    try:
        return GenerationConfig.from_pretrained(existing(source.path), revision=source.revision)
    except OSError:
        return None


def _stored_head(source: ModelSource, empty: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Return the stored parameters of the output embedding, or None if only transformers knows how to load them.

    A tensor that is stored under the name of the output embedding is used even if the config says that the embeddings
    are tied: transformers ties them only if one of them is missing or both are equal (PreTrainedModel.tie_weights).
    """
    config, embedding = empty.config, empty.get_output_embeddings()
    elsewhere = getattr(config, "transformers_weights", None)
    prefix = next((name for name, module in empty.named_modules() if module is embedding), None)
    if elsewhere or prefix is None or any(True for _ in embedding.buffers()):
        return None
    if getattr(config, "quantization_config", None):
        return None
    keys = {name: f"{prefix}.{name}" for name, _ in embedding.named_parameters()}
    tied = {name: empty.all_tied_weights_keys[key] for name, key in keys.items() if key in empty.all_tied_weights_keys}
    stored, tensors = _stored(source, [*keys.values(), *tied.values()]), {}
    for name, parameter in embedding.named_parameters():
        value = stored.get(keys[name], stored.get(tied.get(name, "")))
        if value is None or value.shape != parameter.shape or value.dtype not in NUMBERS:
            return None
        tensors[name] = value
    return tensors


def _stored(source: ModelSource, names: list[str]) -> dict[str, torch.Tensor]:
    """Read those of the named tensors that a model's safetensors files have, or none if a file is missing."""

    def local_file(name: str) -> str | None:
        path: str | None = cached_file(
            existing(source.path),
            name,
            revision=source.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return path

    file_names: dict[str, str] = {}
    if local_file("model.safetensors"):  # transformers prefers it to shards in the same directory
        file_names = dict.fromkeys(names, "model.safetensors")
    elif index := local_file("model.safetensors.index.json"):
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        file_names = {name: weight_map[name] for name in names if name in weight_map}
    files = {name: local_file(file_name) for name, file_name in file_names.items()}
    if not all(files.values()):
        return {}
    tensors = {}
    for name, path in files.items():
        with safe_open(path, "pt") as weights:
            if name in weights.keys():  # noqa: SIM118, it is not a dictionary
                tensors[name] = weights.get_tensor(name)
    return tensors
