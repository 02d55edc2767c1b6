"""All stages in one process: prepare, pretrain, respond, cache, finetune (losses x seeds), evaluate, tables.

Config: conf/pipeline.yaml. Each stage is composed from its own config with the same overrides, as on its own command
line, and skips itself where it is up to date; so an interrupted pipeline goes on with the same command.
"""

import logging
import os
import re
import sys
import warnings
from types import ModuleType

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers.utils.logging import disable_progress_bar

from experiments import cache, evaluate, finetune, prepare, pretrain, respond, tables

STAGES = (prepare, pretrain, respond, cache, finetune, evaluate, tables)
NAMES = tuple(module.__name__.rsplit(".", 1)[-1] for module in STAGES)


def main(arguments: list[str]) -> None:
    """Run the stages with the given overrides."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "lightning.pytorch", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    disable_progress_bar()  # of loading weights; the stages' own bars stay
    own = [argument for argument in arguments if argument.partition("=")[0] in ("losses", "seeds")]
    others = [argument for argument in arguments if argument not in own]
    with initialize_config_module("conf", version_base="1.3"):
        plan = compose("pipeline", own)
        shared = routed(others)
        jobs = [
            (module, configured(name, overrides + shared[name]))
            for module, name in zip(STAGES, NAMES, strict=True)
            for overrides in runs(name, plan)
        ]
        for module, cfg in jobs:  # a wrong value of the last stage is found before the first one computes
            if hasattr(module, "check"):
                module.check(cfg)
        for module, cfg in jobs:
            run(module, cfg)


def runs(stage: str, plan: DictConfig) -> list[list[str]]:
    """The overrides of each run of a stage: finetune has one for each loss and seed, every other stage one."""
    if stage != "finetune":
        return [[]]
    return [[f"loss={loss}", f"seed={seed}"] for seed in plan.seeds for loss in plan.losses]


def routed(arguments: list[str]) -> dict[str, list[str]]:
    """Stage -> the overrides that concern it: those whose first key its config has.

    Raises:
        ValueError: an override concerns no stage.
    """
    keys = {name: set(compose(name)) for name in NAMES}
    known = sorted(set().union(*keys.values()))
    first = {argument: re.split(r"[.=@]", argument.lstrip("+~"))[0] for argument in arguments}
    for argument, key in first.items():
        if key not in known:
            raise ValueError(f"'{argument}' is a setting of no stage: '{key}' is none of {known}")
    return {name: [argument for argument in arguments if first[argument] in keys[name]] for name in NAMES}


def configured(name: str, overrides: list[str]) -> DictConfig:
    """A stage's config, composed as its own command line would, with every interpolation resolved.

    Raises:
        ValueError: a required value (`???`) was not given.
    """
    cfg = compose(name, overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{name} needs a value for {', '.join(missing)}: give it as `{missing[0]}=...`")
    OmegaConf.resolve(cfg)
    return cfg


def run(module: ModuleType, cfg: DictConfig) -> None:
    """One stage, as its own command line would run it."""
    module.main(cfg)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, HydraException) as problem:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.exit(f"error: {problem}\n(HYDRA_FULL_ERROR=1 shows where it was raised)")
