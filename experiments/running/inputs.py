"""What the stages' scripts share: config sections as plain values, their claims, and the checks of what they read."""

import shlex
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter.artifacts.manifest import Stage, fingerprint, read_manifest, require
from drafter.models.compatibility import load_drafter
from drafter.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from drafter.models.initialization import build_drafter, special_ids
from drafter.models.loading import ModelSource, vocabulary_width

STEPS = "steps"  # the folder of a finetuning that has its drafter at some of its steps


def plain(section: Any) -> Any:
    """A config section as plain Python values, interpolations resolved."""
    return OmegaConf.to_container(section, resolve=True)


def target_source(cfg: DictConfig) -> ModelSource:
    """Where the target is, and how it is loaded."""
    return ModelSource(**plain(cfg.target))


def claim(
    cfg: DictConfig,
    name: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    directory: Path | None = None,
    instead: tuple[str, ...] = (),
) -> Stage:
    """A stage's claim on its directory (default: cfg.out), with its config and the command that makes it again.

    Args:
        instead: overrides of that command, in the place of what was given for the same keys.
    """
    how, taken = HydraConfig.get(), {override.partition("=")[0] for override in instead}
    overrides = [override for override in how.overrides.task if override.partition("=")[0] not in taken]
    if how.runtime.choices.get("experiment"):
        overrides.append("hydra.mode=RUN")  # this cell of its sweep alone
    command = shlex.join(["python", "-m", f"experiments.{name}", *overrides, *instead])
    return Stage(directory or cfg.out, name, settings, inputs, {"command": command, "config": plain(cfg)})


def data_fingerprint(cfg: DictConfig) -> str:
    """The prepared data's fingerprint; data in the tokens of another tokenizer than the target's is refused."""
    found = read_manifest(cfg.inputs.data, "prepare")["inputs"]["tokenizer"]
    require(cfg.inputs.data, "tokenizer", found, tokenizer_fingerprint(target_source(cfg)))
    return fingerprint(cfg.inputs.data, "prepare")


def frozen_drafter(cfg: DictConfig, path: str) -> PreTrainedModel:
    """A drafter to decode with, once it has passed the gate."""
    drafter = load_drafter(path, target_source(cfg), cfg.pad_vocabulary)
    return drafter.requires_grad_(False).eval()


def new_drafter(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The drafter that is to be trained, with random weights: as wide as the target, whose tokenizer this is."""
    rows = vocabulary_width(target_source(cfg))
    return build_drafter(plain(cfg.drafter), rows, special_ids(tokenizer, rows))


def target_fingerprint(cfg: DictConfig) -> str:
    """The target's fingerprint."""
    return model_fingerprint(target_source(cfg))


def target_inputs(cfg: DictConfig) -> dict[str, str]:
    """The fingerprints of the target, and of its tokenizer and chat template by themselves."""
    tokenizer = tokenizer_fingerprint(target_source(cfg))
    return {"target": target_fingerprint(cfg), "tokenizer": tokenizer}


def target_named(cfg: DictConfig) -> dict[str, Any]:
    """What a manifest says of the target for people to read; its fingerprint is among the inputs."""
    return {"path": cfg.target.path, "revision": cfg.target.revision, "dtype": cfg.target.dtype}


def pair_inputs(cfg: DictConfig, drafter: str) -> dict[str, str]:
    """The fingerprints of what every stage reads that brings a drafter and the target together."""
    data, target = data_fingerprint(cfg), target_fingerprint(cfg)
    return {"data": data, "target": target, "drafter": model_fingerprint(drafter)}


def responses_fingerprint(cfg: DictConfig) -> str:
    """The responses' fingerprint; responses of another target are refused."""
    found = read_manifest(cfg.inputs.responses, "respond")["inputs"]["target"]
    require(cfg.inputs.responses, "target", found, target_fingerprint(cfg))
    return fingerprint(cfg.inputs.responses, "respond")
