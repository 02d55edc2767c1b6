"""The settings of a decoding: length, sampling, stop tokens, acceptance rule, and the drafted tokens per block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from drafter.decoding.acceptance import check_rule
from drafter.warping import Sampling, check_sampling


@dataclass(frozen=True)
class DecodingOptions:
    """The settings that speculative decoding and its autoregressive baseline share.

    Attributes:
        max_new_tokens: the most tokens to generate, at least 1.
        sampling: temperature, top-p and top-k; greedy by default.
        stop_ids: tokens that end a sequence. The stop token is part of the result.
        rule: the acceptance rule of speculative decoding, one of acceptance.RULES. The result has the target's
            distribution under each; they differ in the drafts, and in how many of them are accepted.

    Raises:
        ValueError: max_new_tokens is below 1, a setting of `sampling` is out of its range, or the rule is unknown.
    """

    max_new_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009 (immutable)
    stop_ids: Sequence[int] = ()
    rule: str = "ratio"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, must be at least 1")
        check_sampling(self.sampling)
        check_rule(self.rule)


class Adaptive(NamedTuple):
    """Draft until the drafter's probability of the block so far falls below `threshold`, at most `limit` tokens."""

    limit: int = 8
    threshold: float = 0.3


def max_draft_length(num_speculative_tokens: int | Adaptive) -> int:
    """Return the most tokens that a block may draft."""
    return num_speculative_tokens.limit if isinstance(num_speculative_tokens, Adaptive) else num_speculative_tokens


def check_draft_length(num_speculative_tokens: int | Adaptive) -> None:
    """Raise ValueError if a block could not draft any token."""
    if max_draft_length(num_speculative_tokens) < 1:
        raise ValueError(
            f"num_speculative_tokens (gamma) is {max_draft_length(num_speculative_tokens)}, must be at least 1"
        )


def check_prompt(prompt: list[int]) -> None:
    """Raise ValueError if the prompt is empty: a model needs at least one token to predict the next."""
    if not prompt:
        raise ValueError("the prompt has no tokens")
