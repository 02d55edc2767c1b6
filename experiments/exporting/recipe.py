"""Describe how a drafter was made, from its manifest and from those of its inputs that are on this machine."""

import json
import re
from pathlib import Path
from typing import Any

from drafter.artifacts.manifest import MANIFEST
from drafter.artifacts.provenance import describe_machine
from drafter.artifacts.storage import local_directory
from drafter.models.loading import load_config, meta_model
from experiments.reporting.identity import read_record
from experiments.running.inputs import ORIGIN
from experiments.running.progress import duration
from experiments.running.recipes import INSTRUCTIONS, TEXT

Manifest = dict[str, Any]
# A path from the root of a machine: not a part of a longer word, of a relative path or of a URL.
_ABSOLUTE = re.compile(r"(?<![\w.:/…~}<>-])/(?:[^\s/'\"`,;:()\[\]{}]+/)*([^\s/'\"`,;:()\[\]{}]+)/?")


def portable(text: str) -> str:
    """Return a text in which paths of this machine are shortened to their last part.

    >>> portable("python -m experiments.finetune root=/home/me/runs/mine target.path=org/name")
    'python -m experiments.finetune root=…/mine target.path=org/name'
    """
    return _ABSOLUTE.sub(r"…/\1", text)


def absolute_paths(*files: Path) -> list[str]:
    """Return the paths from the root of a machine that files name, which a reader elsewhere has no use for.

    Args:
        files: text files, such as manifests.
    """
    texts = [file.read_text(encoding="utf-8") for file in files]
    return sorted({found[0] for text in texts for found in _ABSOLUTE.finditer(text)})


def manifest_of(folder: str | Path) -> Manifest:
    """Return a directory's manifest; {} if no stage of this project made it."""
    path = (local_directory(folder) or Path(folder)) / MANIFEST
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def describe_architecture(drafter: str) -> dict[str, str]:
    """Return a line that describes the drafter's architecture."""
    config = load_config(drafter)
    shape = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads"
    tied = "tied" if config.tie_word_embeddings else "untied"
    size = sum(parameter.numel() for parameter in meta_model(drafter).parameters())
    return {
        "architecture": f"{config.model_type}: {shape}, {config.vocab_size:,} rows of embedding, {tied}; "
        f"{size:,} parameters"
    }


def describe_training(manifest: Manifest) -> dict[str, str]:
    """Return lines on how a drafter was made, in the order of the work. An export has the lines of its drafter.

    Raises:
        ArtifactError: an earlier version of this project made the drafter.
    """
    config = manifest.get("config", {})
    if not config:
        return {}
    if manifest["stage"] == "export":
        return dict(manifest.get("facts", {}).get("training", {}))
    if manifest["stage"] == "trim":
        head = f"{manifest['counts']['kept']} of {manifest['counts']['vocabulary']} tokens kept"
        return {"head": head} | describe_training(manifest_of(config["trim"]["drafter"]))
    if manifest["stage"] == "average":
        *others, last = config["average"]["drafters"]
        weights = f"the mean of those of {', '.join(others)} and of the drafter that the following lines are about"
        return {"weights": portable(weights)} | describe_training(manifest_of(last))
    stages = lineage(manifest)
    rows = describe_target(config["target"]) | describe_data(config["data"])
    for number, one in enumerate(stages, start=1):
        made = sum(other["stage"] == one["stage"] for other in stages[:number])
        several = sum(other["stage"] == one["stage"] for other in stages) > 1
        lines = describe_pretraining(one) if one["stage"] == "pretrain" else describe_finetuning(one)
        rows |= {f"{name}, {made}" if several else name: line for name, line in lines.items()}
    start = unrecorded_start(stages[0])
    rows |= describe_times(stages, f"; without the time that its start took, {start}" if start else "")
    environment = manifest["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    rows |= {"seed": str(config["seed"]), "code": f"commit {environment['commit']}; {versions}"}
    return {name: portable(line) for name, line in rows.items()}


def lineage(manifest: Manifest) -> list[Manifest]:
    """Return the manifests of the trainings that made a drafter, the first one first, as far as they are here."""
    found = [manifest]
    while start := _start(found[0]):
        found.insert(0, start)
    return found


def unrecorded_start(manifest: Manifest) -> str | None:
    """Return the drafter that a finetuning started from if no manifest here says how it was made; None otherwise."""
    path = manifest["config"]["inputs"].get("drafter") if manifest["stage"] == "finetune" else None
    return path if path and not manifest_of(path) else None


def _start(manifest: Manifest) -> Manifest:
    """Return the manifest of the training that another one started from; {} if there is none."""
    config = manifest["config"]
    path = config["inputs"].get("drafter") if manifest["stage"] == "finetune" else _init(config).get("path")
    found = manifest_of(path) if path else {}
    return found if found.get("stage") in ("pretrain", "finetune") else {}


def _init(config: dict[str, Any]) -> dict[str, Any]:
    """Return the section `init` of a config; {} in one of an earlier version."""
    return dict(config.get("init") or {})


def describe_target(target: dict[str, Any]) -> dict[str, str]:
    """Return a line on the target: its path, and where it is from if its directory says so."""
    revision = f", revision {target['revision']}" if target.get("revision") else ""
    origin = Path(target["path"]) / ORIGIN
    source = f": {json.loads(origin.read_text(encoding='utf-8'))['from']}" if origin.exists() else ""
    return {"target": f"{target['path']}{revision}{source}, in {target.get('dtype', 'float32')}"}


def describe_data(data: dict[str, Any]) -> dict[str, str]:
    """Return lines on the data: what kind they are of, or their names."""
    if data["kind"] == "docstrings":
        return {"data": "docstrings and code of the installed Python packages " + ", ".join(data["packages"])}
    sources = {INSTRUCTIONS: data["instructions"], TEXT: data["pretraining"]}
    lines = {part: describe_sources(part, sections) for part, sections in sources.items()}
    return {"instructions": lines[INSTRUCTIONS], "pretraining text": lines[TEXT]}


def describe_sources(part: str, sections: dict[str, Any]) -> str:
    """Return the sources of the instructions or of the text, with their shares."""
    named = _by_name(sections)
    total = sum(one.get("weight") or 1.0 for one in named.values())
    found = []
    for one in named.values():
        if one.get("kind") == "self":
            what = "instructions" if part == INSTRUCTIONS else "text"
            source = f"{what} that the target wrote itself"
        elif one.get("kind") == "docstrings":
            source = "docstrings of the open-source Python packages " + ", ".join(one["packages"])
        else:
            source = str(one["path"]) + (f" ({one['revision']})" if one.get("revision") else "")
        found.append((source, (one.get("weight") or 1.0) / total))
    shares = {source: sum(share for other, share in found if other == source) for source, _ in found}
    if len(shares) == 1:
        return next(iter(shares))
    return "; ".join(f"{source} ({share:.0%})" for source, share in shares.items())


def describe_pretraining(manifest: Manifest) -> dict[str, str]:
    """Return lines on a pretraining."""
    settings, start = manifest["settings"], _init(manifest["config"])
    tokens = settings["max_steps"] * settings["batch_size"] * settings["sequence_length"]
    origin = f"init={start['kind']}" + (f", {start['path']}" if start.get("path") else "") if start else ""
    done = f"{settings['max_steps']} steps, {tokens:,} tokens, {duration(manifest['seconds'])}"
    return {**({"start": origin} if origin else {}), "pretraining": f"{done}: `{manifest['command']}`"}


def describe_finetuning(manifest: Manifest) -> dict[str, str]:
    """Return lines on a finetuning: the responses, the loss and the steps."""
    config, settings = manifest["config"], manifest["settings"]
    drafter = read_record(manifest, config["out"])
    values = {key: value for key, value in settings["loss_settings"].items() if key != "name"}
    loss = ", ".join([str(drafter.loss), *(f"{key} {one}" for key, one in values.items())])
    steps = (
        f"{settings['max_steps']} steps of {settings['batch_size']} samples, {settings['text_share']:.0%} of them text"
    )
    return {
        **describe_responses(config),
        "distillation loss": loss,
        "distillation": f"{steps}, {duration(manifest['seconds'])}: `{manifest['command']}`",
    }


def describe_responses(config: dict[str, Any]) -> dict[str, str]:
    """Return a line on the responses that a drafter was trained on."""
    cache, responses = _distillation_set(config)
    if not (cache or responses):
        return {}
    counts = responses.get("counts", {}) | cache.get("counts", {})
    size = f"{counts['rows'] if cache else counts['written']:,} responses"
    if cache:
        size += f" of {counts['tokens']:,} tokens in all"
    how = config["distillation"]
    return {"responses": f"{size}, written by: {how['by']}, at temperatures {how['temperatures']}"}


def _distillation_set(config: dict[str, Any]) -> tuple[Manifest, Manifest]:
    """Return the manifests of the cache and of the responses; {} for one that is not here, or was not used."""
    inputs = config["inputs"]
    cache = manifest_of(inputs.get("cache") or "")
    responses = cache["config"]["inputs"].get("responses") if cache else inputs.get("responses")
    return cache, manifest_of(responses or "")


def describe_times(stages: list[Manifest], limit: str = "") -> dict[str, str]:
    """Return a line with the time of each stage whose manifest is here, the sum, and what the sum leaves out."""
    made: dict[str, dict[str, Manifest]] = {}
    for one in stages:
        config = one["config"]
        cache, responses = _distillation_set(config) if one["stage"] == "finetune" else ({}, {})
        data = manifest_of(config["inputs"].get("data") or "")
        for name, manifest in [("data", data), *_self_written(data), ("responses", responses), ("cache", cache)]:
            if manifest:
                made.setdefault(name, {})[str(manifest["config"]["out"]) + str(manifest["settings"])] = manifest
        made.setdefault("pretraining" if one["stage"] == "pretrain" else "finetuning", {})[config["out"]] = one
    seconds = {name: sum(one["seconds"] for one in parts.values()) for name, parts in made.items()}
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    machines = dict.fromkeys(describe_machine(one["environment"]) for parts in made.values() for one in parts.values())
    return {"time": f"{parts}; {duration(sum(seconds.values()))} together, on {' and '.join(machines)}{limit}"}


def _self_written(data: Manifest) -> list[tuple[str, Manifest]]:
    """Return the manifests of what the target wrote for prepared data: instructions and text."""
    if not data or data["config"]["data"]["kind"] != "files":
        return []
    root, config = Path(data["config"]["root"]), data["config"]["data"]
    parts = [(INSTRUCTIONS, name) for name in config["instructions"]]
    parts += [(TEXT, name) for name in _by_name(config["pretraining"])]
    found = [(part, manifest_of(root / part / name)) for part, name in parts]
    return [(part, one) for part, one in found if one]


def _by_name(sections: dict[str, Any]) -> dict[str, Any]:
    """Return sources by name: a single source has the name of its part of the data."""
    return sections if all(isinstance(one, dict) for one in sections.values()) else {"pretraining": sections}
