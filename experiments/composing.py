"""Configs composed in code as the command lines compose them, and which overrides concern which stage."""

import re

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict


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


def concerning(name: str, arguments: list[str]) -> list[str]:
    """The overrides that concern a stage: those whose first key its config has, and of `inputs` the second."""
    cfg = compose(name)
    mine = [argument for argument in arguments if first_key(argument) in cfg]
    return [argument for argument in mine if first_key(argument) != "inputs" or input_key(argument) in cfg.inputs]


def input_key(argument: str) -> str:
    """`inputs.cache=null` -> cache"""
    return re.split(r"[.=]", argument.lstrip("+~"))[1]


def first_key(argument: str) -> str:
    """`+respond.top_p=0.9` -> respond"""
    return re.split(r"[.=@]", argument.lstrip("+~"))[0]


def cells(name: str, experiment: str) -> list[list[str]]:
    """The overrides of each cell of an experiment's sweep, as `python -m experiments.<name> experiment=…` runs it.

    Raises:
        ValueError: the experiment sweeps over nothing.
    """
    cfg = compose(name, [f"experiment={experiment}"], return_hydra_config=True)
    params = cfg.hydra.sweeper.params or {}
    if not params:
        raise ValueError(f"conf/experiment/{experiment}.yaml has no hydra.sweeper.params: it is no sweep")
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return [list(cell) for batch in BasicSweeper.split_arguments(parsed, None) for cell in batch]
