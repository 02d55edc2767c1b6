import ast
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drafter.data.corpus import Doc, extract, is_heldout, pack, pretraining_texts, source_files
from experiments.tiny_target import train_tokenizer

PACKAGE = "fakelib_of_test_corpus"

INIT = '"""A package that is made for this test and for nothing else at all."""\n'

SHAPES = '''
"""Areas of shapes, in square units, from lengths in units of any kind."""

import an_import_that_would_fail_if_this_were_executed


def area(width: float, height: "float" = 1.0, /, *rest: int, unit: str = "m", **options: dict) -> float:
    """The area of a rectangle of a width and a height, in the square of the unit."""
    checked_width = max(float(width), 0.0)
    checked_height = max(float(height), 0.0)
    product = checked_width * checked_height
    for factor in rest:
        product = product * float(factor)
    if unit not in ("m", "cm", "mm"):
        raise ValueError(f"unknown unit {unit}, must be m, cm or mm")
    return product


async def perimeter(width, height):
    """The perimeter of a rectangle of a width and a height, in the unit."""


def _hidden(width):
    """A private function's docstring, which nobody is meant to read at all."""


def terse():
    """Too short."""


def foreign():
    """这是一个很长的中文文档字符串，用来检查非英文文本会被略去，因为分词器不认识它们，这样就不会混入语料。"""


class Square:
    """A square, which is a rectangle whose width is its height as well."""

    def __init__(self, side: int):
        """Make a square of a side, which must be above zero for an area."""

    def _private(self):
        """A private method's docstring, which nobody is meant to read at all."""

    def grow(self, by=1):
        """Add to the side of this square; the area grows by more than that."""

    def many(self, first_argument=1, second_argument=2, third_argument=3, fourth_argument=4, fifth_argument=5, sixth=6,
             seventh_argument=7):
        """Take so many arguments that the signature is not worth being shown."""
'''

COPY = '''
def copied(width, height):
    """The perimeter of a rectangle
    of a width and a height,   in the unit."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / PACKAGE
    (root / "tests").mkdir(parents=True)
    (root / "zoo").mkdir()
    (root / "__init__.py").write_text(INIT)
    (root / "shapes.py").write_text(SHAPES)
    (root / "zoo" / "__init__.py").write_text("")
    (root / "zoo" / "copy.py").write_text(COPY)
    (root / "broken.py").write_text('"""A docstring that is long enough, in a file that is not Python."""\ndef (:\n')
    (root / "tests" / "test_it.py").write_text('"""A test module\'s docstring, which is not documentation."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    return PACKAGE


@pytest.fixture
def docs(package):
    return {doc.name.removeprefix(package + "."): doc for doc in extract([package], workers=1)}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The area of a rectangle is width times height.", "def area(width, height):"], 300, 512)


def test_every_public_docstring_is_found_under_its_qualified_name(docs):
    assert set(docs) == {
        PACKAGE,
        "shapes",
        "shapes.area",
        "shapes.perimeter",
        "shapes.Square",
        "shapes.Square.__init__",
        "shapes.Square.grow",
        "shapes.Square.many",
    }
    assert docs[PACKAGE].text == "A package that is made for this test and for nothing else at all."


def test_docs_come_sorted_by_name(package):
    names = [doc.name for doc in extract([package], workers=1)]
    assert names == sorted(names)


def test_signatures_have_defaults_and_no_annotations(docs):
    assert docs["shapes.area"].signature == "(width, height=1.0, /, *rest, unit='m', **options)"
    assert docs["shapes.perimeter"].signature == "(width, height)"
    assert docs["shapes.Square.grow"].signature == "(self, by=1)"
    assert docs["shapes.Square"].signature == docs["shapes"].signature == ""


def test_a_long_signature_is_shown_as_dots(docs):
    assert docs["shapes.Square.many"].signature == "(...)"


def test_code_is_the_body_without_docstring_if_it_is_long_enough(docs):
    code = docs["shapes.area"].code
    function = ast.parse(code).body[0]
    assert function.name == "area"
    assert len(function.body) == 6
    assert "The area of a rectangle" not in code
    assert [doc.name for doc in docs.values() if doc.code] == [docs["shapes.area"].name]


def test_an_identical_text_is_kept_once_under_the_first_name(docs):
    assert "shapes.perimeter" in docs
    assert "zoo.copy.copied" not in docs


def test_test_folders_are_left_out_and_init_has_the_name_of_its_package(package):
    names = [name for name, _ in source_files([package])]
    assert names == [PACKAGE, f"{PACKAGE}.broken", f"{PACKAGE}.shapes", f"{PACKAGE}.zoo", f"{PACKAGE}.zoo.copy"]


def test_the_number_of_workers_changes_nothing(package):
    assert extract([package], workers=2) == extract([package], workers=1)


def test_a_package_on_the_path_is_found_without_the_finders_of_other_packages(package, monkeypatch):
    class Finder:  # like that of setuptools, which unloads distutils when it is asked for pip
        def find_spec(self, name, path, target=None):
            raise AssertionError(f"asked for {name}")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    names = [name for name, _ in source_files([f"{package}.zoo"])]
    assert names == [f"{PACKAGE}.zoo", f"{PACKAGE}.zoo.copy"]
    assert PACKAGE not in sys.modules


@pytest.mark.parametrize(
    "name",
    ["no_such_package_anywhere", "no_such_package_anywhere.part", "this"],
    ids=["unknown", "part-of-unknown", "module-without-files"],
)
def test_a_package_that_is_not_installed_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}' is not an installed package"):
        extract([name], workers=1)


def test_a_package_without_docstrings_is_an_empty_corpus(tmp_path, monkeypatch):
    (tmp_path / "silent_of_test_corpus").mkdir()
    (tmp_path / "silent_of_test_corpus" / "__init__.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"corpus is empty.*silent_of_test_corpus"):
        extract(["silent_of_test_corpus"], workers=1)


def test_the_held_out_split_is_a_fixed_property_of_the_name():
    # Computed with SHA-256 independently: another hash would move documents between the splits of existing artifacts.
    assert [i for i in range(20) if is_heldout(f"numpy.function_{i}", 25)] == [2, 7, 8, 15]
    assert not is_heldout("numpy.function_2", 0)
    assert is_heldout("numpy.function_0", 100)


@pytest.mark.parametrize("percent", [0.5, 5, 33])
def test_the_held_out_share_is_close_to_the_percentage(percent):
    size = 20_000
    share = np.mean([is_heldout(f"package.module.name_{i}", percent) for i in range(size)])
    p = percent / 100
    # Four standard deviations of a binomial share: a uniform hash exceeds them for one in 16,000 sets of names.
    assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / size)


def test_a_name_held_out_at_some_percentage_is_held_out_at_every_larger_one():
    names = [f"n{i}" for i in range(500)]
    small, large = ({name for name in names if is_heldout(name, percent)} for percent in (10, 30))
    assert small < large


DOCS = [Doc("a.f", "(x)", "What f does.", "def f(x):\n    return x"), Doc("a.g", "()", "What g does.", "")]


def test_a_code_share_of_zero_gives_docstrings_under_their_signatures_alone():
    assert list(pretraining_texts(DOCS, 0.0)) == ["`a.f(x)`\n\nWhat f does.", "`a.g()`\n\nWhat g does."]


def test_a_code_share_of_one_gives_all_code_that_there_is():
    assert list(pretraining_texts(DOCS, 1.0)) == [
        "`a.f(x)`\n\nWhat f does.",
        "def f(x):\n    return x",
        "`a.g()`\n\nWhat g does.",
    ]


def packed(folder, *arguments, **limit):
    count = pack(folder / "packed.npy", *arguments, **limit)
    tokens = np.load(folder / "packed.npy")
    np.save(folder / "saved.npy", tokens)
    assert (folder / "packed.npy").read_bytes() == (folder / "saved.npy").read_bytes()
    assert len(tokens) == count
    return tokens


def test_packed_texts_decode_to_themselves_each_followed_by_the_end_token(tmp_path, tokenizer):
    texts = ["The area of a rectangle.", "def area(width, height):\n    return width", "Ünïcode ✓"]
    end = tokenizer.eos_token_id
    tokens = packed(tmp_path, texts, tokenizer, end)
    assert tokens[-1] == end
    pieces = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]
    assert [tokenizer.decode(piece[:-1].tolist()) for piece in pieces] == texts


def test_packing_more_texts_than_a_batch_keeps_all_in_order(tmp_path, tokenizer):
    texts = [f"text {i}" for i in range(1234)]  # a batch is 1,000 texts
    tokens = packed(tmp_path, iter(texts), tokenizer, tokenizer.eos_token_id)
    decoded = tokenizer.decode(tokens.tolist()).split(tokenizer.eos_token)
    assert decoded == [*texts, ""]


@pytest.mark.parametrize("limit", [0, 1, 10])
def test_packing_stops_at_the_limit_with_the_first_tokens(tmp_path, tokenizer, limit):
    texts = ["The area of a rectangle is width times height."] * 3
    whole = packed(tmp_path, texts, tokenizer, tokenizer.eos_token_id)
    assert packed(tmp_path, texts, tokenizer, tokenizer.eos_token_id, limit).tolist() == whole[:limit].tolist()


def test_a_limit_ends_the_reading_of_an_endless_source(tmp_path, tokenizer):
    def endless():
        while True:
            yield "The area of a rectangle is width times height."

    assert len(packed(tmp_path, endless(), tokenizer, tokenizer.eos_token_id, limit=500)) == 500


def test_packing_nothing_gives_no_tokens(tmp_path, tokenizer):
    assert packed(tmp_path, [], tokenizer, tokenizer.eos_token_id).shape == (0,)


def test_a_small_vocabulary_takes_two_bytes_per_token(tmp_path, tokenizer):
    assert packed(tmp_path, ["width"], tokenizer, 0).dtype == np.uint16


def test_a_large_vocabulary_takes_four_bytes_and_keeps_its_large_ids(tmp_path):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = packed(tmp_path, ["w69999 w3"], PreTrainedTokenizerFast(tokenizer_object=words), 65_536)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [69_999, 3, 65_536]
