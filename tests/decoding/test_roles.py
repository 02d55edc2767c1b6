"""Roles are read from the markers that a target writes: tokens where the vocabulary has them, else text."""

from itertools import groupby

import pytest
from transformers import AddedToken

from drafter.decoding.roles import ANSWER, THINKING, TOOL_CALL, RoleReader
from drafter.models.loading import load_tokenizer

QWEN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
GPT_OSS = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"]
OTHERS = ["[THINK]", "[/THINK]", "[TOOL_CALLS]", "<|python_tag|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"]
CALL = '{"name": "look_up"}'


def tokenizer_that_has(*markers):
    tokenizer = load_tokenizer("assets/tiny-target")
    tokenizer.add_tokens([AddedToken(text, special=text not in QWEN, normalized=False) for text in markers])
    return tokenizer


def spans(tokenizer, text, prompt="<|im_start|>assistant\n"):
    """Return the text of each span with its role."""
    asked, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|return|>", "<|call|>"])
    roles = RoleReader(tokenizer, stops).roles(asked, ids)
    assert len(roles) == len(ids)
    grouped = groupby(zip(roles, ids, strict=True), key=lambda pair: pair[0])
    return [(role, tokenizer.decode([token for _, token in pairs])) for role, pairs in grouped]


def test_thinking_ends_after_its_marker_and_the_white_space_behind_it():
    text = "<think>\nHm, why?\n</think>\n\nIt counts.<|im_end|>"
    found = spans(tokenizer_that_has(*QWEN), text)
    assert found == [(THINKING, "<think>\nHm, why?\n</think>\n\n"), (ANSWER, "It counts.<|im_end|>")]


@pytest.mark.parametrize("prompt", ["<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>"])
def test_the_generation_prompt_may_have_opened_the_thinking(prompt):
    tokenizer = tokenizer_that_has(*QWEN)
    found = spans(tokenizer, "Hm.\n</think>\n\nIt counts.", prompt)
    assert found == [(THINKING, "Hm.\n</think>\n\n"), (ANSWER, "It counts.")]
    assert spans(tokenizer, "Hm, cut off", prompt) == [(THINKING, "Hm, cut off")]


def test_thinking_that_the_generation_prompt_has_closed_is_over():
    prompt = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert spans(tokenizer_that_has(*QWEN), "It counts.", prompt) == [(ANSWER, "It counts.")]


def test_a_reply_that_is_a_call_has_no_answer_and_a_marker_inside_of_a_span_is_text():
    tokenizer = tokenizer_that_has(*QWEN)
    call = f"<tool_call>\n{CALL}\n</tool_call>"
    thinking = "<think>I may write <tool_call> now.</think>\n"
    found = spans(tokenizer, f"{thinking}{call}\n{call}<|im_end|>")
    assert found == [(THINKING, thinking), (TOOL_CALL, f"{call}\n{call}<|im_end|>")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Wait.[TOOL_CALLS] [{CALL}]", [(ANSWER, "Wait."), (TOOL_CALL, f"[TOOL_CALLS] [{CALL}]")]),
        (f"<|python_tag|>{CALL}", [(TOOL_CALL, f"<|python_tag|>{CALL}")]),
        ("[THINK]Hm.[/THINK]Yes.", [(THINKING, "[THINK]Hm.[/THINK]"), (ANSWER, "Yes.")]),
        (
            "A <｜tool▁calls▁begin｜>f<｜tool▁calls▁end｜>B",
            [(ANSWER, "A "), (TOOL_CALL, "<｜tool▁calls▁begin｜>f<｜tool▁calls▁end｜>"), (ANSWER, "B")],
        ),
        (CALL, [(ANSWER, CALL)]),  # nothing shows that this is a call
    ],
)
def test_the_markers_of_other_models(text, expected):
    assert spans(tokenizer_that_has(*OTHERS), text) == expected


def test_the_channels_of_gpt_oss():
    analysis = "<|channel|>analysis<|message|>Hm.<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>It counts.<|return|>"
    call = f"<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{CALL}<|call|>"
    other = call.replace(" to=functions.f", "").replace("assistant", "assistant to=functions.f")
    preamble = "<|start|>assistant<|channel|>commentary<|message|>I look it up.<|end|>"
    tokenizer = tokenizer_that_has(*GPT_OSS)
    prompt = "<|start|>assistant"
    assert spans(tokenizer, analysis + final, prompt) == [(THINKING, analysis), (ANSWER, final)]
    for form in (call, other):
        found = spans(tokenizer, analysis + preamble + form, prompt)
        assert found == [(THINKING, analysis), (ANSWER, preamble), (TOOL_CALL, form)]
    assert spans(tokenizer, "<|channel|>analysis<|mess", prompt)[0][0] == ANSWER  # cut off before the header ended


def test_a_text_that_spells_a_marker_out_is_none_if_the_vocabulary_has_the_token():
    tokenizer = tokenizer_that_has(*QWEN)
    ids = [
        token for letter in "<think>Hm.</think>" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]
    ]
    assert set(RoleReader(tokenizer).roles([], ids)) == {ANSWER}


def test_a_marker_that_is_text_opens_a_span_at_the_beginning_of_a_line_only():
    tokenizer = load_tokenizer("assets/tiny-target")
    assert len(tokenizer("<think>", add_special_tokens=False)["input_ids"]) > 1
    found = spans(tokenizer, "<think>Hm.</think> Write <think> first.")
    assert "".join(text for _, text in found) == "<think>Hm.</think> Write <think> first."
    assert [role for role, _ in found] == [THINKING, ANSWER]
    assert found[0][1].startswith("<think>Hm.</think>")


def test_no_token_has_no_role():
    assert RoleReader(tokenizer_that_has()).roles([1], []) == []
