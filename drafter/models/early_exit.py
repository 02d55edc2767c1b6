"""A target's first layers as its drafter ("early exit"; LayerSkip, arXiv 2404.16710).

They are followed by the target's own last normalisation and output embedding. Nothing is copied: the drafter is another
view of the target's modules, so that it takes no memory of its own.
"""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from drafter.models.initialization import config_of_layers, layers_of


def first_layers(target: PreTrainedModel, count: int) -> PreTrainedModel:
    """Return a model of a target's first layers, which shares all of its weights with the target.

    Args:
        target: the target, which may be without weights (on the meta device). It is not changed.
        count: the number of layers.

    Raises:
        ValueError: the target does not have so many layers, none are wanted, or its layers cannot be left out.
    """
    prefix, total = layers_of(target)
    if not 1 <= count <= total:
        raise ValueError(f"{type(target).__name__} has {total} layers: give 1 to {total} of them, not {count}")
    config = config_of_layers(target, list(range(count)))
    *inner, last = prefix.rstrip(".").split(".")
    made = parent = _view(target)
    made.config = config
    for name in inner:
        child = _view(parent.get_submodule(name))
        if getattr(child, "config", None) is target.config:
            child.config = config
        elif hasattr(child, "config"):
            child.config = config.get_text_config()
        parent._modules[name] = child
        parent = child
    parent._modules[last] = nn.ModuleList(list(parent.get_submodule(last).children())[:count])
    return made


def _view(module: Any) -> Any:
    """Return a module of which other children can be given than the original has."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made
