"""Encode control tokens such as <|im_end|> that a text spells out as text, never as control tokens.

A tokenizer matches the text of its special tokens anywhere, so that a user who quotes one would end the turn. A text
without such tokens does not come here: the callers encode it by a plain call of the tokenizer. Added tokens that the
tokenizer does not mark as special (in some, <think>) are ordinary tokens and are left alone.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase

from drafter.data.conversations import UnusableConversation

MARK = "\ue000{}\ue000"  # stands for a message's content in a rendered template; no text has private-use characters
NEUTRAL = "What is it?"  # a message without control tokens
ANCHORS = ("", "\n", ".", "a")  # texts to put before a piece, so that it is not encoded as the beginning of a text


class ControlTokenError(UnusableConversation):
    """A text spells out a control token that the tokenizer cannot encode as text. The message quotes the text."""

    reason = "with control tokens that cannot be encoded as text"


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return the pattern of a control token in a text, with the white space that the tokenizer strips around it."""
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values() if token.special}
    forms = []
    for text in sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True):
        before, after = (r"\s*" if getattr(added.get(text), side, False) else "" for side in ("lstrip", "rstrip"))
        forms.append(before + re.escape(text) + after)
    return re.compile("(" + "|".join(forms) + ")" if forms else r"(?!)")


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the control tokens, which the encoding of plain text must never contain.

    The id of unknown words is excluded, because plain text can be encoded to it too.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def encode_as_text(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    """Encode a text that spells out control tokens. Only the tokens that the tokenizer adds itself are control tokens.

    Raises:
        ControlTokenError: the tokenizer cannot encode them as text.
    """
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False)
    added = tokenizer("", add_special_tokens=add_special_tokens)["input_ids"]
    return _require_controls(tokenizer, text, list(encoded["input_ids"]), added)


def encode_in_template(
    tokenizer: PreTrainedTokenizerBase, contents: list[str], render: Callable[[list[str]], str]
) -> list[int]:
    """Encode the chat template around contents of messages that spell out control tokens.

    The rendered text is split at the control tokens of the template, as the tokenizer splits it, and the pieces between
    them are encoded as text. Some tokenizers encode the beginning of a text differently, so a piece may need an anchor
    before it. The anchor is the first one with which neutral contents get the ids of the plain call.

    Args:
        tokenizer: the tokenizer.
        contents: the contents that spell out control tokens.
        render: contents -> the text of the chat template with them.

    Raises:
        ControlTokenError: the template changes a content, or no anchor reproduces the ids of the plain call.
    """
    neutral = [NEUTRAL] * len(contents)
    plain = list(tokenizer(render(neutral), add_special_tokens=False)["input_ids"])
    for anchor in ANCHORS:
        if _encode_pieces(tokenizer, _pieces(tokenizer, neutral, render), anchor) == plain:
            ids = _encode_pieces(tokenizer, _pieces(tokenizer, contents, render), anchor)
            return _require_controls(tokenizer, contents[0], ids, plain)
    raise ControlTokenError(f"the tokenizer cannot encode the template and the message apart: {contents[0][:80]!r}")


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[str, bool]], anchor: str) -> list[int]:
    """Return the ids of the template's control tokens and of the pieces of text between them."""
    ids: list[int] = []
    for piece, is_control in pieces:
        if is_control:
            ids.append(int(tokenizer.convert_tokens_to_ids(piece.strip())))
        elif piece:
            ids += _encode_after(tokenizer, piece, anchor if ids else "")
    return ids


def _encode_after(tokenizer: PreTrainedTokenizerBase, text: str, anchor: str) -> list[int]:
    """Encode a text as it is encoded after other text. Return [] if the anchor's ids depend on the text."""
    head, joined = (
        tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for part in (anchor, anchor + text)
    )
    return list(joined[len(head) :]) if joined[: len(head)] == head else []


def _pieces(
    tokenizer: PreTrainedTokenizerBase, contents: list[str], render: Callable[[list[str]], str]
) -> list[tuple[str, bool]]:
    """Split the rendered template into pieces: (text, False) or (a control token of the template, True)."""
    frame = re.split(MARK.format(r"(\d+)"), render([MARK.format(number) for number in range(len(contents))]))
    full_text, end = render(contents), 0
    pattern, text, pieces = control_pattern(tokenizer), "", []
    for number, part in enumerate(frame):
        if number % 2:  # the number of a content, which the template may have stripped
            content = contents[int(part)]
            part = content if full_text.startswith(content + frame[number + 1], end) else content.strip()
        if not full_text.startswith(part, end):
            raise ControlTokenError(f"the chat template changes the message that it is given: {contents[0][:80]!r}")
        end += len(part)
        for position, piece in enumerate([part] if number % 2 else pattern.split(part)):
            if position % 2:
                pieces += [(text, False), (piece, True)]
                text = ""
            else:
                text += piece
    if end != len(full_text):
        raise ControlTokenError(f"the chat template changes the message that it is given: {contents[0][:80]!r}")
    return [*pieces, (text, False)]


def _require_controls(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], reference: Iterable[int]
) -> list[int]:
    """Return the ids. Raise unless each control token occurs as often as in the reference ids."""
    controls = control_ids(tokenizer)
    found, expected = (Counter(one for one in some if one in controls) for some in (ids, reference))
    if found != expected:
        raise ControlTokenError(f"the tokenizer has no other way to write the control tokens in {text[:80]!r}")
    return ids
