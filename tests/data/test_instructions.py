import pytest

from drafter.data.corpus import Doc
from drafter.data.instructions import ANSWER_CHARACTERS, BODY_CHARACTERS, IN_DOMAIN, OUT_OF_DOMAIN, derive

LEAD = "Compute the area of a rectangle in square units.\n\nNegative lengths are taken to be zero by this function."

GOOGLE = (
    LEAD
    + """

Args:
    width (float, optional): The length of the horizontal side,
        measured in metres.

Returns:
    The area.
"""
)

NUMPY = (
    LEAD
    + """

Parameters
----------
width : float, optional
    The length of the horizontal side,
    measured in metres.

Returns
-------
float
    The area.
"""
)

SPHINX = (
    LEAD
    + """

:param float width: The length of the horizontal side,
    measured in metres.
:return: the area
"""
)

CODE = "\n".join(
    ["def area(width, height):", *(f"    step_{i} = width * height + {i}" for i in range(5)), "    return 0"]
)


def doc(text, name="geometry.shapes.area", signature="(width, height)", code=""):
    return Doc(name, signature, text, code)


def by_kind(given):
    kinds = {}
    for row in derive(given):
        kinds.setdefault(row.kind, []).append(row)
    return kinds


@pytest.mark.parametrize("text", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_a_parameter_of_each_docstring_style_becomes_a_question(text):
    rows = by_kind(doc(text))["open_ended"]
    assert len(rows) == 2
    assert "`width`" in rows[1].prompt
    assert "`geometry.shapes.area`" in rows[1].prompt
    assert rows[1].reference == "The length of the horizontal side, measured in metres."


@pytest.mark.parametrize("text", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_the_explanation_is_the_prose_before_the_first_section(text):
    rows = by_kind(doc(text))["open_ended"]
    assert "`geometry.shapes.area(width, height)`" in rows[0].prompt
    assert rows[0].reference == " ".join(LEAD.split())


def test_the_summary_lists_all_parameters_and_a_question_asks_about_one():
    text = LEAD + "\n\nArgs:\n    width: The horizontal side, in metres.\n    height: The vertical side, in metres.\n"
    kinds = by_kind(doc(text))
    assert kinds["summary"][0].reference.endswith("- It takes `width`, `height`.")
    meanings = {"width": "The horizontal side, in metres.", "height": "The vertical side, in metres."}
    question = kinds["open_ended"][1]
    assert [meanings[name] for name in meanings if f"`{name}`" in question.prompt] == [question.reference]


def test_a_full_docstring_gives_the_four_kinds():
    kinds = by_kind(doc(GOOGLE, code=CODE))
    assert set(kinds) == {*IN_DOMAIN, OUT_OF_DOMAIN}
    assert OUT_OF_DOMAIN not in IN_DOMAIN
    assert all(row.name == "geometry.shapes.area" for rows in kinds.values() for row in rows)
    assert all(row.prompt and row.reference for rows in kinds.values() for row in rows)


def test_the_one_sentence_question_shows_the_rest_and_not_the_answer():
    (row,) = by_kind(doc(GOOGLE))["one_sentence"]
    assert row.reference == "Compute the area of a rectangle in square units."
    assert row.reference not in row.prompt
    assert "Negative lengths are taken to be zero" in row.prompt


def test_the_summary_has_one_point_per_paragraph():
    (row,) = by_kind(doc(GOOGLE))["summary"]
    assert row.reference.split("\n") == [
        "- Compute the area of a rectangle in square units.",
        "- Negative lengths are taken to be zero by this function.",
        "- It takes `width`.",
    ]
    assert row.prompt.endswith(GOOGLE.strip())


def test_the_code_question_and_its_answer_are_the_two_halves_of_the_code():
    (row,) = by_kind(doc(GOOGLE, code=CODE))[OUT_OF_DOMAIN]
    heading, _, given = row.prompt.partition("\n\n")
    assert heading == "Continue this Python code."
    assert given + "\n" + row.reference == CODE


@pytest.mark.parametrize(
    ("text", "name"),
    [(GOOGLE, "geometry"), ("Too short here.", "geometry.area"), ("- a list\n- of points only", "geometry.area")],
    ids=["top-level-module", "short", "no-prose"],
)
def test_a_doc_without_prose_or_a_qualified_name_gives_nothing(text, name):
    assert list(derive(doc(text, name=name, code=CODE))) == []


def test_a_doc_of_one_plain_sentence_gives_an_explanation_alone():
    rows = list(derive(doc("Compute the area of a rectangle in square units.")))
    assert [row.kind for row in rows] == ["open_ended"]


def test_a_parameter_without_a_meaning_worth_asking_about_is_left_out():
    kinds = by_kind(doc(LEAD + "\n\nArgs:\n    width: see above\n"))
    assert len(kinds["open_ended"]) == 1
    assert all("It takes" not in row.reference for row in kinds.get("summary", []))


def test_a_long_reference_ends_with_a_complete_sentence():
    sentences = [f"Sentence number {i} says something about the area of a rectangle." for i in range(20)]
    text = " ".join(sentences)
    reference = by_kind(doc(text))["open_ended"][0].reference
    whole = [" ".join(sentences[:i]) for i in range(1, 21)]
    assert reference in whole
    assert len(reference) <= ANSWER_CHARACTERS
    # With one more sentence it would be too long.
    assert len(whole[whole.index(reference) + 1]) > ANSWER_CHARACTERS


def test_an_abbreviation_or_a_decimal_does_not_end_a_sentence():
    text = "Compute e.g. the area, 1.5 times as large, of a rectangle. It is in square units."
    sentence = by_kind(doc(text + "\n\n" + "More about it. " * 10))["one_sentence"][0].reference
    assert sentence == "Compute e.g. the area, 1.5 times as large, of a rectangle."


def test_a_single_very_long_sentence_is_cut():
    reference = by_kind(doc("word " * 400))["open_ended"][0].reference
    assert len(reference) == 2 * ANSWER_CHARACTERS


def test_prompts_show_at_most_the_body_limit_of_a_long_docstring():
    kinds = by_kind(doc("\n\n".join([LEAD] * 20), code="x" * 4000))
    for kind in ("one_sentence", "summary", "code"):
        # The question around the body has fewer than 200 characters.
        assert len(kinds[kind][0].prompt) <= BODY_CHARACTERS + 200


def test_a_long_qualified_name_is_shortened_as_people_do():
    rows = list(derive(doc(LEAD, name="geometry.plane.shapes.Square.grow", signature="(self)")))
    assert "`geometry.Square.grow(self)`" in rows[0].prompt
    assert rows[0].name == "geometry.plane.shapes.Square.grow"


def test_a_doc_always_gives_the_same_questions_and_their_wording_varies_with_the_name():
    assert list(derive(doc(GOOGLE, code=CODE))) == list(derive(doc(GOOGLE, code=CODE)))
    wordings = {next(derive(doc(LEAD, name=f"g.f{i}"))).prompt.replace(f"g.f{i}", "") for i in range(60)}
    assert len(wordings) == 4
