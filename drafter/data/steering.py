"""What stands before a message that the target writes itself, and steers it."""

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from drafter.data.conversations import Conversation, Message
from drafter.data.prompts import encode_conversation
from drafter.data.user_turn import UserTurn, begin_user_turn, require_chat_template

PLACEHOLDER = "OK."  # the answer to an example


class Recipe(NamedTuple):
    """How the target writes.

    Attributes:
        name: the name of the source.
        seed: of the run.
        temperature: of sampling, above 0.
        systems: system prompts, which the messages take in turn; None for no system prompt.
        examples: messages of a user that steer the target.
        shown: how many of the examples precede each message.
        requests: what the target is asked for, in turn. Its answers are the messages then; without requests it
            continues its chat template from where the user's message begins.
        with_answers: whether the target also answers its messages.
    """

    name: str
    seed: int
    temperature: float
    systems: tuple[str | None, ...] = (None,)
    examples: tuple[str, ...] = ()
    shown: int = 3
    requests: tuple[str, ...] = ()
    with_answers: bool = False

    @property
    def period(self) -> int:
        """Return after how many messages that which precedes them repeats."""
        return len(self.systems) * max(1, len(self.examples), len(self.requests))

    def before(self, number: int) -> list[Message]:
        """Return the messages before the message of a number: a system prompt, examples as earlier turns, a request.

        The examples move on by one from message to message, so that each of them comes first, second and last as often.
        """
        system, turn = self.systems[number % len(self.systems)], number // len(self.systems)
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for shown in range(min(self.shown, len(self.examples))):
            example = self.examples[(turn + shown) % len(self.examples)]
            messages += [{"role": "user", "content": example}, {"role": "assistant", "content": PLACEHOLDER}]
        if self.requests:
            messages.append({"role": "user", "content": self.requests[turn % len(self.requests)]})
        return messages

    def every_before(self) -> Iterator[list[Message]]:
        """Yield what `before` returns for all numbers, each once."""
        return map(self.before, range(self.period))

    def turn(self, tokenizer: PreTrainedTokenizerBase, number: int) -> UserTurn:
        """Return the ids from which the target writes the message of a number, and what ends the message.

        Raises:
            ValueError: the chat template cannot be used for this (see `begin_user_turn`).
            UnusableConversation: it refuses the messages.
        """
        if not self.requests:
            return begin_user_turn(tokenizer, self.before(number))
        require_chat_template(tokenizer)
        return UserTurn(encode_conversation(tokenizer, Conversation(self.before(number))), None, "")
