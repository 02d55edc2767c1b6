"""The losses of conf/loss, and positions for testing them."""

from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

from drafter.losses.objective import Positions, objective_of

LOSSES = {
    path.stem: hydra.utils.instantiate(OmegaConf.load(path))
    for path in sorted((Path(__file__).parent.parent / "conf" / "loss").glob("*.yaml"))
}
# Settings that no config file uses.
LOSSES |= {
    "tvdpp position": partial(LOSSES["tvdpp"], statistics="position"),
    "nla at 0.3": partial(LOSSES["nla"], temperature=0.3),
    "hit of a match": partial(LOSSES["hit"], temperature=0.6, top_p=0.9, draft_temperature_factor=1.0),
    "kld of a nucleus": partial(LOSSES["kld"], temperature=0.6, top_p=0.9),
}


def positions(count, vocabulary, length=5):
    """Return positions of responses with `length` tokens each (the last may be shorter), with arbitrary tokens."""
    index = torch.arange(count)
    ends = (index // length + 1).mul(length).clamp_max(count)
    return Positions((7 * index + 3) % vocabulary, ends - index - 1)


def at_positions(loss, count, vocabulary):
    """Return the loss as a function of logits alone."""
    given = positions(count, vocabulary)
    return lambda logits_p, logits_q: objective_of(loss)(logits_p, logits_q, given)
