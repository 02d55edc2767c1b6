"""Compose configs in code as a command line does, and tell which overrides belong to which stage."""

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

# Keys whose values already choose a directory, in every stage.
DIRECTORY_KEYS = ("root", "out", "scale", "name", "series", "label", "experiment", "logger", "cluster")

# ~ or ~user where a path begins; also in the name of a drafter without a model, such as ngram:~/responses+~/drafter.
HOME = re.compile(r"(?:^|(?<=[:+]))~[^/:+]*")


class Keys(NamedTuple):
    """The keys of a config that an override can start with.

    Attributes:
        settings: the top-level keys.
        inputs: the keys of the section `inputs`; empty if the config has no such section.
    """

    settings: frozenset[str]
    inputs: frozenset[str]


@functools.cache
def config_keys(name: str) -> Keys:
    """Return the keys of conf/<name>.yaml without overrides. Composing takes 0.2 s, so the result is cached."""
    cfg = compose(name)
    return Keys(frozenset(map(str, cfg)), frozenset(map(str, cfg.get("inputs", {}))))


def missing_values(name: str, keys: Sequence[str]) -> str:
    """Return the sentence that asks for the required values that a command was not given."""
    return f"{name} needs a value for {', '.join(keys)}: give it as `{keys[0]}=...`"


def configured(name: str, overrides: list[str]) -> DictConfig:
    """Return the config of a stage as its own command line composes it, with every interpolation resolved.

    Raises:
        ValueError: a required value (`???`) is not given.
    """
    cfg = compose(name, overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(missing_values(name, missing))
    with_home(cfg)
    OmegaConf.resolve(cfg)
    return cfg


def with_home(cfg: DictConfig) -> DictConfig:
    """Return the same config after expanding every path in it that begins with ~. No other place does this."""
    _expand(cfg, OmegaConf.to_container(cfg, resolve=False))
    return cfg


def _expand(section: DictConfig | ListConfig, written: Any) -> None:
    """Expand the paths of a section in place; `written` is its content with interpolations unresolved."""
    for key, value in written.items() if isinstance(written, dict) else enumerate(written):
        if isinstance(value, (dict, list)):
            _expand(section[key], value)
        elif isinstance(value, str) and value.startswith(("~", "ngram")) and key != "template":
            section[key] = HOME.sub(lambda found: os.path.expanduser(found[0]), value)


def concerning(name: str, arguments: list[str]) -> list[str]:
    """Return the overrides whose first key a stage's config has; of `inputs`, those whose second key it has too."""
    keys = config_keys(name)
    mine = [argument for argument in arguments if first_key(argument) in keys.settings]
    return [argument for argument in mine if first_key(argument) != "inputs" or input_key(argument) in keys.inputs]


def override(key: str, value: Any) -> str:
    r"""Return an override that gives a key this value, quoted for Hydra's grammar.

    >>> print(override("out", "runs/it's [1]"))
    out='runs/it\'s [1]'
    """
    return f"{key}={in_grammar(value)}"


def in_grammar(value: Any) -> str:
    """Return a plain Python value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{in_grammar(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(in_grammar, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def quoted(value: str) -> str:
    """Return any text quoted for Hydra's grammar, so that nothing in it is read as a list, choice or interpolation.

    A backslash has a meaning only before a quote or before the dollar sign of an interpolation.
    """
    value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    value = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{value}'"


def input_key(argument: str) -> str:
    """Return the name of the input that an override sets: "cache" of `inputs.cache=null`."""
    return re.split(r"[.=]", argument.lstrip("+~"))[1]


def gather_stage_overrides(name: str, overrides: list[str]) -> list[str]:
    """Return the overrides of conf/<name>.yaml, with all others, those of the stages, as the value of stage_overrides.

    Of the pipeline's `seeds=[1] respond.top_p=0.9`, it makes `seeds=[1] stage_overrides=['respond.top_p=0.9']`.
    """
    known = {"hydra", *config_keys(name).settings}
    own = [argument for argument in overrides if first_key(argument) in known]
    others = [argument for argument in overrides if first_key(argument) not in known]
    return [*own, override("stage_overrides", others)] if others else own


def first_key(argument: str) -> str:
    """`+respond.top_p=0.9` -> respond, `hydra/launcher=joblib` -> hydra, `loss@pretrain.loss=kld` -> pretrain"""
    key = argument.lstrip("+~").partition("=")[0]
    return re.split(r"[./]", key.partition("@")[2] or key)[0]


def cells(name: str, experiment: str) -> list[list[str]]:
    """Return the overrides of each cell of an experiment's sweep, as `experiment=…` on its command line runs it.

    Raises:
        ValueError: the experiment has no sweep.
    """
    cfg = compose(name, [f"experiment={experiment}"], return_hydra_config=True)
    params = cfg.hydra.sweeper.params or {}
    if not params:
        raise ValueError(f"conf/experiment/{experiment}.yaml has no hydra.sweeper.params, so it is not a sweep")
    given = [f"{key}={value}" for key, value in params.items()]
    parsed = OverridesParser.create().parse_overrides(given)
    others = [
        key for key in swept_keys(given) if key not in ("loss", "variant", "seed")
    ]  # every name contains these already
    named = [f"swept=[{','.join(others)}]"] if others else []
    return [[*cell, *named] for batch in BasicSweeper.split_arguments(parsed, None) for cell in batch]


def swept_keys(overrides: Iterable[str]) -> list[str]:
    """Return the sorted keys to which these overrides give several values; the last override of a key counts."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    several = {one.get_key_element().lstrip("+~"): one.is_sweep_override() for one in parsed}
    return sorted(key for key, is_swept in several.items() if is_swept and not key.startswith("hydra"))


def swept_values(*named: str, _root_: DictConfig) -> str:
    """Return the suffix that distinguishes the directory of a sweep's cell, such as `-temperature_0.3`, or nothing.

    Args:
        named: keys whose values the directory's name already contains.
    """
    found = swept_settings(_root_, *named)
    leaves = [key.rsplit(".", 1)[-1] for key in found]
    return "".join(
        f"-{leaf if leaves.count(leaf) == 1 else key}_{as_name(value)}"
        for (key, value), leaf in zip(found.items(), leaves, strict=True)
    )


def swept_settings(cfg: DictConfig, *named: str) -> dict[str, Any]:
    """Return the keys that a multirun varies, with this cell's values; of a config group, the name that was chosen.

    Args:
        cfg: the cell's config.
        named: keys to leave out, beside those that choose a directory.
    """
    keys = [key for key in cfg.swept if key not in (*DIRECTORY_KEYS, *named)]
    choices = HydraConfig.get().runtime.choices if keys else {}
    selected = {key: choices[key] if key in choices else OmegaConf.select(cfg, key) for key in keys}
    return {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in selected.items()
    }


def as_name(value: Any) -> str:
    """Return a value as part of a directory's name. Unusual characters and long values are replaced by a checksum."""
    text = str(value)
    name = re.sub(r"[^\w.+-]+", "_", text).strip("_")[:40]
    return name if name == text else f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


OmegaConf.register_new_resolver("swept_values", swept_values, replace=True)
