"""The configured losses, and the places of the positions that tests try them at."""

from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

from drafter.losses.block_losses import Places
from drafter.losses.divergences import with_context

LOSSES = {
    path.stem: hydra.utils.instantiate(OmegaConf.load(path))
    for path in sorted((Path(__file__).parent.parent / "conf" / "loss").glob("*.yaml"))
}
# The switches that no config line has on.
LOSSES |= {
    "tvdpp position": partial(LOSSES["tvdpp"], statistics="position"),
    "nla at 0.3": partial(LOSSES["nla"], temperature=0.3),
    "kld of a nucleus": partial(LOSSES["kld"], temperature=0.6, top_p=0.9),
}


def places(count, vocabulary, length=5):
    """Responses of `length` positions, the last one perhaps shorter, with arbitrary tokens."""
    position = torch.arange(count)
    ends = (position // length + 1).mul(length).clamp_max(count)
    return Places((7 * position + 3) % vocabulary, ends - position - 1)


def at_places(loss, count, vocabulary):
    """The loss as a function of logits alone."""
    return with_context(loss, places=places(count, vocabulary))
