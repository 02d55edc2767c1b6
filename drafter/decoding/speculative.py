"""Speculative decoding, and the autoregressive baseline it is measured against, of one text or several at once.

In each block the drafter proposes gamma tokens, one target call scores them all, `verify` keeps the longest prefix that
leaves the output's distribution exactly the target's, and the target adds one token of its own (Leviathan et al.,
arXiv 2211.17192, algorithm 1). Both models' logits are warped (temperature, top-k, top-p) before the accept test.

How many tokens a block drafts may depend on the drafter's confidence in those that it has drafted (`Adaptive`): the
accept test takes each token as it was drawn, so that any rule that looks at the drafts alone is lossless too.

Shapes: B texts, G drafted tokens, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from drafter.decoding.acceptance import Block, settled, verify, verify_greedy
from drafter.decoding.batched import RaggedDecoder
from drafter.decoding.capabilities import check_side_by_side, decoder_of
from drafter.decoding.decoders import Compiled, now
from drafter.warping import Sampling, draw, warp


class Seconds(NamedTuple):
    """Wall-clock time of a decoding, shared equally by the texts that were decoded together."""

    total: float
    drafting: float = 0.0
    verifying: float = 0.0


class Decoded(NamedTuple):
    """The generated tokens, the blocks that they came in, and the time that it took."""

    tokens: list[int]
    blocks: list[Block]
    seconds: Seconds


class Adaptive(NamedTuple):
    """Draft until the drafter's own probability for all of a block's tokens so far falls below `threshold`."""

    limit: int = 8
    threshold: float = 0.3


def longest(num_speculative_tokens: int | Adaptive) -> int:
    """The most tokens that a block may draft."""
    return num_speculative_tokens.limit if isinstance(num_speculative_tokens, Adaptive) else num_speculative_tokens


class Feeds(Protocol):
    """A model with its cache; see decoders."""

    model: PreTrainedModel

    def feed(self, ids: list[list[int]], starts: list[int], keep: int) -> torch.Tensor: ...

    def seat(self, row: int, ids: list[int]) -> None: ...

    def select(self, rows: list[int]) -> None: ...


class Drafts(NamedTuple):
    """What a block proposes: tokens (B, G), and the distribution that each was drawn from (none if greedy)."""

    tokens_BG: torch.Tensor
    p_GBV: list[torch.Tensor]


def speculative_decode(
    target: PreTrainedModel | Compiled,
    drafter: PreTrainedModel | Compiled,
    prompt: list[int],
    num_speculative_tokens: int | Adaptive,
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
    how = num_speculative_tokens, max_new_tokens, sampling, stop_ids, generator
    check_decoding(num_speculative_tokens, max_new_tokens, prompt)
    return _decode(decoder_of(target), decoder_of(drafter), [prompt], 1, *how)[0]


def speculative_decode_batch(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompts: list[list[int]],
    num_speculative_tokens: int | Adaptive,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: list[int],
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> list[Decoded]:
    """`speculative_decode` of several prompts side by side, each text advancing by what it accepts.

    At most `batch_size` of them at a time (None: all); the next in line takes the place of a text that has ended.

    Raises:
        ValueError: as above, batch_size is below 1, or a model's attention does not allow it (see
            capabilities.check_side_by_side).
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    for prompt in prompts:
        check_decoding(num_speculative_tokens, max_new_tokens, prompt)
    capacity = max(map(len, prompts), default=0) + max_new_tokens + longest(num_speculative_tokens) + 1
    for model in (target, drafter):
        check_side_by_side(model, capacity)
    slow, fast = (RaggedDecoder(model, capacity) for model in (target, drafter))
    how = num_speculative_tokens, max_new_tokens, sampling, stop_ids, generator
    return _decode(slow, fast, prompts, batch_size or len(prompts), *how)


@torch.inference_mode()
def _decode(
    slow: Feeds,
    fast: Feeds,
    prompts: list[list[int]],
    batch_size: int,
    num_speculative_tokens: int | Adaptive,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: list[int],
    generator: torch.Generator | None,
) -> list[Decoded]:
    """The loop. `known` is how many tokens of a text are cached: all but its last one or two."""
    clock = _Clock(slow.model.device)
    texts, ends = [list(prompt) for prompt in prompts], [len(prompt) + max_new_tokens for prompt in prompts]
    blocks: list[list[Block]] = [[] for _ in prompts]
    active, waiting = list(range(len(prompts)))[:batch_size], list(range(batch_size, len(prompts)))[::-1]
    known = _read_prompts(slow, texts[:batch_size]), _read_prompts(fast, texts[:batch_size])
    while active:
        room = max(ends[i] - len(texts[i]) for i in active)
        # The last token of a text is always the target's own, so a draft never reaches beyond the limit.
        drafts = _draft(
            fast, [texts[i] for i in active], known[1], num_speculative_tokens, room - 1, sampling, generator
        )
        clock.drafted()
        count = drafts.tokens_BG.shape[1]
        drafted = drafts.tokens_BG.tolist()
        fed = [texts[i][start:] + row for i, start, row in zip(active, known[0], drafted, strict=True)]
        logits_BGV = slow.feed(fed, known[0], count + 1)
        if sampling.temperature == 0:
            accepted, own, chances = verify_greedy(drafted, logits_BGV.argmax(-1).tolist())
        else:
            q_BGV = warp(logits_BGV, sampling)
            p_BGV = torch.stack(drafts.p_GBV, 1) if count else q_BGV[:, :0]
            result = verify(drafts.tokens_BG, p_BGV, q_BGV, generator)
            accepted, own, chances = (part.tolist() for part in result)
        clock.verified()
        going: list[int] = []
        starts: tuple[list[int], list[int]] = ([], [])
        for row, i in enumerate(list(active)):
            before = len(texts[i])
            block = settled(drafted[row], accepted[row], own[row], chances[row], ends[i] - before, stop_ids)
            blocks[i].append(block)
            texts[i] += block.emitted
            if len(texts[i]) < ends[i] and block.emitted[-1] not in stop_ids:
                going.append(row)
                starts[0].append(len(texts[i]) - 1)
                starts[1].append(min(len(texts[i]) - 1, before + max(count - 1, 0)))
            elif waiting:
                active[row] = i = waiting.pop()
                for model, places in zip((slow, fast), starts, strict=True):
                    model.seat(row, texts[i][:-1])
                    places.append(len(texts[i]) - 1)
                going.append(row)
        if len(going) < len(active) and going:
            slow.select(going)
            fast.select(going)
        active = [active[row] for row in going]
        # One number of tokens is fed to all texts: what some lack, the others are told again.
        lacking = max((len(texts[i]) - start for i, start in zip(active, starts[1], strict=True)), default=0)
        known = starts[0], [len(texts[i]) - lacking for i in active]
    seconds = clock.seconds(len(prompts))
    return [Decoded(texts[i][len(prompt) :], blocks[i], seconds) for i, prompt in enumerate(prompts)]


def _draft(
    fast: Feeds,
    texts: list[list[int]],
    known: list[int],
    num_speculative_tokens: int | Adaptive,
    room: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Drafts:
    """Draw up to gamma tokens for each text, or as long as the drafter is sure of those of any text."""
    adaptive = num_speculative_tokens if isinstance(num_speculative_tokens, Adaptive) else None
    greedy = sampling.temperature == 0
    fed, starts = [text[start:] for text, start in zip(texts, known, strict=True)], known
    tokens, probabilities, sure_B = [], [], torch.ones(len(texts))
    for step in range(min(longest(num_speculative_tokens), room)):
        logits_BV = fast.feed(fed, starts, 1)[:, -1]
        if greedy:
            chosen_B = logits_BV.argmax(-1)
            p_BV = logits_BV.float().softmax(-1) if adaptive else None
        else:
            p_BV = warp(logits_BV, sampling)
            probabilities.append(p_BV)
            chosen_B = draw(p_BV, generator)
        tokens.append(chosen_B)
        if adaptive and p_BV is not None:
            sure_B = sure_B.to(p_BV) * p_BV.gather(1, chosen_B[:, None])[:, 0]
            if sure_B.max() < adaptive.threshold:
                break
        fed, starts = [[token] for token in chosen_B.tolist()], [len(text) + step for text in texts]
    if not tokens:
        return Drafts(torch.zeros(len(texts), 0, dtype=torch.long, device=fast.model.device), [])
    return Drafts(torch.stack(tokens, 1), probabilities)


@torch.inference_mode()
def autoregressive_decode(
    target: PreTrainedModel | Compiled,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: list[int],
    generator: torch.Generator | None = None,
) -> Decoded:
    """Continue a prompt one token a target call, with the same cache and the same sampling: the baseline."""
    check_decoding(1, max_new_tokens, prompt)
    model, text = decoder_of(target), list(prompt)
    clock = _Clock(target.device)
    blocks: list[Block] = []
    fed, start = text[:], 0
    while len(blocks) < max_new_tokens and not (blocks and text[-1] in stop_ids):
        logits_1V = model.feed([fed], [start], 1)[:, -1]
        if sampling.temperature == 0:
            token = int(logits_1V.argmax())
        else:
            token = int(draw(warp(logits_1V, sampling), generator))
        start += len(fed)
        fed = [token]
        text.append(token)
        blocks.append(Block([], 0, [token]))
    return Decoded(text[len(prompt) :], blocks, clock.seconds(1))


def check_decoding(num_speculative_tokens: int | Adaptive, max_new_tokens: int, prompt: list[int]) -> None:
    """Refuse what cannot be decoded, before any model is called."""
    if longest(num_speculative_tokens) < 1:
        raise ValueError(f"num_speculative_tokens (gamma) is {longest(num_speculative_tokens)}, must be at least 1")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be at least 1")
    if not prompt:
        raise ValueError("the prompt has no tokens")


class _Clock:
    """Seconds in drafting, in verifying and in all; on a GPU it waits for what was asked to be done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.parts = [0.0, 0.0]
        self.began = self.last = now(device)

    def drafted(self) -> None:
        self._add(0)

    def verified(self) -> None:
        self._add(1)

    def _add(self, part: int) -> None:
        before, self.last = self.last, now(self.device)
        self.parts[part] += self.last - before

    def seconds(self, texts: int) -> Seconds:
        return Seconds(*(part / texts for part in (now(self.device) - self.began, *self.parts)))


def _read_prompts(model: Feeds, texts: list[list[int]]) -> list[int]:
    """Where each text's cache ends: prompts of one length wait for the first block, others are read up to their last
    token, so that every text is fed as many tokens from then on.
    """
    lengths = [len(text) for text in texts]
    if len(set(lengths)) <= 1:
        return [0] * len(texts)
    width = max(lengths) - 1
    model.feed([text[:-1] + [0] * (width - len(text) + 1) for text in texts], [0] * len(texts), 1)
    return [length - 1 for length in lengths]
