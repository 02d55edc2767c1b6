"""The distribution that tokens are drawn from: logits after temperature, top-k and top-p.

Shapes: … any positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# The source of random numbers for several rows: one for all (None: PyTorch's default), or one for each row. There, None
# is for a row that needs no number.
Random = torch.Generator | Sequence[torch.Generator | None] | None


LARGE_VOCABULARY = 8192  # tokens from which on `draw` takes two steps, which is faster
BLOCK = 256  # tokens that the first step takes together


class Sampling(NamedTuple):
    """How tokens are chosen.

    Attributes:
        temperature: the divisor of the logits; 0 for greedy decoding.
        top_p: keep the smallest set of most likely tokens whose probabilities add up to this; 1 for all tokens.
        top_k: keep so many of the most likely tokens; 0 for all tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError if a setting is out of its range.

    >>> check_sampling(Sampling(temperature=0.6, top_p=0.95, top_k=20))
    >>> check_sampling(Sampling(top_k=-1))
    Traceback (most recent call last):
    ...
    ValueError: top_k is -1, must be a whole number: 1 or above, or 0 for no limit
    """
    temperature, top_p, top_k = sampling
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, must be 0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be above 0, at most 1")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise ValueError(f"top_k is {top_k}, must be a whole number: 1 or above, or 0 for no limit")


def warp(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return probabilities after temperature, then top-k, then top-p (the order of transformers), in float32.

    Greedy decoding gives the most likely token probability 1, and the first one if several are equally likely.

    >>> logits_V = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> warp(logits_V, Sampling(temperature=1.0, top_p=0.6))
    tensor([0.6250, 0.3750, 0.0000])
    >>> warp(logits_V, Sampling(temperature=0.5, top_k=2))  # 0.25 and 0.09, normalised
    tensor([0.7353, 0.2647, 0.0000])
    >>> warp(logits_V, Sampling(temperature=0.0))
    tensor([1., 0., 0.])
    """
    logits_V = logits_V.float()
    if sampling.temperature == 0:
        return torch.zeros_like(logits_V).scatter_(-1, logits_V.argmax(-1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < logits_V.shape[-1]:
        kth = logits_V.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    probs_V = logits_V.softmax(-1)
    if sampling.top_p < 1:
        probs_V = probs_V * in_nucleus(probs_V, sampling.top_p)
        probs_V = probs_V / probs_V.sum(-1, keepdim=True)
    return probs_V


def draw(weights_BV: torch.Tensor, generator: Random = None) -> torch.Tensor:
    """Draw one token per row with probabilities proportional to its weights, shape (B,); never one of weight 0.

    The inverse of the cumulative distribution in float64 needs one random number per row, where torch.multinomial
    draws V of them. In a large vocabulary, a block of tokens is drawn first, by the sums of the blocks, and then one of
    its tokens.

    >>> draw(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.1]]))
    tensor([1, 2])
    """
    if weights_BV.shape[1] < LARGE_VOCABULARY:
        return _invert(weights_BV, generator)
    blocks_BNT = F.pad(weights_BV, (0, -weights_BV.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block_B = _invert(blocks_BNT.sum(-1), generator)
    rows_B = torch.arange(len(block_B), device=block_B.device)
    return block_B * BLOCK + _invert(blocks_BNT[rows_B, block_B], generator)


def _invert(weights_BN: torch.Tensor, generator: Random) -> torch.Tensor:
    """Return the first entry of each row whose cumulative weight exceeds a random share of the total, shape (B,)."""
    cumulative_BN = double(weights_BN).cumsum(-1)
    total_B1 = cumulative_BN[:, -1:]
    uniform_B1 = _uniform(len(weights_BN), weights_BN.device, generator)
    below_B1 = torch.minimum(uniform_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BN, below_B1, right=True)[:, 0].to(weights_BN.device)


ATTEMPTS = 4  # of `sample`, before it sorts


def sample(logits_BV: torch.Tensor, temperature_B: torch.Tensor, top_p: float = 1.0) -> torch.Tensor:
    """Draw one token per row from its logits after temperature and top-p, shape (B,), without sorting them.

    A token is drawn from all tokens, and drawn again if the tokens that are more likely than it already add up to
    top_p: it is then not in the nucleus (see `in_nucleus`). Such a draw has a probability of at most 1 - top_p. With a
    small top_p, rows that are still without a token after a few attempts are sorted.

    >>> logits_BV = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    >>> sample(logits_BV, torch.tensor([0.0, 1.0]), top_p=0.5)
    tensor([0, 2])

    Args:
        logits_BV: the logits.
        temperature_B: the temperature of each row; 0 for the most likely token.
        top_p: as in `Sampling`.
    """
    tokens_B = logits_BV.max(-1).indices  # `argmax` finds the same ones, three times as slowly on a CPU
    pending_B = temperature_B.nonzero()[:, 0]
    if not len(pending_B):
        return tokens_B
    probs_BV = logits_BV[pending_B].float().div_(temperature_B[pending_B, None]).softmax(-1)
    for _ in range(ATTEMPTS if top_p < 1 else 0):
        drawn_B = draw(probs_BV)
        tokens_B[pending_B] = drawn_B
        # The tokens likelier than one of a probability above 1 - top_p cannot add up to top_p.
        drawn_prob_B = probs_BV.gather(1, drawn_B[:, None])[:, 0]
        unlikely_B = (drawn_prob_B <= 1 - top_p).nonzero()[:, 0]
        unlikely_BV = probs_BV[unlikely_B]
        likelier_BV = unlikely_BV > drawn_prob_B[unlikely_B, None]
        outside_B = unlikely_B[(unlikely_BV * likelier_BV).sum(-1) >= top_p]
        pending_B, probs_BV = pending_B[outside_B], probs_BV[outside_B]
        if not len(pending_B):
            return tokens_B
    tokens_B[pending_B] = draw(probs_BV * in_nucleus(probs_BV, top_p) if top_p < 1 else probs_BV)
    return tokens_B


def double(values: torch.Tensor, device_type: str | None = None) -> torch.Tensor:
    """Return the values in float64, on their device, or on the CPU if it is Apple's ("mps"), which has no float64.

    >>> double(torch.tensor(0.5))
    tensor(0.5000, dtype=torch.float64)

    Args:
        values: the values.
        device_type: the type of their device; None to read it from the tensor.
    """
    has_none = (device_type or values.device.type) == "mps"
    return (values.cpu() if has_none else values).double()


def uniform(
    lengths: Sequence[int], width: int, generator: Random, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return random numbers in [0, 1), shape (rows, width).

    A row with a generator of its own draws as many as its length, and is padded with zeros.
    """
    if not isinstance(generator, Sequence):
        return torch.rand((len(lengths), width), generator=generator, device=device, dtype=dtype)
    numbers = torch.zeros(len(lengths), width, device=device, dtype=dtype)
    for row, length, own in zip(numbers, lengths, generator, strict=True):
        if own:
            row[:length] = torch.rand(length, generator=own, device=device, dtype=dtype)
    return numbers


def _uniform(count: int, device: torch.device, generator: Random, device_type: str | None = None) -> torch.Tensor:
    """Return random numbers in [0, 1), shape (count, 1), drawn and returned in float64 where the device has it."""
    kind = device_type or device.type
    drawn = torch.float32 if kind == "mps" else torch.float64
    return double(uniform([1] * count, 1, generator, device, drawn), kind)


def in_nucleus(probs_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return a mask of the smallest set of most likely tokens whose probabilities add up to top_p.

    Tokens as likely as the least likely one of the set are included.

    >>> in_nucleus(torch.tensor([0.2, 0.5, 0.2, 0.1]), top_p=0.6)
    tensor([ True,  True,  True, False])
    """
    return probs_V >= _least_likely(probs_V, top_p)


LIKELIEST = 256  # tokens that are tried as the nucleus before all are sorted
LARGE = 2**14  # tokens of a vocabulary for which that saves time


def _least_likely(probs_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the probability of the least likely token of each row's nucleus, shape (…, 1).

    A row is sorted only if its LIKELIEST tokens do not add up to top_p. On a CPU, 256 rows of 49,152 take a quarter of
    the time if that many suffice, and a fifth more if they do not. With 4,096 tokens, sorting all is faster.
    """
    if probs_V.device.type != "cpu" or probs_V.shape[-1] < LARGE:
        return _last_inside(_descending(probs_V), top_p)
    probs_NV = probs_V.reshape(-1, probs_V.shape[-1])
    sorted_NK = probs_NV.topk(LIKELIEST).values
    last_N1 = _last_inside(sorted_NK, top_p)
    beyond_N = sorted_NK.cumsum(-1)[:, -1] < top_p
    if beyond_N.any():
        last_N1[beyond_N] = _last_inside(_descending(probs_NV[beyond_N]), top_p)
    return last_N1.reshape(*probs_V.shape[:-1], 1)


def _last_inside(sorted_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the last of descending probabilities before which less than top_p has been added up, shape (…, 1)."""
    before_V = sorted_V.cumsum(-1) - sorted_V
    inside_V = before_V < top_p
    inside_V[..., 0] = True
    return sorted_V.gather(-1, inside_V.sum(-1, keepdim=True) - 1)


def _descending(values_V: torch.Tensor) -> torch.Tensor:
    """Return the values in descending order. On a CPU, numpy sorts 4,096 of them 30 times as fast as torch 2.13."""
    if values_V.device.type != "cpu" or values_V.dtype not in (torch.float32, torch.float64):
        return values_V.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(values_V.detach().numpy(), axis=-1)).flip(-1)
