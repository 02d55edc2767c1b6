"""Losses of the drafter's distribution against the target's: pure functions of logits."""

from drafter.losses.block_losses import block, e2e_tvd
from drafter.losses.divergences import Loss, ce, jsd, kld, lk_hybrid, mix, nla, rkl, tvd, tvdpp

__all__ = ["Loss", "block", "ce", "e2e_tvd", "jsd", "kld", "lk_hybrid", "mix", "nla", "rkl", "tvd", "tvdpp"]
