"""Where a user's message begins and ends, in templates of the structures that models have."""

import pytest
from tokenizers import normalizers, pre_tokenizers

from drafter.data.prompts import CHATML
from drafter.data.user_turn import begin_user_turn
from drafter.models.loading import load_tokenizer
from tests.chat_target import chat_tokenizer
from tests.tokenizer_kinds import tokenizer_of_kind

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer("assets/tiny-target")


@pytest.mark.parametrize(
    ("template", "prefix", "end", "end_text"),
    [
        (CHATML, "<|im_start|>user\n", "<|im_end|>", ""),
        (LLAMA2, "[INST]", None, "[/INST]"),
        (PLAIN, "### user:\n", None, "### assistant:"),
    ],
)
def test_the_prefix_and_a_message_are_the_ids_of_the_whole_template(tokenizer, template, prefix, end, end_text):
    tokenizer.chat_template = template
    turn = begin_user_turn(tokenizer, [])
    assert tokenizer.decode(turn.prefix_ids) == prefix
    assert turn.end_id == (tokenizer.convert_tokens_to_ids(end) if end else None)
    assert turn.end_text == end_text
    message = "Which array is it?"
    whole = tokenizer.apply_chat_template([{"role": "user", "content": message}], return_dict=False)
    assert whole[: len(turn.prefix_ids)] == turn.prefix_ids
    assert tokenizer.decode(whole[len(turn.prefix_ids) :]).lstrip().startswith(message)


def test_control_tokens_in_a_system_prompt_are_text(tokenizer):
    turn = begin_user_turn(tokenizer, [{"role": "system", "content": "Never write <|im_end|>."}])
    text = tokenizer.decode(turn.prefix_ids)
    assert text == "<|im_start|>system\nNever write <|im_end|>.<|im_end|>\n<|im_start|>user\n"
    assert turn.prefix_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_earlier_turns_are_part_of_the_prefix():
    tokenizer = chat_tokenizer()
    turn = begin_user_turn(
        tokenizer, [{"role": "user", "content": "who ran ?"}, {"role": "assistant", "content": "the cat"}]
    )
    words = "<|user|> who ran ? <|stop|> <|reply|> the cat <|stop|> <|user|>"
    assert turn.prefix_ids == tokenizer.convert_tokens_to_ids(words.split())
    assert turn.end_id == tokenizer.convert_tokens_to_ids("<|stop|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template: a base model cannot write a user's messages"),
        ("{{ messages[0]['content'] }}", "has nothing before it that would tell the target who is speaking"),
        ("<|user|> {{ messages[0]['content'] * 2 }}", "has the message 2 times, not once"),
        ("<|user|> {{ messages[0]['content'][:3] }}", "leaves out a message of the user|0 times, not once"),
        ("<|user|> {{ messages[0]['content']|length }} {{ messages[0]['content'] }}", "changes with the message"),
        ("{{ raise_exception('no') }}", "the chat template refuses the conversation"),
    ],
)
def test_a_template_that_does_not_begin_the_turn_in_one_way_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        begin_user_turn(chat_tokenizer(template), [])


def test_a_tokenizer_that_joins_the_message_with_the_template_is_refused(tokenizer):
    tokenizer.add_tokens("user:What")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>user:{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match=r"its tokenizer joins the message with the text before it, .*start.*user:"):
        begin_user_turn(tokenizer, [])


def test_messages_that_all_begin_with_the_same_token_have_it_in_the_prefix():
    tokenizer = tokenizer_of_kind("unigram", PLAIN, None, "</s>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "isolated")
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    turn = begin_user_turn(tokenizer, [])
    assert tokenizer.convert_ids_to_tokens(turn.prefix_ids) == ["▁"]
