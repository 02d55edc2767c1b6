"""Decode an answer to text while it is generated.

A token can be a part of a character, and how a tokenizer decodes a token can depend on its neighbours. `TextStream`
therefore returns text only when later tokens can no longer change it. The texts that it returns, joined, are what
`decode_answer` makes of all tokens.
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what an incomplete character is decoded to
# A token of SentencePiece's byte fallback. If the bytes of such tokens in a row are not valid UTF-8, each of them is
# decoded to a replacement character, also those that would be complete characters without the others.
BYTE = re.compile("<0x[0-9A-F]{2}>")


class Piece(NamedTuple):
    """A piece of text, and whether the token that completes it was drafted."""

    text: str
    drafted: bool


def decode_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of an answer's tokens, with its white space as it is and without control tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextStream:
    """Turns tokens, one after another, into pieces of text.

    Decoding begins at an earlier token whose text is complete, and not at the answer's first, so that the time per
    token does not grow with the answer.

    Args:
        tokenizer: the target's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.drafted: list[bool] = []
        self.begin = self.returned = (
            0  # the token at which decoding begins, and the number of tokens with returned text
        )

    def feed(self, token: int, drafted: bool) -> list[Piece]:
        """Add a token, and return the text that is now complete, in pieces by the token that completes each."""
        self.tokens.append(token)
        self.drafted.append(drafted)
        return self._return() if self._ends_complete() else []

    def finish(self) -> list[Piece]:
        """Return the remaining text after the last token; a character that stays incomplete is a replacement one."""
        return self._return() if self.returned < len(self.tokens) else []

    def _ends_complete(self) -> bool:
        """Return whether no later token can change the text of the last one."""
        last = self.tokens[-1]
        if BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(last) or ""):
            return False
        # A token without text, such as a control token, does not end a row of bytes.
        has_text = decode_answer(self.tokenizer, [last]) != ""
        return has_text and not self._decode(len(self.tokens)).endswith(REPLACEMENT)

    def _return(self) -> list[Piece]:
        end = len(self.tokens)
        text, position = self._decode(end), len(self._decode(self.returned))
        pieces = []
        for number in range(self.returned, end):
            so_far = text if number + 1 == end else self._decode(number + 1)
            reached = max(position, _common_length(so_far, text))
            if reached > position:
                pieces.append(Piece(text[position:reached], self.drafted[number]))
            position = reached
        # A tokenizer may decode the first token with text differently from others: there must be one before the next.
        if decode_answer(self.tokenizer, self.tokens[self.returned :]):
            self.begin = self.returned
        self.returned = end
        return pieces

    def _decode(self, end: int) -> str:
        return decode_answer(self.tokenizer, self.tokens[self.begin : end])


def _common_length(one: str, other: str) -> int:
    """Return the length of the beginning that two texts have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
