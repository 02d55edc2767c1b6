"""Losses that compare the drafter's distribution with the target's: pure functions of logits."""

from drafter.losses.block_losses import block, e2e_tvd
from drafter.losses.divergences import ce, hit, jsd, kld, lk_hybrid, nla, rkl, tvd, tvdpp
from drafter.losses.mixing import mix
from drafter.losses.objective import Loss, Objective, declares

__all__ = [
    "Loss",
    "Objective",
    "block",
    "ce",
    "declares",
    "e2e_tvd",
    "hit",
    "jsd",
    "kld",
    "lk_hybrid",
    "mix",
    "nla",
    "rkl",
    "tvd",
    "tvdpp",
]
