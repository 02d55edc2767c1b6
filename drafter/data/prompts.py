"""Encode conversations as token ids in the target's chat template, as engines send them to it.

Everything downstream derives the response mask from the number of these ids and never tokenizes the text again: the
tokens of a response are the ones that the target generated after them.
"""

import json
import re
from collections.abc import Mapping

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from drafter.data.control_tokens import (
    NEUTRAL,
    ControlTokenError,
    control_ids,
    control_pattern,
    encode_as_text,
    encode_in_template,
)
from drafter.data.conversations import Conversation, UnusableConversation
from drafter.models.source import TemplateSettings

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A macro that prints the pinned date, in the place of the function that prints today's. transformers passes only plain
# data to templates, so the macro is written in their language.
PINNED_DATE = (
    "{%- macro strftime_now(format) -%}{%- set text = namespace(of=format) -%}"
    "{%- for directive, part in date_parts.items() -%}{%- set text.of = text.of.replace(directive, part) -%}"
    "{%- endfor -%}"
    "{{- text.of -}}{%- endmacro -%}"
)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Return the ids that the target continues after a single message of the user; see `encode_conversation`."""
    return encode_conversation(tokenizer, Conversation([{"role": "user", "content": message}]))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, add_generation_prompt: bool = True
) -> list[int]:
    """Return the ids of a conversation in the target's chat template.

    A tokenizer without a chat template belongs to a base model, whose prompt is the message itself. Control tokens that
    a message spells out are encoded as text.

    Args:
        tokenizer: the target's, as `loading.load_tokenizer` returns it: with the settings of its template.
        conversation: the messages and tools.
        add_generation_prompt: end with the beginning of the assistant's answer.

    Raises:
        ControlTokenError: the tokenizer cannot encode the control tokens as text, or they are not in a content.
        UnusableConversation: the template refuses the conversation, or leaves out a part of it.
    """
    pattern, contents = control_pattern(tokenizer), [message["content"] for message in conversation.messages]
    require_plain_fields(conversation, pattern)
    spelling = [number for number, content in enumerate(contents) if pattern.search(content)]
    if tokenizer.chat_template is None:
        if len(conversation.messages) > 1 or conversation.tools:
            raise UnusableConversation("more than one message, and the tokenizer has no chat template")
        if spelling:
            return encode_as_text(tokenizer, contents[0], add_special_tokens=True)
        return list(tokenizer(contents[0])["input_ids"])
    text = render(tokenizer, conversation, add_generation_prompt)
    check_rendered(tokenizer, conversation, add_generation_prompt, text)
    if not spelling:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def render_with(given: list[str]) -> str:
        return render(tokenizer, conversation, add_generation_prompt, dict(zip(spelling, given, strict=True)))

    return encode_in_template(tokenizer, [contents[number] for number in spelling], render_with)


def require_plain_fields(conversation: Conversation, pattern: re.Pattern[str]) -> None:
    """Refuse control tokens in tools, calls and other fields than the content, which templates write as they are.

    Raises:
        ControlTokenError: one is spelled out.
    """
    fields = [message[key] for message in conversation.messages for key in message if key not in ("role", "content")]
    written = pattern.search(json.dumps([fields, conversation.tools], ensure_ascii=False, default=str))
    if written:
        raise ControlTokenError(f"the tools or their calls spell out control tokens: {written[0]!r}")


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    add_generation_prompt: bool = True,
    contents: Mapping[int, str] | None = None,
) -> str:
    """Return the text of the chat template.

    Args:
        tokenizer: the target's.
        conversation: the messages and tools.
        add_generation_prompt: end with the beginning of the assistant's answer.
        contents: number of a message -> the content that takes the place of its own.

    Raises:
        UnusableConversation: the template refuses the conversation.
    """
    replaced = contents or {}
    messages = [
        {**message, "content": replaced[number]} if number in replaced else message
        for number, message in enumerate(conversation.messages)
    ]
    settings: TemplateSettings = getattr(tokenizer, "template_settings", TemplateSettings())
    template, arguments = tokenizer.get_chat_template(None, conversation.tools), settings.arguments()
    if "strftime_now" in template:
        template, arguments = PINNED_DATE + template, {**arguments, "date_parts": settings.date_parts()}
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=conversation.tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **arguments,
        )
    except (TemplateError, TypeError, ValueError) as problem:
        raise UnusableConversation(f"the chat template refuses the conversation: {problem}") from None
    return str(text)


def check_rendered(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, add_generation_prompt: bool, text: str
) -> None:
    """Refuse a conversation of which the rendered text lacks a message or the tools.

    An assistant's message is not looked for, because templates rewrite it, for example without its thinking.

    Raises:
        UnusableConversation: the template leaves something out.
    """
    for message in conversation.messages:
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise UnusableConversation(f"the chat template leaves out a message of the {message['role']}")
    if conversation.tools and text == render(tokenizer, conversation._replace(tools=None), add_generation_prompt):
        raise UnusableConversation("the chat template has no place for tools")


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, with no token added. Control tokens that a text spells out are encoded as text.

    Raises:
        ControlTokenError: the tokenizer cannot encode them as text.
    """
    pattern = control_pattern(tokenizer)
    if not any(map(pattern.search, texts)):
        return _encode_plain(tokenizer, texts)
    plain = iter(_encode_plain(tokenizer, [text for text in texts if not pattern.search(text)]))
    return [encode_as_text(tokenizer, text) if pattern.search(text) else next(plain) for text in texts]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, messages: list[str], max_new_tokens: int, context: int
) -> list[list[int]]:
    """Encode each message with `encode_prompt`, and check all of them before any compute is spent.

    Raises:
        ValueError: there are no messages, or a prompt and max_new_tokens exceed the model's context.
    """
    if not messages:
        raise ValueError("there are no prompts: the instruction or task file is empty")
    prompts = [encode_prompt(tokenizer, message) for message in messages]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) + max_new_tokens > context:
        raise ValueError(
            f"prompt {longest} has {len(prompts[longest])} tokens; with max_new_tokens={max_new_tokens} it exceeds the "
            f"context of {context} tokens. Shorten or remove it, or lower max_new_tokens. It begins: "
            f"{messages[longest][:80]!r}"
        )
    return prompts


def thinking_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Return the ids of the tokens `<think>` and `</think>`, or None if the tokenizer does not have both."""
    vocabulary = tokenizer.get_vocab()
    found = [vocabulary[token] for token in ("<think>", "</think>") if token in vocabulary]
    return (found[0], found[1]) if len(found) == 2 else None


def known_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> set[int]:
    """Return the ids that both a tokenizer and a model whose embedding has so many rows have."""
    return set(tokenizer.get_vocab().values()) & set(range(rows))


def check_embedding(tokenizer: PreTrainedTokenizerBase, rows: int, model: str) -> None:
    """Refuse a tokenizer that produces ids for which the model's embedding has no row.

    A control token that neither the tokenizer nor its chat template produces, such as one for padding, never reaches
    the model and needs no row.

    Raises:
        ValueError: an id has no row; names the first one and what to change.
    """
    plain_ids = set(tokenizer.get_vocab().values()) - control_ids(tokenizer)
    written = plain_ids | set(encode_prompt(tokenizer, NEUTRAL)) | {tokenizer.eos_token_id}
    beyond = [token for token in written if token is not None and token >= rows]
    if beyond:
        first = min(beyond)
        raise ValueError(
            f"the tokenizer of {model} writes {tokenizer.convert_ids_to_tokens(first)!r} as id {first}, and the "
            f"model's embedding has {rows} rows: resize it to {max(beyond) + 1}, or use the tokenizer that the model "
            f"was trained with"
        )
