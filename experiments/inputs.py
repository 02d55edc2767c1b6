"""What the stages' scripts share: config sections as plain values, and the checks of what they read."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from drafter.artifacts import fingerprint, model_fingerprint, read_manifest, require, tokenizer_fingerprint

STEPS = "steps"  # the folder of a finetuning that has its drafter at some of its steps


def plain(section: Any) -> Any:
    """A config section as plain Python values, interpolations resolved."""
    return OmegaConf.to_container(section, resolve=True)


def data_fingerprint(cfg: DictConfig) -> str:
    """The prepared data's fingerprint; data in the tokens of another tokenizer than the target's is refused."""
    found = read_manifest(cfg.inputs.data, "prepare")["inputs"]["tokenizer"]
    require(cfg.inputs.data, "tokenizer", found, tokenizer_fingerprint(cfg.target.path, cfg.target.revision))
    return fingerprint(cfg.inputs.data, "prepare")


def target_fingerprint(cfg: DictConfig) -> str:
    """The target's fingerprint."""
    return model_fingerprint(cfg.target.path, cfg.target.revision)


def target_inputs(cfg: DictConfig) -> dict[str, str]:
    """The fingerprints of the target, and of its tokenizer and chat template by themselves."""
    tokenizer = tokenizer_fingerprint(cfg.target.path, cfg.target.revision)
    return {"target": target_fingerprint(cfg), "tokenizer": tokenizer}


def target_named(cfg: DictConfig) -> dict[str, Any]:
    """What a manifest says of the target for people to read; its fingerprint is among the inputs."""
    return {"path": cfg.target.path, "revision": cfg.target.revision, "dtype": cfg.target.dtype}


def responses_fingerprint(cfg: DictConfig) -> str:
    """The responses' fingerprint; responses of another target are refused."""
    found = read_manifest(cfg.inputs.responses, "respond")["inputs"]["target"]
    require(cfg.inputs.responses, "target", found, target_fingerprint(cfg))
    return fingerprint(cfg.inputs.responses, "respond")
