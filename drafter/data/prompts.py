"""User messages -> token ids in the target's own chat template.

The response mask of everything downstream comes from the length of these ids, never from tokenizing text again:
a response's tokens are the ones that the target produced after them.
"""

import hashlib

from transformers import PreTrainedTokenizerBase

from drafter.data.control_tokens import NEUTRAL, control_ids, control_pattern, encode_as_text, encode_in_template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """The ids that the target continues: its chat template with the message as the user's turn.

    A tokenizer without a chat template belongs to a base model; its prompt is the message itself. Control tokens that
    the message writes out are text.

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
    """The ids of each text by itself, with nothing added; control tokens that a text writes out are text.

    Raises:
        ControlTokenError: the tokenizer cannot encode them as text.
    """
    pattern = control_pattern(tokenizer)
    if not any(map(pattern.search, texts)):
        return _encoded(tokenizer, texts)
    plain = iter(_encoded(tokenizer, [text for text in texts if not pattern.search(text)]))
    return [encode_as_text(tokenizer, text) if pattern.search(text) else next(plain) for text in texts]


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, messages: list[str], max_new_tokens: int, context: int
) -> list[list[int]]:
    """`encode_prompt` of each message, checked before any compute is spent.

    Raises:
        ValueError: there are no messages; or prompt + max_new_tokens exceeds the model's context.
    """
    if not messages:
        raise ValueError("there are no prompts: the instruction or task file is empty")
    prompts = [encode_prompt(tokenizer, message) for message in messages]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) + max_new_tokens > context:
        raise ValueError(
            f"prompt {longest} has {len(prompts[longest])} tokens; with max_new_tokens={max_new_tokens} it exceeds the "
            f"context of {context} tokens. Shorten or drop it, or lower max_new_tokens. It begins: "
            f"{messages[longest][:80]!r}"
        )
    return prompts


def check_embedding(tokenizer: PreTrainedTokenizerBase, rows: int, model: str) -> None:
    """Refuse a tokenizer that writes ids for which the model's embedding has no row.

    A control token that neither the tokenizer nor its chat template writes, such as one for padding, is never fed to
    the model, and may lie beyond.

    Raises:
        ValueError: names the first such id, and what to change.
    """
    of_text = set(tokenizer.get_vocab().values()) - control_ids(tokenizer)
    written = of_text | set(encode_prompt(tokenizer, NEUTRAL)) | {tokenizer.eos_token_id}
    beyond = [token for token in written if token is not None and token >= rows]
    if beyond:
        first = min(beyond)
        raise ValueError(
            f"the tokenizer of {model} writes {tokenizer.convert_ids_to_tokens(first)!r} as id {first}, and the "
            f"model's embedding has {rows} rows: resize it to {max(beyond) + 1}, or use the tokenizer that the model "
            f"was trained with"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits that change with any id -> piece, or with the chat template."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr((pieces, tokenizer.chat_template)).encode()).hexdigest()[:16]
