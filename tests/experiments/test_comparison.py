"""Tables of compared drafters: paired differences, the best loss for each engine, and what is refused."""

import pytest

from drafter.artifacts.manifest import ArtifactError
from drafter.metrics import Counts
from experiments.reporting.comparison import ANY, Compared, Setting, comparison_page, comparison_tables, read_compared
from experiments.reporting.identity import DrafterIdentity

GREEDY, SAMPLED = Setting(0.0, ANY, 3), Setting(1.0, "argmax", 3)


def compared(series, calls, sampled_calls, seed=1):
    """Return a drafter that needs so many target calls for the ten tokens of each instruction."""
    counts = {
        setting: {f"i{i}": Counts(10, number, 0, 0, 0.0, 0, 0.0) for i, number in enumerate(of_setting)}
        for setting, of_setting in ((GREEDY, calls), (SAMPLED, sampled_calls))
    }
    return Compared(DrafterIdentity(series, loss=series, seed=seed), counts, 6)


FOUND = [
    compared("kld", [5, 5, 4], [5, 5, 5]),
    compared("hit", [4, 4, 3], [4, 6, 5]),
    compared("hit", [4, 4, 5], [4, 6, 5], seed=2),
]


def test_seeds_are_summed_and_differences_paired():
    tau, difference, _ = comparison_tables(FOUND, ["kld", "tvdpp"])
    assert tau.rows == [
        ["kld", "1", "2.14 [2.00, 2.50]", "**2.00 [2.00, 2.00]**"],
        ["hit", "2", "**2.50 [2.50, 2.50]**", "**2.00 [1.67, 2.50]**"],
    ]
    # 30 tokens in 12 calls a seed against 30 in 14: where hit needs a call less in each instruction, so does every draw
    assert [row[0] for row in difference.rows] == ["hit"]
    assert difference.rows[0][1].startswith("+0.36 [+0.00")


def test_a_lead_needs_an_interval_above_zero():
    always = [compared("kld", [5, 5, 4], [5, 5, 5]), compared("hit", [4, 4, 3], [4, 6, 4])]
    *_, engines = comparison_tables(always, ["kld"])
    assert [row[2] for row in engines.rows] == ["hit", "hit"]
    assert engines.rows[0][4].startswith("+0.58 [")
    assert engines.rows[1][4].startswith("no difference seen (+0.14 [")
    assert "llama.cpp" in engines.rows[1][0]


def test_the_page_says_on_how_much_text():
    page = comparison_page(FOUND, ["kld"])
    assert "6 responses: 3 instructions, 30 tokens at T = 0; 3 instructions, 30 tokens at T = 1." in page


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no drafter was compared"):
        read_compared(tmp_path)
