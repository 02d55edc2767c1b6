"""How logits become the distribution that tokens are drawn from: temperature, top-k, top-p.

Shapes: G positions, V vocabulary.
"""

from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """How tokens are chosen: temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def warp(logits_GV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities after temperature, then top-k, then top-p (the order of transformers), in float32.

    Greedy gives all mass to the argmax, the first one on a tie.
    """
    logits_GV = logits_GV.float()
    if sampling.temperature == 0:
        return torch.zeros_like(logits_GV).scatter_(-1, logits_GV.argmax(-1, keepdim=True), 1.0)
    logits_GV = logits_GV / sampling.temperature
    if 0 < sampling.top_k < logits_GV.shape[-1]:
        kth = logits_GV.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits_GV = logits_GV.masked_fill(logits_GV < kth, -torch.inf)
    probs_GV = logits_GV.softmax(-1)
    if sampling.top_p < 1:
        probs_GV = probs_GV * in_nucleus(probs_GV, sampling.top_p)
        probs_GV = probs_GV / probs_GV.sum(-1, keepdim=True)
    return probs_GV


def in_nucleus(probs_GV: torch.Tensor, top_p: float) -> torch.Tensor:
    """True for the smallest set of most likely tokens whose mass reaches top_p, at each position."""
    sorted_GV, order_GV = probs_GV.sort(dim=-1, descending=True)
    before_GV = sorted_GV.cumsum(-1) - sorted_GV
    return torch.empty_like(probs_GV, dtype=torch.bool).scatter_(-1, order_GV, before_GV < top_p)
