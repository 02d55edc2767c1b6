"""Configs composed in code as the command lines compose them, and which overrides concern which stage."""

import os
import re
from collections.abc import Iterable
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict


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
    with_home(cfg)
    OmegaConf.resolve(cfg)
    return cfg


def with_home(cfg: DictConfig) -> DictConfig:
    """The config itself, with every path in it that begins with ~ written out. No other place does this."""
    _expand(cfg, OmegaConf.to_container(cfg, resolve=False))
    return cfg


def _expand(section: DictConfig | ListConfig, written: Any) -> None:
    """Write out the paths of a section; `written` is what stands in it, interpolations as they are."""
    for key, value in written.items() if isinstance(written, dict) else enumerate(written):
        if isinstance(value, (dict, list)):
            _expand(section[key], value)
        elif isinstance(value, str) and value.startswith("~") and key != "template":
            section[key] = os.path.expanduser(value)


def quoted(value: str) -> str:
    """Any text as Hydra's grammar of overrides takes it: nothing in it is a list, a choice or an interpolation.

    Backslashes count only before a quote, or before the dollar of an interpolation.
    """
    value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    value = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{value}'"


def quoted_list(values: Iterable[str]) -> str:
    """Several texts as a list of Hydra's grammar."""
    return f"[{','.join(map(quoted, values))}]"


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
