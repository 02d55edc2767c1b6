"""Encode user messages as token ids in the target's chat template.

Everything downstream derives the response mask from the number of these ids and never tokenizes the text again: the
tokens of a response are the ones that the target generated after them.
"""

from transformers import PreTrainedTokenizerBase

from drafter.data.control_tokens import NEUTRAL, control_ids, control_pattern, encode_as_text, encode_in_template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Return the ids that the target continues: its chat template with the message as the user's turn.

    A tokenizer without a chat template belongs to a base model, whose prompt is the message itself. Control tokens that
    the message spells out are encoded as text.

    Raises:
        ControlTokenError: the tokenizer cannot encode them as text.
    """
    has_control_tokens = control_pattern(tokenizer).search(message) is not None
    if tokenizer.chat_template is None:
        if has_control_tokens:
            return encode_as_text(tokenizer, message, add_special_tokens=True)
        return list(tokenizer(message)["input_ids"])
    if has_control_tokens:
        return encode_in_template(tokenizer, message)
    turns = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
