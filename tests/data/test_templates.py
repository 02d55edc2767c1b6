import datetime

import pytest

from drafter.data.templates import AbsentField, absent, matches, parse, render


def turn(content, role="user"):
    return {"messages": [{"role": role, "content": content}]}


FIRST = "{messages[0][content]}"


def test_a_template_is_filled_from_the_row_and_stripped():
    assert render("Question: {q}\n\n{context}", {"q": "why?", "context": ""}) == "Question: why?"


def test_a_template_reaches_into_a_nested_field():
    row = {"translation": {"de": "Hallo", "en": "Hello"}}
    assert render("Translate:\n\n{translation[de]}", row) == "Translate:\n\nHallo"
    assert render(FIRST, turn("Hello?")) == "Hello?"
    assert render("{messages[-1][content]}", turn("Hello?")) == "Hello?"


def test_braces_in_a_value_are_left_alone():
    assert render("{text}", {"text": "a {dict} and {0}"}) == "a {dict} and {0}"


def test_doubled_braces_are_literal():
    assert render('Answer like {{"x": 1}}. {prompt}', {"prompt": "Hello?"}) == 'Answer like {"x": 1}. Hello?'


def test_a_field_may_have_a_name_of_several_words_and_a_format():
    row = {"Full Name": "Ada", "meta.score": 0.5}
    assert render("{Full Name} {meta.score:.2f}", row) == "Ada 0.50"


@pytest.mark.parametrize(
    "template",
    ['Answer like {"x": 1}. {prompt}', "a {prompt", "a } {prompt}", "{ }", "{}", "no field", "{prompt!r}"],
)
def test_the_error_for_stray_braces_says_how_to_write_them(template):
    with pytest.raises(ValueError, match=r"a literal brace is doubled: \{\{ and \}\}") as refusal:
        parse(template)
    assert repr(template) in str(refusal.value)


@pytest.mark.parametrize("template", ["{article}", "{translation[fr]}"])
def test_the_error_for_a_missing_field_has_the_template_and_the_fields_of_the_row(template):
    row = {"text": "x", "translation": {"de": "Hallo"}}
    with pytest.raises(KeyError) as refusal:
        render(template, row)
    message = str(refusal.value)
    assert ("article" in message) or ("fr" in message)
    assert template in message
    assert "['text', 'translation']" in message
    assert absent(template, row) == [template[1:-1]]


def test_a_field_that_other_rows_have_is_empty_where_it_is_missing():
    assert render("{a} and {b}", {"a": "x"}, known={"b"}) == "x and"
    with pytest.raises(AbsentField):
        render("{a} and {b}", {"a": "x"}, known={"a"})


@pytest.mark.parametrize("empty", [None, "", " ", float("nan")])
def test_null_is_empty_and_a_text_with_only_empty_fields_is_empty(empty):
    assert render("{a} Input: {b}", {"a": "Say it.", "b": empty}) == "Say it. Input:"
    assert render("Summarise:\n\n{a}", {"a": empty}) == ""
    assert render(FIRST, turn(empty)) == ""
    assert render(FIRST, {"messages": None}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("2024-01-05", "2024-01-05"),
        ("007", "007"),
        ("NA", "NA"),
        (7, "7"),
        (0, "0"),
        (False, "False"),
        (datetime.date(2024, 1, 5), "2024-01-05"),
    ],
)
def test_values_stay_as_they_are_written(value, text):
    assert render("{a}", {"a": value}) == text


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            FIRST,
            turn([{"type": "text", "text": "Hello?"}]),
            r"\{messages\[0\]\[content\]\} is a list .* expected",
        ),
        ("{a}", {"a": {"b": 1}}, r"\{a\} is a dict"),
        ("{a}", {"a": []}, r"\{a\} is a list"),
        ("{a}", {"a": b"x"}, r"\{a\} is a bytes"),
        ("{a}", {"a": object()}, r"\{a\} is a object"),
        (FIRST, {"messages": []}, r"needs item \[0\] of a list of 0 items"),
        ("{messages[2][content]}", turn("Hello?"), r"needs item \[2\] of a list of 1 items"),
        ("{a[b]}", {"a": "text"}, r"needs \[b\] of a str \(text\)"),
        ("{a}", {"a": "\ud83d"}, "half of a surrogate pair"),
        (FIRST, turn("Be brief.", "system"), "'role' is 'system', not the user's"),
        ("{c[0][value]}", {"c": [{"from": "gpt", "value": "I am."}]}, "'from' is 'gpt', not the user's"),
    ],
)
def test_the_error_for_a_value_that_is_not_the_users_text_names_its_field(template, row, message):
    with pytest.raises(ValueError, match=message):
        render(template, row)


@pytest.mark.parametrize("role", ["user", "human", "prompter"])
def test_users_have_several_names_and_a_reference_may_be_by_any_speaker(role):
    assert render(FIRST, turn("Hello?", role)) == "Hello?"
    assert render(FIRST, turn("Hi.", "assistant"), speakers=None) == "Hi."


def test_a_role_of_the_row_itself_is_an_ordinary_field():
    assert render("{text}", {"text": "Dear Bob", "role": "engineer", "from": "Ada"}) == "Dear Bob"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, True),
        ({"role": "prompter"}, True),
        ({"role": "prompter", "parent_id": None}, True),
        ({"role": "assistant"}, False),
        ({"role": "prompter", "lang": "de"}, False),
        ({"absent": "x"}, False),
        ({"cell": None, "number": 3}, True),
        ({"number": 4}, False),
        ({"number": None}, False),
    ],
)
def test_a_row_matches_where_every_field_has_its_value(where, expected):
    row = {
        "role": "prompter",
        "parent_id": None,
        "lang": "en",
        "cell": "",
        "number": "3",
    }  # the last two as in CSV files
    assert matches(row, where) is expected
