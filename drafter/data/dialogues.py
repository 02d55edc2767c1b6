"""Answer conversations turn by turn, and turn the answers into rows.

The assistant answers at several points of a conversation. The prompt of each answer is the conversation up to that
point, encoded as an engine would receive it, with the earlier answers in the place of the logged ones. If the template
only adds text, each prompt begins with the tokens of the previous prompt and answer, and all turns are one row: one
sequence with several responses. If the template rewrites earlier turns (Qwen3 removes the thinking of earlier answers),
or the text of an answer is encoded to other tokens than those that were generated, the later turn is a row of its own.
In both cases the tokens of the responses are those that were generated; no text is encoded again to find them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from drafter.data.control_tokens import control_pattern
from drafter.data.conversations import Conversation, UnusableConversation, is_logged
from drafter.data.engines import Engine, Failure, Request
from drafter.data.prompts import encode_conversation
from drafter.data.states import StatesEngine, states_column
from drafter.decoding.side_by_side import Generated

TURNS = ("all", "first", "last")
TOO_LONG = "too long for the context"


class Dialogue(NamedTuple):
    """A conversation that is being answered.

    Attributes:
        conversation: the messages, with the generated answers in the place of the logged ones so far.
        points: the numbers of the messages at which an answer is still to be given, in order.
    """

    conversation: Conversation
    points: tuple[int, ...]

    def before(self) -> Conversation:
        """Return the conversation up to the next point, which is the prompt of the next answer."""
        return self.conversation._replace(messages=self.conversation.messages[: self.points[0]])

    def logged(self) -> dict[str, Any] | None:
        """Return the logged message at the next point, or None if the log has none there."""
        following = self.conversation.messages[self.points[0] :][:1]
        return following[0] if following and is_logged(following[0]) else None


class Prompt(NamedTuple):
    """A dialogue, and the prompt of its next answer as token ids."""

    dialogue: Dialogue
    prompt_ids: list[int]


def begin(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, points: tuple[int, ...]) -> Prompt:
    """Return the prompt of the first answer.

    Raises:
        UnusableConversation: the template refuses the conversation, or an earlier answer is not logged.
    """
    if not all(map(is_logged, conversation.messages[: points[0]])):
        raise UnusableConversation("an earlier answer is not logged, so that turns=last has no prompt")
    dialogue = Dialogue(conversation, points)
    return Prompt(dialogue, encode_conversation(tokenizer, dialogue.before()))


def choose_points(conversation: Conversation, turns: str, only_logged: bool = False) -> tuple[int, ...]:
    """Return the points at which the assistant answers.

    Args:
        conversation: the logged conversation.
        turns: "all", "first" or "last".
        only_logged: leave out the points after which no logged answer follows, and those behind them.
    """
    points, messages = tuple(conversation.answer_points()), conversation.messages
    if only_logged:
        points = tuple(takewhile(lambda point: point < len(messages) and is_logged(messages[point]), points))
    return {"all": points, "first": points[:1], "last": points[-1:]}[turns]


class Turn(NamedTuple):
    """The prompt and the response of one answer, as token ids, and the target's states if the engine kept them."""

    prompt_ids: list[int]
    response_ids: list[int]
    hidden_NH: torch.Tensor | None = None


class Answered(NamedTuple):
    """A request with its turns, or the reason why there is none; and how many turns were left out for which reason."""

    request: Request
    turns: list[Turn]
    failure: str | None
    left_out: Counter[str]


@dataclass(frozen=True)
class Continuation:
    """Makes the request for the next turn of a dialogue from the answer to the previous one.

    Attributes:
        tokenizer: the target's.
        stop_ids: the tokens that end an answer.
        room: the largest number of tokens of a prompt, which leaves enough of the context for an answer.
        from_log: keep the logged answers in the conversation.
        thinking: the ids of `<think>` and `</think>`, if the tokenizer has both (see prompts.thinking_ids).
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    room: int
    from_log: bool = False
    thinking: tuple[int, int] | None = None

    def is_cut_in_thinking(self, turn: Turn) -> bool:
        """Return whether an answer was cut off at its limit before its thinking ended."""
        if self.thinking is None or turn.response_ids[-1] in self.stop_ids:
            return False
        begin, end = self.thinking
        last = next((token for token in reversed(turn.prompt_ids + turn.response_ids) if token in (begin, end)), end)
        return last == begin

    def following(self, request: Request, tokens: list[int]) -> Request | str | None:
        """Return the next request; None if the dialogue is finished; or the reason why its later turns are left out."""
        if request.dialogue is None:
            return None
        step = self.after(request.dialogue, tokens)
        if not isinstance(step, Prompt):
            return step
        return request._replace(prompt_ids=step.prompt_ids, dialogue=step.dialogue, turn=request.turn + 1)

    def after(self, dialogue: Dialogue, tokens: list[int]) -> Prompt | str | None:
        """Return the next prompt of a dialogue after the tokens of an answer; None if it is finished; or the reason why
        its later turns are left out.
        """
        if len(dialogue.points) < 2:
            return None
        conversation = dialogue.conversation
        if not self.from_log:
            if tokens[-1] not in self.stop_ids:
                return "after an answer that was cut off"
            # A template that begins answers with a space adds it again.
            text = self.tokenizer.decode(tokens[:-1]).strip()
            if control_pattern(self.tokenizer).search(text):
                return "after an answer that contains control tokens"
            conversation = replace_answer(conversation, dialogue.points[0], text)
        rest = Dialogue(conversation, dialogue.points[1:])
        try:
            prompt_ids = encode_conversation(self.tokenizer, rest.before())
        except UnusableConversation as problem:
            return problem.reason
        return Prompt(rest, prompt_ids) if len(prompt_ids) <= self.room else TOO_LONG


def replace_answer(conversation: Conversation, point: int, text: str) -> Conversation:
    """Put a generated answer in the place of the logged one.

    A logged answer to which a tool replied stays: the tool's result belongs to the logged call.
    """
    messages = list(conversation.messages)
    if point + 1 < len(messages) and messages[point + 1]["role"] == "tool":
        return conversation
    messages[point : point + 1] = [{"role": "assistant", "content": text}]
    return conversation._replace(messages=messages)


def answer(
    engine: StatesEngine, requests: Sequence[Request], following: Continuation, known_ids: set[int]
) -> list[Answered]:
    """Answer every turn of every request. The first turns of all are generated together, then the second ones, etc.

    A response fails if it is empty or has an id that is none of `known_ids`, the ids of both tokenizer and target. If
    the first one of a request fails, the request fails; if a later one fails, the turns before it are kept.
    """
    answered = [Answered(request, [], None, Counter()) for request in requests]
    pending = dict(enumerate(requests))
    while pending:
        responses = engine(list(pending.values()))
        for (number, request), given in zip(list(pending.items()), responses, strict=True):
            del pending[number]
            response, hidden_NH = given if isinstance(given, Generated) else (given, None)
            one, reason = answered[number], _failure(response, known_ids)
            if reason is None:
                assert not isinstance(response, Failure)
                one.turns.append(Turn(request.prompt_ids, response, hidden_NH))
                step = following.following(request, response)
                if isinstance(step, Request):
                    pending[number] = step
                elif step is not None:
                    one.left_out[step] += len(request.dialogue.points) - 1
            elif one.turns:
                one.left_out[reason] += len(request.dialogue.points)
            else:
                answered[number] = one._replace(failure=reason)
    return answered


def _failure(response: list[int] | Failure, known_ids: set[int]) -> str | None:
    if isinstance(response, Failure):
        return response.reason
    if not response:
        return "an empty response"
    if not known_ids.issuperset(response):
        return "an id that the tokenizer or the target does not have"
    return None


def rows_of(answered: Answered, stop_ids: list[int]) -> list[dict[str, Any]]:
    """Return the rows (see responses.COLUMNS) of an answered request.

    `prompt_ids` and `response_ids` of a row are the tokens of all its turns. `turns` are the numbers of tokens of the
    parts of the sequence in order: given, generated, given, generated, … A row that does not begin with the first turn
    has the number of its first turn in its id. `hidden` has the states of all responses, or nothing if one has none. A
    state depends only on the tokens before it, and those in a joined row are those that the turn was generated after.
    """
    found: list[dict[str, Any]] = []
    sequence: list[int] = []
    for number, turn in enumerate(answered.turns):
        if not found or turn.prompt_ids[: len(sequence)] != sequence:
            sequence, name = [], answered.request.id if number == 0 else f"{answered.request.id}#{number + 1}"
            parts: dict[str, Any] = {"prompt_ids": [], "response_ids": [], "turns": [], "truncated": False}
            parts["hidden"] = []
            found.append({**answered.request._asdict(), "id": name, **parts})
        row, given = found[-1], turn.prompt_ids[len(sequence) :]
        row["prompt_ids"] += given
        row["response_ids"] += turn.response_ids
        row["turns"] += [len(given), len(turn.response_ids)]
        row["truncated"] = turn.response_ids[-1] not in stop_ids
        row["hidden"].append(turn.hidden_NH)
        sequence = turn.prompt_ids + turn.response_ids
    return [row | {"hidden": states_column(row["hidden"])} for row in found]


def log_engine(tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> Engine:
    """Return an engine that takes the logged answers as they are, encoded as the chat template writes them.

    An answer fails if the template writes it differently from the prompt of its turn, or if its text does not come back
    from its token ids: then its tokens are not those that the target produced.
    """

    def generate(requests: list[Request]) -> list[list[int] | Failure]:
        return [_logged_tokens(tokenizer, request, stop_ids) for request in requests]

    return generate


def _logged_tokens(tokenizer: PreTrainedTokenizerBase, request: Request, stop_ids: list[int]) -> list[int] | Failure:
    dialogue: Dialogue = request.dialogue
    message, before = dialogue.logged(), dialogue.before()
    if message is None:
        return Failure("no logged answer")
    try:
        answered = before._replace(messages=[*before.messages, message])
        ids = encode_conversation(tokenizer, answered, add_generation_prompt=False)
    except UnusableConversation as problem:
        return Failure(problem.reason)
    start = len(request.prompt_ids)
    if ids[:start] != request.prompt_ids:
        return Failure("a logged answer that the chat template begins differently")
    tokens = ids[start:]
    end = next((number for number, token in enumerate(tokens) if token in stop_ids), len(tokens))
    if "tool_calls" not in message and tokenizer.decode(tokens[:end]).split() != message["content"].split():
        return Failure("a logged answer whose text does not come back from its token ids")
    return [*tokens[:end], *(tokens[end : end + 1] or stop_ids[:1])]
