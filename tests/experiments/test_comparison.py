"""Tables of compared drafters: paired differences, the best loss for each engine, and what is refused."""

import pytest

from drafter.artifacts.manifest import ArtifactError, write_json, write_jsonl
from drafter.metrics import Counts
from experiments.reporting.comparison import (
    ANY,
    Compared,
    Setting,
    check_alike,
    comparison_page,
    comparison_tables,
    kinds_page,
    read_compared,
)
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


def test_columns_are_in_the_order_of_temperature_and_rule():
    chosen = [Setting(1.0, rule, 3) for rule in ("match", "argmax", "ratio")] + [Setting(0.6, "argmax", 3), GREEDY]
    one = Compared(DrafterIdentity("kld"), dict.fromkeys(chosen, FOUND[0].counts[GREEDY]), 3)
    columns = comparison_tables([one], [])[0].columns[2:]
    assert columns == ["greedy", "T = 0.6, `argmax`", "T = 1, `ratio`", "T = 1, `argmax`", "T = 1, `match`"]


def test_a_lead_needs_an_interval_above_zero():
    always = [compared("kld", [5, 5, 4], [5, 5, 5]), compared("hit", [4, 4, 3], [4, 6, 4])]
    *_, engines = comparison_tables(always, ["kld"])
    assert [row[2] for row in engines.rows] == ["hit", "hit"]
    assert engines.rows[0][4].startswith("+0.58 [")
    assert (engines.title, engines.columns[2]) == ("Which loss for which engine? γ = 3", "best loss")
    assert engines.rows[1][4].startswith("no difference seen (+0.14 [")
    assert "llama.cpp" in engines.rows[1][0]


def test_the_page_says_on_how_much_text():
    page = comparison_page(FOUND, comparison_tables(FOUND, ["kld"]))
    assert "6 responses: 3 instructions, 30 tokens at T = 0; 3 instructions, 30 tokens at T = 1." in page


def test_each_kind_has_its_own_tables():
    kinds = {"i0": "chat", "i1": "chat", "i2": "code"}
    page = kinds_page([one._replace(kinds=kinds) for one in FOUND], ["kld"])
    _, chat, code = page.split("\n## ")
    assert "2 instructions, 20 tokens at T = 0; 2 instructions, 20 tokens at T = 1." in chat
    assert "| kld | 1 | 2.00 [2.00, 2.00] |" in chat  # 20 tokens in 5 + 5 calls
    assert "| kld | 1 | **2.50 [2.50, 2.50]** |" in code  # 10 tokens in 4 calls
    assert "| hit | +0.00 [+0.00, +0.00] |" in code  # two seeds: 20 tokens in 3 + 5 calls
    assert kinds_page([one._replace(kinds=dict.fromkeys(kinds, "chat")) for one in FOUND], ["kld"]) == ""


def test_a_kind_without_responses_at_a_temperature_has_no_column_for_it():
    counts = {GREEDY: FOUND[0].counts[GREEDY], SAMPLED: {"i2": FOUND[0].counts[SAMPLED]["i2"]}}
    one = FOUND[0]._replace(counts=counts, kinds={"i0": "chat", "i1": "chat", "i2": "code"})
    _, chat, code = kinds_page([one], []).split("\n## ")
    assert "| drafter | seeds | greedy |\n" in chat
    assert "| drafter | seeds | greedy | T = 1, `argmax` |\n" in code


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no drafter was compared"):
        read_compared(tmp_path)


def write_compared(folder, label, identity, blocks=2.0, cache="c", settings=None):
    """Write a finished directory of a drafter that was judged on three responses, two of them to one instruction."""
    (folder / label).mkdir(parents=True)
    where = [("a", 0.0), ("a", 0.6), ("b#2", 0.6)]
    rows = [
        {"prompt": prompt, "kind": "chat", "temperature": temperature, "gamma": gamma, "tokens": 8, "blocks": blocks}
        | ({} if temperature == 0 else {"rule": rule})
        for gamma in (1, 3)
        for prompt, temperature in where
        for rule in (["any"] if temperature == 0 else ["argmax", "match"])
    ]
    write_jsonl(folder / label / "counts.jsonl", rows)
    counts = {**identity._asdict(), "drafter": label, "directory": label, "responses": 3, "top_p": 0.9}
    manifest = {"stage": "compare", "settings": settings or {}, "inputs": {"cache": cache}, "counts": counts}
    write_json(folder / label / "manifest.json", manifest)


def test_only_seeds_of_one_series_are_summed(tmp_path):
    kld = DrafterIdentity("kld", loss="kld", seed=1)
    for label, identity in (
        ("kld-seed1", kld), ("kld-seed2", kld._replace(seed=2)),  # two seeds
        ("kld-seed1-step20", kld._replace(step=20)), ("kld-seed1-step100", kld._replace(step=100)),  # kept steps
        ("tvd-seed1", DrafterIdentity("tvd", loss="tvd", seed=1)),
        ("other-tvd-seed1", DrafterIdentity("tvd", loss="tvd", seed=1)),  # of another root
        ("ngram-responses", DrafterIdentity("ngram-responses")),
        ("big-ngram-responses", DrafterIdentity("ngram-responses")),
        ("drafter", DrafterIdentity("pretrained", seed=0)), ("drafter-copying", DrafterIdentity("pretrained", seed=0)),
    ):  # fmt: skip
        write_compared(tmp_path, label, identity)
    tau = comparison_tables(read_compared(tmp_path), [])[0]
    assert [(row[0], row[1]) for row in tau.rows] == [
        ("pretrained (drafter)", "1"), ("pretrained (drafter-copying)", "1"),
        ("kld, step 20", "1"), ("kld, step 100", "1"), ("kld", "2"),
        ("ngram-responses (big-ngram-responses)", "1"), ("ngram-responses (ngram-responses)", "1"),
        ("tvd (other-tvd-seed1)", "1"), ("tvd (tvd-seed1)", "1"),
    ]  # fmt: skip


@pytest.mark.parametrize("other", [{"variant": "responses_10"}, {"kinds": ["summary"]}])
def test_with_other_data_the_best_is_a_drafter_and_no_loss(other):
    changed = compared("kld-changed", [5, 5, 5], [5, 5, 5])
    changed = changed._replace(drafter=changed.drafter._replace(loss="kld", **other))
    *_, engines = comparison_tables([FOUND[0], changed], [])
    assert (engines.title, engines.columns[2]) == ("Which drafter for which engine? γ = 3", "best drafter")


def test_the_responses_are_counted_once_whatever_gammas_and_rules_there_are(tmp_path):
    write_compared(tmp_path, "drafter", DrafterIdentity("pretrained"))
    found = read_compared(tmp_path)
    page = comparison_page(found, comparison_tables(found, ["kld"]))
    assert "3 responses, with top-p 0.9 above T = 0: 1 instructions, 8 tokens at T = 0; 2 instructions, 16 tok" in page
    assert found[0].counts[Setting(0.6, "match", 3)]["a"].target_calls == 2
    assert "Which loss" not in page  # no loss has trained anything


def test_a_folder_has_drafters_that_were_compared_alike(tmp_path):
    settings = {"num_speculative_tokens": [3], "acceptance_rules": ["match"]}
    check_alike(tmp_path / "none", settings, "c")
    write_compared(tmp_path, "drafter", DrafterIdentity("pretrained"), settings=settings)
    check_alike(tmp_path, settings, "c")
    with pytest.raises(ArtifactError, match=r"drafter was compared with other responses \(c, and here they are d\)"):
        check_alike(tmp_path, settings, "d")
    with pytest.raises(ArtifactError, match=r"drafter was compared with other settings .*another directory as `out`"):
        check_alike(tmp_path, settings | {"num_speculative_tokens": [5]}, "c")
