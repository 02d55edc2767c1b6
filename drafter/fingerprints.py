"""Fingerprints of models and tokenizers: what identifies them, wherever they lie."""

from collections.abc import Callable
from pathlib import Path

from drafter.artifacts import MANIFEST, STARTED, digest, sha256
from drafter.loading import Model, ModelSource
from drafter.storage import local_directory


def model_fingerprint(model: Model) -> str:
    """16 hexadecimal digits that identify a model: its files' content, or its hub name and revision."""
    return _files_digest(model, lambda file: file.suffix in {".json", ".safetensors", ".jinja", ".model"})


def tokenizer_fingerprint(model: Model) -> str:
    """16 hexadecimal digits that identify a model's tokenizer and chat template."""
    kept = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"}
    return _files_digest(model, lambda file: file.name in kept or file.suffix == ".jinja")


def _files_digest(model: Model, wanted: Callable[[Path], bool]) -> str:
    source = ModelSource.of(model)
    directory = local_directory(source.path)
    if directory is None:
        return digest({"hub": source.path, "revision": source.revision})
    files = sorted(file for file in directory.iterdir() if wanted(file) and file.name not in {MANIFEST, STARTED})
    return digest({file.name: sha256(file) for file in files})
