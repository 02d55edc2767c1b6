"""Control tokens such as <|im_end|> that a text writes out: they are encoded as text, never as control tokens.

A tokenizer matches the text of its special tokens wherever it stands, so that a user who quotes one would end the turn.
A text without any takes none of the paths below, and its tokens are those of the plain call of the tokenizer.
Added tokens that the tokenizer does not call special (some write <think> so) are ordinary pieces, and stay as they are.
"""

import re
from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

MARK = "\ue000message\ue000"  # stands for the message in a rendered template; private-use characters, in no real text
NEUTRAL = "What is it?"
ANCHORS = ("", "\n", ".", "a")


class ControlTokenError(ValueError):
    """A text writes out a control token that the tokenizer cannot encode as text."""


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What matches a control token written out, with the white space that the tokenizer counts to it."""
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values() if token.special}
    forms = []
    for text in sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True):
        before, after = (r"\s*" if getattr(added.get(text), side, False) else "" for side in ("lstrip", "rstrip"))
        forms.append(before + re.escape(text) + after)
    return re.compile("(" + "|".join(forms) + ")" if forms else r"(?!)")


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that no text may bring. The id for unknown words is none: plain text has it too."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def encode_as_text(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    """The ids of a text in which control tokens are written out; only what the tokenizer adds itself is control.

    Raises:
        ControlTokenError: the tokenizer cannot write them as text.
    """
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False)
    own = tokenizer("", add_special_tokens=add_special_tokens)["input_ids"]
    return _checked(tokenizer, text, list(encoded["input_ids"]), own)


def encode_in_template(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """The ids of the chat template around a message in which control tokens are written out.

    The rendered text is cut at the template's own control tokens, as the tokenizer itself cuts it, and what lies
    between them is encoded as text. That this way is the tokenizer's own is tried on a neutral message first; some
    tokenizers treat a text's beginning differently, and need an anchor before it.

    Raises:
        ControlTokenError: the template changes the message, or no way gives the tokenizer's own ids.
    """
    neutral = list(tokenizer(_rendered(tokenizer, NEUTRAL), add_special_tokens=False)["input_ids"])
    for anchor in ANCHORS:
        if _joined(tokenizer, NEUTRAL, anchor) == neutral:
            return _checked(tokenizer, message, _joined(tokenizer, message, anchor), neutral)
    raise ControlTokenError(f"the tokenizer cannot encode the template and the message apart: {message[:80]!r}")


def _joined(tokenizer: PreTrainedTokenizerBase, message: str, anchor: str) -> list[int]:
    """The ids of the template's control tokens and, between them, of the pieces of text."""
    ids: list[int] = []
    for piece, is_control in _pieces(tokenizer, message):
        if is_control:
            ids.append(int(tokenizer.convert_tokens_to_ids(piece.strip())))
        elif piece:
            ids += _behind(tokenizer, piece, anchor if ids else "")
    return ids


def _behind(tokenizer: PreTrainedTokenizerBase, text: str, anchor: str) -> list[int]:
    """The ids of a text as it is encoded when something stands before it."""
    head, whole = (
        tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for part in (anchor, anchor + text)
    )
    return list(whole[len(head) :]) if whole[: len(head)] == head else []


def _pieces(tokenizer: PreTrainedTokenizerBase, message: str) -> list[tuple[str, bool]]:
    """The rendered template in pieces: (text, False) or (one control token of the template's own, True)."""
    frame, whole = _rendered(tokenizer, MARK).split(MARK), _rendered(tokenizer, message)
    content = next((one for one in (message, message.strip()) if one.join(frame) == whole), None)
    if content is None:
        raise ControlTokenError(f"the chat template changes the message that it is given: {message[:80]!r}")
    pattern, text, pieces = control_pattern(tokenizer), "", []
    for number, part in enumerate(frame):
        text += content if number else ""
        for place, piece in enumerate(pattern.split(part)):
            if place % 2:
                pieces += [(text, False), (piece, True)]
                text = ""
            else:
                text += piece
    return [*pieces, (text, False)]


def _rendered(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    turns = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _checked(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], own: Iterable[int]) -> list[int]:
    """These ids, once they have each control token as often as the template or the tokenizer writes it itself."""
    controls = control_ids(tokenizer)
    found, expected = (Counter(one for one in some if one in controls) for some in (ids, own))
    if found != expected:
        raise ControlTokenError(f"the tokenizer has no other way to write the control tokens in {text[:80]!r}")
    return ids
