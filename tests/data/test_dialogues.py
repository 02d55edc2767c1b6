"""Conversations are answered turn by turn: what becomes one row, which tokens are predicted, and what is left out."""

import numpy as np
import pytest

from drafter.data.batches import collate, next_tokens, response_sequence, responses_of
from drafter.data.conversations import Conversation, UnusableConversation, read_conversation
from drafter.data.dialogues import Continuation, Dialogue, Turn, answer, begin, choose_points, log_engine, rows_of
from drafter.data.engines import Request
from drafter.data.prompts import encode_conversation
from tests.data.odd_conversations import ANSWER, CALLING, MORE, RESULT, USER
from tests.templates import TEMPLATES, tokenizer_with

LAST = {"role": "user", "content": "Thanks. And for a set?"}
ENDS = {"llama2": "</s>", "llama31": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", "gpt-oss": "<|return|>"}
SAID = ["The first answer.", "The second one.", "And a third."]


def asked(tokenizer, turns, policy="all", only_logged=False):
    conversation = read_conversation({"messages": turns})
    dialogue = Dialogue(conversation, choose_points(conversation, policy, only_logged))
    return Request("c", "chat", "train", 0.5, encode_conversation(tokenizer, dialogue.before()), 0, dialogue)


def end_of(tokenizer, name):
    return tokenizer.convert_tokens_to_ids(ENDS.get(name, "<|im_end|>"))


def says(tokenizer, texts, end):
    """Return an engine whose answers are these texts, by turn."""
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
    return lambda requests: [ids[request.turn] for request in requests]


def answered(tokenizer, engine, request, end, room=500, from_log=False):
    following = Continuation(tokenizer, [end], room, from_log)
    (one,) = answer(engine, [request], following, set(range(len(tokenizer))))
    return one, rows_of(one, [end])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_is_the_templates_own_rendering_and_predicts_exactly_the_answers(name):
    tokenizer = tokenizer_with(name)
    end = end_of(tokenizer, name)
    # Llama 2 and Mistral put a space before an answer, which is its first token.
    texts = [f" {text}" + " " * (name == "llama2") for text in SAID] if name in ("llama2", "mistral") else SAID
    if name == "gpt-oss":
        texts = [f"<|channel|>final<|message|>{text}" for text in SAID]
    one, rows = answered(
        tokenizer, says(tokenizer, texts, end), asked(tokenizer, [USER, ANSWER, MORE, ANSWER, LAST]), end
    )
    if name == "gpt-oss":  # an answer in channels cannot be put back into the template as content
        assert one.left_out == {"after an answer that contains control tokens": 2}
        return
    assert not one.left_out
    given = [USER, {"role": "assistant", "content": SAID[0]}, MORE, {"role": "assistant", "content": SAID[1]}, LAST]
    full = encode_conversation(tokenizer, Conversation([*given, {"role": "assistant", "content": SAID[2]}]), False)
    (row,) = rows
    sequence = response_sequence(
        {key: np.array(row[key]) for key in ("prompt_ids", "response_ids", "turns")} | {"temperature": 0.5}
    )
    assert sequence.ids_T.tolist() == full[: len(sequence.ids_T)]  # the template may write a line break behind it
    batch = collate([sequence])
    predicted = next_tokens(batch)[batch.target_mask_BT].tolist()
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
    assert predicted == [token for ids in expected for token in ids] == row["response_ids"]
    assert responses_of(batch.target_mask_BT)[1].tolist() == [len(ids) for ids in expected]


def test_a_template_that_rewrites_earlier_answers_gives_a_row_per_turn():
    tokenizer = tokenizer_with("qwen3")
    end = end_of(tokenizer, "qwen3")
    texts = ["<think>\nHm.\n</think>\n\nIt counts.", "<think>\nSo.\n</think>\n\nIts keys."]
    one, rows = answered(tokenizer, says(tokenizer, texts, end), asked(tokenizer, [USER, ANSWER, MORE]), end)
    assert [row["id"] for row in rows] == ["c", "c#2"]
    assert not one.left_out
    second = tokenizer.decode(rows[1]["prompt_ids"])
    assert "Hm." not in second  # served as the template serves it: without the thinking of earlier answers
    assert "It counts." in second
    assert [tokenizer.decode(row["response_ids"]) for row in rows] == [f"{text}<|im_end|>" for text in texts]


def test_an_answer_that_is_encoded_to_other_tokens_than_generated_begins_a_row():
    tokenizer = tokenizer_with("chatml (SmolLM2, Qwen2.5)")
    end = end_of(tokenizer, "")
    letters = [token for letter in "It counts." for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert letters != tokenizer("It counts.", add_special_tokens=False)["input_ids"]
    _, rows = answered(tokenizer, lambda requests: [[*letters, end]], asked(tokenizer, [USER, ANSWER, MORE]), end)
    assert len(rows) == 2
    assert rows[0]["response_ids"] == rows[1]["response_ids"] == [*letters, end]


@pytest.mark.parametrize(
    ("policy", "count", "context"), [("all", 3, 0), ("first", 1, 0), ("last", 1, "It counts the items.")]
)
def test_the_turns_that_are_answered_are_chosen(policy, count, context):
    tokenizer = tokenizer_with("gemma")
    end = end_of(tokenizer, "gemma")
    request = asked(tokenizer, [USER, ANSWER, MORE, ANSWER, LAST], policy)
    one, (row,) = answered(tokenizer, says(tokenizer, SAID, end), request, end)
    assert len(one.turns) == count == len(row["turns"]) // 2
    if context:
        assert context in tokenizer.decode(row["prompt_ids"])


@pytest.mark.parametrize(
    ("texts", "room", "reason"),
    [
        (["no end"], 500, "after an answer that was cut off"),
        ([f"{SAID[0]}<|im_start|>", "x"], 500, "after an answer that contains control tokens"),
        ([SAID[0], "x"], 24, "too long for the context"),
        ([SAID[0], ""], 500, "an empty response"),
    ],
)
def test_turns_that_cannot_be_answered_are_left_out_and_counted(texts, room, reason):
    tokenizer = tokenizer_with("chatml (SmolLM2, Qwen2.5)")
    end = end_of(tokenizer, "")
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + [end] * (text not in ("", "no end")) for text in texts
    ]
    one, rows = answered(
        tokenizer, lambda requests: [ids[request.turn] for request in requests],
        asked(tokenizer, [USER, ANSWER, MORE, ANSWER, LAST]), end, room,
    )  # fmt: skip
    assert one.left_out == {reason: 2}
    assert [row["response_ids"] for row in rows] == [ids[0]]


def test_a_logged_call_to_which_a_tool_replied_stays_in_the_conversation():
    tokenizer = tokenizer_with("llama31")
    end = end_of(tokenizer, "llama31")
    _, rows = answered(tokenizer, says(tokenizer, SAID, end), asked(tokenizer, [USER, CALLING, RESULT]), end)
    assert [tokenizer.decode(row["response_ids"]) for row in rows] == [f"{text}<|eot_id|>" for text in SAID[:2]]
    assert 'look_up({"name": "len"})' in tokenizer.decode(rows[1]["prompt_ids"])
    assert SAID[0] not in tokenizer.decode(rows[1]["prompt_ids"])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "gpt-oss"])
def test_logged_answers_are_taken_as_they_are(name):
    tokenizer = tokenizer_with(name)
    end = end_of(tokenizer, name)
    turns = [USER, ANSWER, MORE, {"role": "assistant", "content": "The keys."}, LAST]
    request = asked(tokenizer, turns, only_logged=True)
    _, (row,) = answered(tokenizer, log_engine(tokenizer, [end]), request, end, from_log=True)
    full = encode_conversation(tokenizer, Conversation(turns[:4]), False)
    ids = response_sequence(
        {key: np.array(row[key]) for key in ("prompt_ids", "response_ids", "turns")} | {"temperature": 1.0}
    ).ids_T
    assert ids.tolist() == full[: len(ids)]
    found = tokenizer.decode(row["response_ids"]).replace(tokenizer.decode([end]), "|").split("|")
    assert [text.strip() for text in found] == ["It counts the items.", "The keys.", ""]


def test_a_logged_answer_whose_text_does_not_come_back_is_left_out():
    tokenizer = tokenizer_with("qwen3")
    end = end_of(tokenizer, "qwen3")
    hidden = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt counts."}
    tokenizer.chat_template = tokenizer.chat_template.replace("loop.index0 > last.user", "false")
    one, rows = answered(
        tokenizer, log_engine(tokenizer, [end]), asked(tokenizer, [USER, hidden], only_logged=True), end
    )
    assert one.failure == "a logged answer whose text does not come back from its token ids"
    assert rows == []


def test_answers_that_are_not_logged_are_generated_and_no_log_has_them():
    tokenizer = tokenizer_with("chatml (SmolLM2, Qwen2.5)")
    end, conversation = end_of(tokenizer, ""), read_conversation({"turns": ["Hi.", "Why?", "So?"]})
    request = asked(tokenizer, conversation.messages)
    one, _ = answered(tokenizer, says(tokenizer, SAID, end), request, end)
    given = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": SAID[0]}]
    given += [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": SAID[1]}]
    given += [{"role": "user", "content": "So?"}]
    expected = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=False)
    assert one.turns[2].prompt_ids == expected
    assert choose_points(conversation, "all", only_logged=True) == ()
    half = Conversation([USER, ANSWER, *conversation.messages])
    assert choose_points(half, "all", only_logged=True) == (1,)
    with pytest.raises(UnusableConversation, match="an earlier answer is not logged"):
        begin(tokenizer, conversation, choose_points(conversation, "last"))
    assert begin(tokenizer, conversation, choose_points(conversation, "first")).dialogue.before().asked() == ["Hi."]


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ([5], [8, 5, 5], True),  # Qwen3: the answer begins with <think>
        ([5, 8], [5, 5], True),  # R1: the prompt ends with it
        ([5], [8, 5, 9, 5], False),  # cut in the answer
        ([5, 8, 9], [5, 5], False),  # thinking is switched off
        ([5], [5, 5], False),
        ([5], [8, 5, 7], False),  # ended
    ],
)
def test_an_answer_that_is_cut_in_its_thinking_is_recognised(prompt, response, expected):
    following = Continuation(None, [7], 100, thinking=(8, 9))
    assert following.is_cut_in_thinking(Turn(prompt, response)) == expected
    assert not Continuation(None, [7], 100).is_cut_in_thinking(Turn(prompt, response))
