import pytest
from tokenizers import processors

from drafter.data.prompts import check_embedding, encode_prompt, encode_prompts
from experiments.tiny_target import train_tokenizer

LINES = ["What does `numpy.sum` do?", "It adds the elements of an array.", "user assistant\n"]


def tokenizer_of(lines, vocab_size=300):
    return train_tokenizer(lines, vocab_size, 512)


@pytest.fixture
def tokenizer():
    return tokenizer_of(LINES)


@pytest.fixture
def base_tokenizer():
    tokenizer = tokenizer_of(LINES)
    tokenizer.chat_template = None
    return tokenizer


def test_a_message_is_rendered_as_chatml_up_to_the_assistants_turn(tokenizer):
    ids = encode_prompt(tokenizer, "What does `numpy.sum` do?")
    expected = "<|im_start|>user\nWhat does `numpy.sum` do?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == expected


def test_the_chat_markers_are_single_special_tokens(tokenizer):
    ids = encode_prompt(tokenizer, "hi")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids[0] == start
    assert (ids.count(start), ids.count(end)) == (2, 1)
    assert all(type(token) is int for token in ids)


def test_the_prompt_has_no_end_of_text_before_the_template(tokenizer):
    assert tokenizer.bos_token_id not in encode_prompt(tokenizer, "hi")


def test_without_a_template_the_prompt_is_the_message_itself(base_tokenizer):
    ids = encode_prompt(base_tokenizer, "It adds.")
    assert ids == base_tokenizer("It adds.")["input_ids"]
    assert base_tokenizer.decode(ids) == "It adds."


def test_every_message_is_encoded_in_order(tokenizer):
    prompts = encode_prompts(tokenizer, LINES, max_new_tokens=8, context=512)
    assert prompts == [encode_prompt(tokenizer, line) for line in LINES]


def test_a_prompt_that_just_fits_is_accepted_and_one_token_more_is_refused(tokenizer):
    length = len(encode_prompt(tokenizer, LINES[1]))
    assert len(encode_prompts(tokenizer, [LINES[1]], max_new_tokens=8, context=length + 8)[0]) == length
    with pytest.raises(ValueError, match="exceeds"):
        encode_prompts(tokenizer, [LINES[1]], max_new_tokens=9, context=length + 8)


def test_the_error_for_a_long_prompt_has_its_length_the_context_and_its_beginning(tokenizer):
    messages = ["short", "It adds the elements of an array. " * 40, "short too"]
    length = len(encode_prompt(tokenizer, messages[1]))
    with pytest.raises(ValueError, match="exceeds") as refusal:
        encode_prompts(tokenizer, messages, max_new_tokens=16, context=128)
    for part in (f"prompt 1 has {length} tokens", "max_new_tokens=16", "context of 128 tokens", repr(messages[1][:80])):
        assert part in str(refusal.value)
    assert messages[1][:90] not in str(refusal.value)


def test_no_messages_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no prompts"):
        encode_prompts(tokenizer, [], max_new_tokens=8, context=512)


def test_an_id_that_is_never_produced_needs_no_row_in_the_embedding(tokenizer):
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    check_embedding(tokenizer, rows, "it")
    assert tokenizer.pad_token_id == rows


@pytest.mark.parametrize("written", ["by a text", "by the template", "at the end", "by the tokenizer"])
def test_an_id_that_is_produced_needs_a_row_in_the_embedding(tokenizer, written):
    rows = len(tokenizer)
    if written == "by a text":
        tokenizer.add_tokens(["<think>"])
    else:
        tokenizer.add_special_tokens({"eos_token" if written == "at the end" else "bos_token": "<think>"})
    if written == "by the template":
        tokenizer.chat_template = "<think>" + tokenizer.chat_template
    if written == "by the tokenizer":
        tokenizer.chat_template = None
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<think> $A", special_tokens=[("<think>", rows)]
        )
    check_embedding(tokenizer, rows + 1, "it")
    with pytest.raises(
        ValueError, match=f"of it writes '<think>' as id {rows}, and .* {rows} rows: resize it to {rows + 1},"
    ):
        check_embedding(tokenizer, rows, "it")
