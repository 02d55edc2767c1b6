"""Select the parts of a config that identify a run: names of chosen configs and their values, without Python paths."""

from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.reporting.identity import DrafterIdentity
from experiments.running.composing import swept_settings
from experiments.running.inputs import plain


def choice(group: str) -> str | None:
    """Return the name of the config that was chosen of a group, e.g. "tvdpp" of `loss`."""
    chosen: str | None = HydraConfig.get().runtime.choices.get(group)
    return chosen


def values(section: Any) -> Any:
    """Return plain config values in which each `_target_` is replaced by the name of its object, without the module.

    >>> values({"_target_": "drafter.losses.kld", "_partial_": True, "temperature": 0.5})
    {'name': 'kld', 'temperature': 0.5}
    """
    if isinstance(section, list):
        return [values(one) for one in section]
    if not isinstance(section, dict):
        return section
    found = {key: values(one) for key, one in section.items() if key not in ("_target_", "_partial_")}
    return {"name": section["_target_"].rsplit(".", 1)[-1], **found} if "_target_" in section else found


def named_values(section: DictConfig, group: str) -> dict[str, Any]:
    """Return the name of the config that was chosen of a group, and the values of its section.

    The name identifies the function that the config points to, so another function needs another config.

    Raises:
        ValueError: an override changes the function.
    """
    kind = group.partition("@")[0]
    for override in HydraConfig.get().overrides.task:
        key = override.partition("=")[0].lstrip("+~")
        if key.endswith("_target_") and kind in key.split("."):
            raise ValueError(f"{override}: write another config, conf/{kind}/<name>.yaml, and give {group}=<name>")
    found = {name: value for name, value in plain(section).items() if name not in ("_target_", "_partial_")}
    return {"name": choice(group), **values(found)}


def without_defaults(settings: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that an identity has: those with a default only where they differ from it.

    An artifact that was made before such a setting existed stays valid.

    >>> without_defaults({"gamma": 3, "batch_size": 1}, {"batch_size": 1})
    {'gamma': 3}
    """
    return {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}


def finetuned_identity(cfg: DictConfig) -> DrafterIdentity:
    """Return the identity of the drafter that a finetuning's config makes.

    A run that was given a name, and no series, is its own series.
    """
    return DrafterIdentity(
        series=cfg.series if cfg.name == f"{cfg.series}-seed{cfg.seed}" else cfg.name,
        loss=choice("loss"),
        variant=choice("variant") or cfg.label or None,
        weighting=choice("weighting"),
        kinds=plain(cfg.finetune).get("kinds"),
        swept=swept_settings(cfg, "loss", "variant", "seed") or None,
        seed=cfg.seed,
    )
