"""Which rule an engine follows: a text that was decoded by one rule has that rule's expected target calls."""

import shutil

import pytest
import torch

from benchmarks.engine_rules import ENGINE, Text, judge, rules_table
from drafter.decoding.acceptance import RULES
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import speculative_decode
from drafter.models.loading import load_target
from drafter.models.trimming import write_kept
from drafter.warping import Sampling
from experiments.running.engine_answers import Answer
from tests.conftest import save_pair

GAMMA, LENGTH = 3, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("pair")
    save_pair(found)
    return found


def decoded(folder, rule, count):
    """Return texts that are decoded by a rule, counted as an engine counts: after the first token."""
    target, drafter = (load_target(str(folder / name)) for name in ("target", "drafter"))
    answers = []
    for seed in range(count):
        prompt, generator = [3 + seed % 7, 5, 9], torch.Generator().manual_seed(seed)
        first = DecodingOptions(1, Sampling(1.0), [], rule)
        (token,) = speculative_decode(target, drafter, prompt, GAMMA, first, generator).tokens
        rest = DecodingOptions(LENGTH - 1, Sampling(1.0), [], rule)
        found = speculative_decode(target, drafter, [*prompt, token], GAMMA, rest, generator)
        answers.append((1.0, str(seed), prompt, Answer([token, *found.tokens], LENGTH, 1.0, 1.0, len(found.blocks))))
    return answers


def test_the_text_determines_the_calls_of_argmax(folder):
    for text in judge(folder / "target", folder / "drafter", decoded(folder, "argmax", 6), GAMMA, []):
        assert text.tokens == LENGTH - 1
        assert text.calls[ENGINE] == pytest.approx(text.calls["argmax"], rel=1e-6)


def test_a_trimmed_drafter_is_judged_with_the_whole_output_embedding_that_engines_have(folder, tmp_path):
    shutil.copytree(folder / "drafter", tmp_path / "drafter")
    write_kept(tmp_path / "drafter", range(4))
    answers = decoded(folder, "argmax", 3)
    trimmed, whole = (judge(folder / "target", root / "drafter", answers, GAMMA, []) for root in (tmp_path, folder))
    assert trimmed == whole


def test_the_calls_of_another_rule_differ(folder):
    texts = judge(folder / "target", folder / "drafter", decoded(folder, "ratio", 12), GAMMA, [])
    assert any(abs(text.calls[ENGINE] - text.calls["argmax"]) > 1 for text in texts)
    engine, ratio, match = (sum(text.calls[source] for text in texts) for source in (ENGINE, "ratio", "match"))
    assert engine == pytest.approx(ratio, rel=0.1)  # 12 texts of 23 tokens
    assert match > ratio


def test_the_table_pairs_by_text():
    calls = {ENGINE: 5.0, "ratio": 4.0, "argmax": 5.0, "match": 10.0}
    table = rules_table([Text(str(number), 0.6, 10, calls) for number in range(4)], GAMMA)
    assert table.columns[4:] == [f"τ by `{rule}`" for rule in RULES]
    assert table.rows == [
        [
            "0.6", "4", "20", "2.00 [2.00, 2.00]", "2.50 (-0.50 [-0.50, -0.50])", "2.00 (+0.00 [+0.00, +0.00])",
            "1.00 (+1.00 [+1.00, +1.00])",
        ]
    ]  # fmt: skip
