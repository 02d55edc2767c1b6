"""Conversations as people's logs have them, brought into the one form that chat templates take.

A row of data has its conversation in one of these forms:

- `messages`: a list of {"role", "content", ...}, the form of OpenAI's API;
- `conversations`: a list of {"from", "value"}, the form of ShareGPT;
- `turns` or `prompt`: a list of the user's messages alone, the form of MT-Bench, each of which is answered in turn;
- `prompt`: the text of a single user message.

The answers that MT-Bench's form does not have are messages of the assistant that are not logged; see `is_logged`.
`system` and `tools` may stand beside them. Lists may also be given as JSON text, because CSV has no lists. A row that
cannot be used raises `UnusableConversation`, whose reason is short enough to be counted.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
TEXT_PARTS = ("text", "input_text", "output_text")
KEPT = ("name", "tool_call_id", "reasoning_content")  # fields of a message that chat templates read, beside the role


class UnusableConversation(ValueError):
    """A row has no conversation that can be answered."""

    @property
    def reason(self) -> str:
        """Return the reason under which the row is counted."""
        return str(self)


class Conversation(NamedTuple):
    """Messages in the form of OpenAI's API, and the tools that the assistant may call.

    Each message has a `role` (system, user, assistant or tool) and a `content`, which is a string. An assistant's
    message may have `tool_calls`, whose arguments are objects.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def opening(self) -> str:
        """Return the first message of the user."""
        return self.asked()[0]

    def asked(self) -> list[str]:
        """Return the messages of the user as text."""
        return [str(message["content"]) for message in self.messages if message["role"] == "user"]

    def answer_points(self) -> list[int]:
        """Return at which numbers of messages the assistant is to answer.

        These are the positions of the assistant's messages that follow a message of the user or a tool, and the end, if
        the last message is of one of these.

        >>> turns = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
        >>> Conversation(turns).answer_points()
        [1, 3]
        """
        roles = [message["role"] for message in self.messages]
        asks = [number for number, role in enumerate(roles, start=1) if role in ("user", "tool")]
        return [number for number in asks if number == len(roles) or roles[number] == "assistant"]


def is_logged(message: Message) -> bool:
    """Return whether the log has the content of a message. If not, an answer always takes the message's place."""
    return message.get("logged") is not False


def read_conversation(row: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a row.

    Raises:
        UnusableConversation: the row has none, or one that no chat template could render.
    """
    turns = _turns(row)
    messages = [message for turn in turns for message in [_message(turn)] if message is not None]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "user" for message in messages):
        raise UnusableConversation("no message of the user")
    if any(message["role"] == "user" and not message["content"].strip() for message in messages):
        raise UnusableConversation("an empty message of the user")
    return Conversation(messages, _tools(row.get("tools")))


def opening(row: Mapping[str, Any]) -> str:
    """Return the first message of the user in a row of prepared data."""
    return read_conversation(row).opening()


def _turns(row: Mapping[str, Any]) -> list[Any]:
    for name in ("messages", "conversations", "conversation"):
        if row.get(name) is not None:
            turns = _from_json(row[name])
            if not isinstance(turns, list) or not turns:
                raise UnusableConversation(f"{name} is no list of messages")
            return turns
    for asked in (_from_json(row.get("turns")), row.get("prompt")):
        if isinstance(asked, list) and asked and all(isinstance(text, str) for text in asked):
            return _asked_in_turn(asked)
    if isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    raise UnusableConversation("neither messages, nor conversations, nor a prompt")


def _asked_in_turn(texts: list[str]) -> list[Message]:
    """Return the user's messages, with an answer that is not logged after each but the last."""
    messages: list[Message] = []
    for text in texts:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "", "logged": False}]
    return messages[:-1]


def _message(turn: Any) -> Message | None:
    """Return a turn as a message; None for a turn of the system without content, which says nothing."""
    if not isinstance(turn, Mapping):
        raise UnusableConversation("a message that is no object")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise UnusableConversation(f"a message by '{name}'")
    value = turn.get("content", turn.get("value"))
    message: Message = {"role": role, "content": _content(value)}
    message |= {key: turn[key] for key in KEPT if turn.get(key) is not None}
    calls = list(_tool_calls(turn))
    if name == "function_call":
        calls, message["content"] = [_call(_from_json(value))], ""
    if calls and role == "assistant":
        message["tool_calls"] = calls
    if role == "system" and not message["content"].strip():
        return None
    if role == "assistant" and not is_logged(dict(turn)) and not message["content"] and not calls:
        message["logged"] = False
    return message


def _content(value: Any) -> str:
    """Return a message's content as text. Parts of text are joined, as OpenAI's API joins them."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _checked(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise UnusableConversation(f"content that is a {type(value).__name__}")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UnusableConversation(f"a part of content that is no text ({kind})")
    return _checked("".join(texts))


def _checked(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UnusableConversation("half of a surrogate pair, which is no character")
    return text


def _tool_calls(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    calls = _from_json(turn.get("tool_calls")) or []
    if not isinstance(calls, list):
        raise UnusableConversation("tool_calls that are no list")
    for call in calls:
        yield _call(call)
    if turn.get("function_call"):  # the older form of OpenAI's API
        yield _call(_from_json(turn["function_call"]))


def _call(call: Any) -> dict[str, Any]:
    """Return a tool call whose arguments are an object: templates that write them as JSON would quote a string."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnusableConversation("a tool call without a name")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments in (None, "") else _from_json(arguments)
    if not isinstance(arguments, Mapping):
        raise UnusableConversation("arguments of a tool call that are no JSON object")
    made = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _tools(value: Any) -> list[dict[str, Any]] | None:
    tools = _from_json(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UnusableConversation("tools that are no list of objects")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def _from_json(value: Any) -> Any:
    """Return what a JSON text says, and any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
