"""Turn config sections into objects of the library, claim output directories and check inputs."""

import json
import shlex
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from drafter.artifacts.manifest import Stage, fingerprint, read_manifest, require
from drafter.models.compatibility import load_drafter
from drafter.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from drafter.models.source import ModelSource, TemplateSettings

ORIGIN = "origin.json"  # lies in the directory of a target that a command wrote, and says where it is from


def plain(section: Any) -> Any:
    """Return a config section as plain Python values, with interpolations resolved. A single value stays as it is."""
    return OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section


def target_source(cfg: DictConfig) -> ModelSource:
    """Return where the target is and how it is loaded.

    Raises:
        MissingMandatoryValue: target.path has to be given, and is not.
    """
    settings = {**plain(cfg.target), "path": cfg.target.path}  # unlike `plain`, an access refuses a missing value
    kwargs, date = settings.pop("template_kwargs"), settings.pop("template_date")
    return ModelSource(**settings, template=TemplateSettings(json.dumps(kwargs, sort_keys=True), date))


def claim(
    cfg: DictConfig,
    name: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    directory: Path | str | None = None,
    instead: tuple[str, ...] = (),
    module: str | None = None,
) -> Stage:
    """Claim a directory (default: cfg.out) for a stage, and record its config and the command that makes it again.

    Args:
        cfg: the config of the stage.
        name: the stage's name.
        settings: the settings that determine the content.
        inputs: name -> fingerprint of each upstream artifact.
        directory: the directory to claim.
        instead: overrides for the recorded command, in place of the given ones of the same keys.
        module: the command that makes it, if it is not named like the stage.
    """
    hydra_config, replaced = HydraConfig.get(), {override.partition("=")[0] for override in instead}
    overrides = [one for one in hydra_config.overrides.task if one.partition("=")[0] not in replaced]
    if hydra_config.runtime.choices.get("experiment"):
        overrides.append("hydra.mode=RUN")  # only this cell of the sweep
    command = shlex.join(["python", "-m", f"experiments.{module or name}", *overrides, *instead])
    return Stage(directory or cfg.out, name, settings, inputs, {"command": command, "config": plain(cfg)})


def data_fingerprint(cfg: DictConfig) -> str:
    """Return the fingerprint of the prepared data. Refuse data that was prepared with another tokenizer."""
    found = read_manifest(cfg.inputs.data, "prepare")["inputs"]["tokenizer"]
    require(cfg.inputs.data, "tokenizer", found, tokenizer_fingerprint(target_source(cfg)))
    return fingerprint(cfg.inputs.data, "prepare")


def frozen_drafter(cfg: DictConfig, path: str) -> PreTrainedModel:
    """Load a drafter for decoding, after checking that it is compatible with the target."""
    drafter = load_drafter(path, target_source(cfg), cfg.pad_vocabulary)
    return drafter.requires_grad_(False).eval()


def target_fingerprint(cfg: DictConfig) -> str:
    """Return the fingerprint of the target."""
    return model_fingerprint(target_source(cfg))


def target_inputs(cfg: DictConfig) -> dict[str, str]:
    """Return the fingerprints of the target and, separately, of its tokenizer with the chat template."""
    tokenizer = tokenizer_fingerprint(target_source(cfg))
    return {"target": target_fingerprint(cfg), "tokenizer": tokenizer}


def target_named(cfg: DictConfig) -> dict[str, Any]:
    """Return the target's path, revision and dtype for the manifest, whose inputs have only its fingerprint."""
    return {"path": cfg.target.path, "revision": cfg.target.revision, "dtype": cfg.target.dtype}


def pair_inputs(cfg: DictConfig, drafter: str) -> dict[str, str]:
    """Return the fingerprints of prepared data, target and drafter, which finetune, gamma and trim read."""
    data, target = data_fingerprint(cfg), target_fingerprint(cfg)
    return {"data": data, "target": target, "drafter": model_fingerprint(drafter)}


def responses_fingerprint(cfg: DictConfig) -> str:
    """Return the fingerprint of the responses. Refuse responses of another target."""
    found = read_manifest(cfg.inputs.responses, "respond")["inputs"]["target"]
    require(cfg.inputs.responses, "target", found, target_fingerprint(cfg))
    return fingerprint(cfg.inputs.responses, "respond")
