"""Speculative decoding of one prompt, and the autoregressive baseline it is measured against.

In each block the drafter proposes gamma tokens, one target call scores them all, `verify` keeps the longest prefix that
leaves the output's distribution exactly the target's, and the target adds one token of its own (Leviathan et al.,
arXiv 2211.17192, algorithm 1). Both models' logits are warped (temperature, top-k, top-p) before the accept test.

Shapes: G drafted tokens, V vocabulary.
"""

import inspect
import time
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from drafter.warping import Sampling, warp


class Block(NamedTuple):
    """One target call: the tokens drafted, how many of them were accepted, and the tokens that it gave.

    `emitted` is the accepted tokens and the target's own one, cut where a stop token or the limit ends the text.
    """

    drafted: list[int]
    accepted: int
    emitted: list[int]

    @property
    def tested(self) -> int:
        """Drafted tokens that met the accept test: those behind the first rejection or the end never did."""
        return min(self.accepted + 1, len(self.drafted), len(self.emitted))


class Decoded(NamedTuple):
    """The generated tokens, the blocks that they came in, and the wall-clock seconds that it took."""

    tokens: list[int]
    blocks: list[Block]
    seconds: float


def verify(
    drafted_G: torch.Tensor, p_GV: torch.Tensor, q_GV: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[int, int]:
    """Accept a prefix of the drafted tokens and choose the target's own next token.

    Token i is accepted with probability min(1, q(x_i) / p(x_i)). After a rejection the next token is drawn from
    max(q - p, 0), normalised; after none, from the target's last distribution. The result is a sample of q.

    Args:
        drafted_G: token ids drawn from p_GV, row by row.
        p_GV: the drafter's warped probabilities, G rows.
        q_GV: the target's warped probabilities, G + 1 rows.

    Returns:
        how many drafted tokens are accepted, and the next token.
    """
    count = len(drafted_G)
    chosen_G1 = drafted_G[:, None]
    p_G, q_G = p_GV.gather(-1, chosen_G1)[:, 0], q_GV[:count].gather(-1, chosen_G1)[:, 0]
    uniform_G = torch.rand(count, generator=generator, device=p_GV.device)
    kept_G = (uniform_G * p_G < q_G).long()
    accepted = int(kept_G.cumprod(0).sum())
    final_V = q_GV[accepted]
    if accepted < count:
        residual_V = (final_V - p_GV[accepted]).clamp_min(0)
        # p = q up to rounding: a rejection has probability ~0, and the residual is q itself.
        final_V = residual_V if residual_V.sum() > 0 else final_V
    return accepted, int(torch.multinomial(final_V, 1, generator=generator))


class _Decoder:
    """A model, its key-value cache, and how many tokens of the text the cache holds."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache, self.length = model, DynamicCache(), 0
        # transformers 5.24 renamed the argument; earlier ones, and models with code of their own, keep the old name.
        names = inspect.signature(model.forward).parameters
        self.argument = "cache" if "cache" in names else "past_key_values"

    def logits(self, tokens: list[int], keep: int) -> torch.Tensor:
        """Feed what the cache lacks of `tokens`; the logits of the last `keep` positions, shape (keep, V)."""
        ids = torch.tensor([tokens[self.length :]], device=self.model.device)
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=keep, **{self.argument: self.cache})
        self.length = len(tokens)
        return output.logits[0]

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if self.length > length:
            self.cache.crop(length - self.length)
            self.length = length


@torch.inference_mode()
def speculative_decode(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompt: list[int],
    num_speculative_tokens: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: list[int],
    generator: torch.Generator | None = None,
) -> Decoded:
    """Continue a prompt with the target's distribution, in blocks drafted by the drafter.

    The text ends with the first of `stop_ids` (which is part of it) or after `max_new_tokens`. The target reads the
    prompt in the first block's call, so blocks and target calls are one and the same.

    Raises:
        ValueError: num_speculative_tokens or max_new_tokens is below 1, or prompt is empty.
    """
    check_decoding(num_speculative_tokens, max_new_tokens, prompt)
    began = time.perf_counter()
    blocks: list[Block] = []
    text, end = list(prompt), len(prompt) + max_new_tokens
    fast, slow = _Decoder(drafter), _Decoder(target)
    while len(text) < end and not (blocks and text[-1] in stop_ids):
        known = len(text)
        # The last token of the text is always the target's own, so a draft never reaches beyond the limit.
        rows = []
        for _ in range(min(num_speculative_tokens, end - known - 1)):
            rows.append(warp(fast.logits(text, 1), sampling)[0])
            text.append(int(torch.multinomial(rows[-1], 1, generator=generator)))
        drafted = text[known:]
        q_GV = warp(slow.logits(text, len(drafted) + 1), sampling)
        p_GV = torch.stack(rows) if rows else q_GV[:0]
        accepted, added = verify(torch.tensor(drafted, device=q_GV.device).long(), p_GV, q_GV, generator)
        emitted = _until_stop([*drafted[:accepted], added], stop_ids)
        text[known:] = emitted
        fast.keep(known + accepted)
        slow.keep(known + accepted)
        blocks.append(Block(drafted, min(accepted, len(emitted)), emitted))
    return Decoded(text[len(prompt) :], blocks, time.perf_counter() - began)


@torch.inference_mode()
def autoregressive_decode(
    target: PreTrainedModel,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: list[int],
    generator: torch.Generator | None = None,
) -> Decoded:
    """Continue a prompt one token a target call, with the same cache and the same sampling: the baseline."""
    check_decoding(1, max_new_tokens, prompt)
    began = time.perf_counter()
    blocks: list[Block] = []
    text, model = list(prompt), _Decoder(target)
    while len(blocks) < max_new_tokens and not (blocks and text[-1] in stop_ids):
        probs_V = warp(model.logits(text, 1), sampling)[0]
        text.append(int(torch.multinomial(probs_V, 1, generator=generator)))
        blocks.append(Block([], 0, text[-1:]))
    return Decoded(text[len(prompt) :], blocks, time.perf_counter() - began)


def check_decoding(num_speculative_tokens: int, max_new_tokens: int, prompt: list[int]) -> None:
    """Refuse what cannot be decoded, before any model is called."""
    if num_speculative_tokens < 1:
        raise ValueError(f"num_speculative_tokens (gamma) is {num_speculative_tokens}, must be at least 1")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be at least 1")
    if not prompt:
        raise ValueError("the prompt has no tokens")


def _until_stop(tokens: list[int], stop_ids: list[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]
