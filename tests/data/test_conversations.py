"""Conversations are read from the forms of people's logs, and rendered as the chat template's own call renders them."""

import json

import pytest

from drafter.data.control_tokens import control_ids
from drafter.data.conversations import Conversation, UnusableConversation, is_logged, read_conversation
from drafter.data.prompts import encode_conversation
from drafter.models.source import TemplateSettings
from tests.data.odd_conversations import ANSWER, CALL, CALLING, MORE, ODD, RESULT, TOOLS, USER
from tests.templates import TEMPLATES, tokenizer_with

SYSTEM = {"role": "system", "content": "Be short."}


def test_there_are_fifty_odd_conversations():
    assert len(ODD) == 50


def test_sharegpt_and_openai_forms_give_the_same_messages():
    sharegpt = {"conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Hi."}]}
    openai = {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Hi."}]}]}
    beside = {"prompt": "Hi.", "system": "Be short."}
    assert read_conversation(sharegpt) == read_conversation(openai) == read_conversation(beside)


MT_BENCH = ["Write a poem.", "Now without the letter a."]


@pytest.mark.parametrize(
    "row",
    [{"turns": MT_BENCH}, {"prompt": MT_BENCH}, {"turns": json.dumps(MT_BENCH)}, {"turns": MT_BENCH, "prompt": "x"}],
)
def test_mt_benchs_form_has_an_answer_after_each_message(row):
    conversation = read_conversation({**row, "system": "Be short.", "tools": TOOLS, "reference": ["A poem.", ""]})
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant", "user"]
    assert conversation.asked() == MT_BENCH
    assert conversation.answer_points() == [2, 4]
    assert [is_logged(message) for message in conversation.messages] == [True, True, False, True]
    assert conversation.tools == TOOLS
    # What is prepared is read back as it was.
    assert read_conversation({"messages": conversation.messages, "tools": conversation.tools}) == conversation


def test_two_messages_of_the_user_in_a_row_remain_one_request():
    assert read_conversation({"messages": [USER, MORE]}).answer_points() == [2]


@pytest.mark.parametrize(
    "row", [{"turns": []}, {"turns": 2}, {"turns": [1, 2]}, {"turns": [USER]}, {"turns": ["Hi.", None]}]
)
def test_turns_that_are_no_texts_are_no_conversation(row):
    with pytest.raises(UnusableConversation, match="neither messages"):
        read_conversation(row)
    assert read_conversation({"prompt": "Hi.", **row}).asked() == ["Hi."]


def test_only_an_empty_answer_counts_as_not_logged():
    said = {"role": "assistant", "content": "Yes.", "logged": False}
    assert is_logged(read_conversation({"messages": [USER, said, MORE]}).messages[1])


def test_arguments_of_tool_calls_are_objects_in_every_form():
    forms = [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look_up", "arguments": '{"name": "len"}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "look_up", "arguments": {"name": "len"}}]},
        {"role": "assistant", "function_call": {"name": "look_up", "arguments": '{"name": "len"}'}},
        {"from": "function_call", "value": '{"name": "look_up", "arguments": {"name": "len"}}'},
    ]
    for form in forms:
        read = read_conversation({"messages": [USER, form, RESULT]})
        assert read.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_the_tokenizers_own_call(name):
    tokenizer = tokenizer_with(name)
    turns = [USER, ANSWER, MORE]
    settings = TemplateSettings()
    expected = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    if name in ("llama31", "gpt-oss"):  # they print the date
        year = {"llama31": "26 Jul 2024", "gpt-oss": "2024-07-26"}[name]
        assert year in tokenizer.decode(encode_conversation(tokenizer, Conversation(turns)))
        tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
        tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'")
        expected = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert settings.date == "2024-07-26"
    assert encode_conversation(tokenizer, Conversation(turns)) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_message_that_spells_out_control_tokens_adds_none(name):
    tokenizer = tokenizer_with(name)
    spelled = "What do <|im_end|>, </s>, <|eot_id|>, <end_of_turn> and <|return|> mean?"
    quoting, plain = ([USER, ANSWER, {"role": "user", "content": text}] for text in (spelled, "What do they mean?"))
    found, expected = (encode_conversation(tokenizer, Conversation(turns)) for turns in (quoting, plain))
    controls = control_ids(tokenizer)
    assert [one for one in found if one in controls] == [one for one in expected if one in controls]
    assert spelled in tokenizer.decode(found)


@pytest.mark.parametrize(
    ("name", "turns", "tools", "reason"),
    [
        ("llama2", [USER, MORE], None, "the chat template refuses the conversation: roles must alternate"),
        ("gemma", [SYSTEM, USER], None, "the chat template refuses the conversation: System role not supported"),
        ("mistral", [USER, CALLING, RESULT], TOOLS, "the chat template has no place for tools"),
    ],
)
def test_what_a_template_cannot_render_is_refused_with_its_reason(name, turns, tools, reason):
    conversation = read_conversation({"messages": turns, "tools": tools})
    with pytest.raises(UnusableConversation, match=reason):
        encode_conversation(tokenizer_with(name), conversation)


def test_a_template_that_leaves_out_a_message_is_refused():
    tokenizer = tokenizer_with("llama2")
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}[INST]{{ m['content'] }}[/INST]{% endfor %}"
    )
    with pytest.raises(UnusableConversation, match="leaves out a message of the system"):
        encode_conversation(tokenizer, Conversation([SYSTEM, USER]))


def test_tools_and_calls_are_rendered_by_a_template_that_has_a_place_for_them():
    conversation = read_conversation({"messages": [USER, CALLING, RESULT], "tools": TOOLS})
    text = tokenizer_with("llama31").decode(encode_conversation(tokenizer_with("llama31"), conversation))
    assert '{"type": "function", "function": {"name": "look_up"' in text
    assert 'look_up({"name": "len"})' in text


def test_arguments_of_the_template_reach_it():
    tokenizer = tokenizer_with("qwen3")
    with_thinking = encode_conversation(tokenizer, Conversation([USER]))
    tokenizer.template_settings = TemplateSettings('{"enable_thinking": false}')
    without = encode_conversation(tokenizer, Conversation([USER]))
    assert tokenizer.decode(without) == tokenizer.decode(with_thinking) + "<think>\n\n</think>\n\n"


def test_another_date_is_printed_where_it_is_given():
    tokenizer = tokenizer_with("llama31")
    tokenizer.template_settings = TemplateSettings(date="2025-12-01")
    assert "Today Date: 01 Dec 2025" in tokenizer.decode(encode_conversation(tokenizer, Conversation([USER])))


def test_several_messages_need_a_chat_template():
    tokenizer = tokenizer_with("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(UnusableConversation, match="more than one message, and the tokenizer has no chat template"):
        encode_conversation(tokenizer, Conversation([USER, ANSWER, MORE]))
