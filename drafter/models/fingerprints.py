"""Fingerprints that identify models and tokenizers independently of where they are stored.

A local model is identified by the content of its files, a hub model by its name and commit.
"""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from drafter.artifacts.manifest import MANIFEST, STARTED, digest, sha256
from drafter.artifacts.storage import local_directory, write_file
from drafter.models.source import Model, ModelSource, TemplateSettings, hub_commit

# All files that loading a model may read: weights in any format, configs, tokenizers, templates, and code.
CONTENT = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
CONTENT |= {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}
NOT_CONTENT = {MANIFEST, STARTED, "requirements.txt"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
TOKENIZER |= {"tokenizer.model", "spiece.model", "merges.txt", "vocab.txt"}
LARGE = 2**26  # bytes from which on a file's checksum is cached, since reading the file takes long


def model_fingerprint(model: Model) -> str:
    """Return 16 hexadecimal digits that identify a model: by its files' content, or by its hub name and commit.

    Raises:
        OSError: the hub cannot be reached, and the model is not in the local cache either.
    """
    return _files_digest(model, lambda file: file.suffix in CONTENT)


def tokenizer_fingerprint(model: Model) -> str:
    """Return 16 hexadecimal digits that identify a model's tokenizer, its chat template and how that is rendered."""
    kinds, template = {".jinja", ".tiktoken"}, ModelSource.from_model(model).template
    files = _files_digest(
        model, lambda file: file.name in TOKENIZER or file.suffix in kinds or _is_tokenizer_code(file)
    )
    return files if template == TemplateSettings() else digest({"files": files, "template": list(template)})


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file's bytes. For a large file, it is cached until the file changes.

    The cache is ~/.cache/drafter (or below XDG_CACHE_HOME). Its keys are the path, size and times of modification.
    """
    facts = path.stat()
    if facts.st_size < LARGE:
        return sha256(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "drafter" / "checksums"
    cached = cache / digest([str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns])
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):  # all ranks of a machine arrive at once: one computes, the others wait
            if not cached.exists():
                write_file(cached, sha256(path).encode())
            return cached.read_text(encoding="utf-8")
    except OSError:  # the cache cannot be written
        return sha256(path)


def _is_tokenizer_code(file: Path) -> bool:
    return file.suffix == ".py" and "tokenization" in file.name


def _files_digest(model: Model, wanted: Callable[[Path], bool]) -> str:
    source = ModelSource.from_model(model)
    directory = local_directory(source.path)
    if directory is None:
        return digest({"hub": source.path, "commit": hub_commit(source)})
    inside = [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]
    files = sorted(file for file in inside if file.is_file() and wanted(file) and file.name not in NOT_CONTENT)
    return digest({file.relative_to(directory).as_posix(): file_checksum(file) for file in files})
