"""Find where a user's message begins and ends in a chat template, so that the target can write the message itself.

The method is Magpie's (arXiv 2406.08464): a chat model that is given its template up to the place where the user's
message begins continues with a message that a user could have written.
"""

from itertools import chain
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from drafter.data.conversations import Conversation, Message, UnusableConversation
from drafter.data.prompts import encode_conversation, render
from drafter.models.end_of_turn import leading_control

MARKERS = ("QXZ7 marker QXZ7", "jvk marker jvk")
# Messages that begin differently, so that the ids that they share are those before the message.
OPENINGS = ("What is it?", "how?", "Please go on.", "7 of them", "(So what?)")


class UserTurn(NamedTuple):
    """The ids from which the target writes a user's message, and what ends the message.

    Attributes:
        prefix_ids: the template up to the message. A space before the message is not part of it where the tokenizer
            joins it with the first word.
        end_id: the control token after the message, or None if the template has text there.
        end_text: the text after the message, "" if a control token is there.
    """

    prefix_ids: list[int]
    end_id: int | None
    end_text: str


def begin_user_turn(tokenizer: PreTrainedTokenizerBase, before: list[Message]) -> UserTurn:
    """Return the beginning and the end of a user's message that follows other messages.

    Args:
        tokenizer: the target's.
        before: the messages before it: a system prompt, or earlier turns. Control tokens in them are encoded as text.

    Raises:
        ValueError: the tokenizer has no chat template, or the template does not write each message in the same place.
    """
    require_chat_template(tokenizer)
    try:
        parts = [_around(tokenizer, before, marker) for marker in MARKERS]
        encoded = [encode_conversation(tokenizer, _with_user(before, text), False) for text in _openings(tokenizer)]
    except UnusableConversation as problem:
        raise ValueError(f"the target cannot write a user's message: {problem}") from None
    if parts[0] != parts[1]:
        raise ValueError(
            "the target cannot write a user's message: its chat template changes with the message, so that what "
            "precedes it is unknown"
        )
    length = next(i for i, tokens in enumerate(zip(*encoded, strict=False)) if len(set(tokens)) > 1)
    if not length:
        raise ValueError(
            "the target cannot write a user's message: its chat template has nothing before it that would tell the "
            "target who is speaking"
        )
    before_ids = tokenizer(parts[0][0], add_special_tokens=False)["input_ids"]
    if "".join(tokenizer.decode(encoded[0][:length]).split()) != "".join(tokenizer.decode(before_ids).split()):
        raise ValueError(
            f"the target cannot write a user's message: its tokenizer joins the message with the text before it, "
            f"{parts[0][0][-20:]!r}, so that no token ends there"
        )
    end = leading_control(tokenizer, parts[0][1])
    text = "" if end is not None else parts[0][1].strip().split("\n")[0]
    return UserTurn(encoded[0][:length], end, text)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the target's tokenizer has no chat template: a base model cannot write a user's messages, so give a chat "
            "model, or instructions from files (data=files)"
        )


def _openings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return messages whose first ids differ; words of the vocabulary if those above begin alike or are unknown."""
    vocabulary, found = tokenizer.get_vocab(), dict[int, str]()
    pieces = (piece.lstrip("▁Ġ") for piece in sorted(vocabulary, key=vocabulary.__getitem__))  # without marks of words
    words = (piece for piece in pieces if piece.isascii() and piece.isalpha())
    for number, text in enumerate(chain(OPENINGS, words)):
        if number >= len(OPENINGS) and len(found) > 1:
            break
        first = tokenizer(text, add_special_tokens=False)["input_ids"][0]
        if first != tokenizer.unk_token_id:
            found.setdefault(first, text)
    return list(found.values()) if len(found) > 1 else list(OPENINGS)  # every text begins with the same id


def _with_user(before: list[Message], text: str) -> Conversation:
    return Conversation([*before, {"role": "user", "content": text}])


def _around(tokenizer: PreTrainedTokenizerBase, before: list[Message], marker: str) -> tuple[str, str]:
    """Return the text of the template before and after a message of the user.

    Raises:
        UnusableConversation: the template refuses the messages, or does not have the message exactly once.
    """
    parts = render(tokenizer, _with_user(before, marker)).split(marker)
    if len(parts) != 2:
        raise UnusableConversation(f"the chat template has the message {len(parts) - 1} times, not once")
    return parts[0], parts[1]
