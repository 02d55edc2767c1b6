"""The figure of token rates: what it reads, and what it refuses."""

import json

import pytest

from benchmarks.rates import draw, engine_bar, loop_bars
from drafter.metrics import Estimate
from tests.conftest import write_jsonl

ROWS = [
    {"task": "xsum", "gamma": 2, "measured": None},
    {"task": "xsum", "gamma": 3, "measured": [1.2, 1.1, 1.3]},
    {"task": "mine", "gamma": 3, "measured": [0.9, 0.8, 1.0]},
]


def test_each_task_and_each_engine_gets_a_bar(tmp_path):
    write_jsonl(tmp_path / "gamma.jsonl", ROWS)
    row = {"task": "all", "gamma": 3, "prompts": 24, "ratio": {"value": 1.4, "low": 1.3, "high": 1.5}}
    (tmp_path / "engine.json").write_text(json.dumps({"summaries": [{**row, "task": "xsum"}, row]}))
    bars = [*loop_bars(tmp_path, 3, "lookup"), engine_bar("an engine", tmp_path / "engine.json", 3)]
    assert bars == [
        ("lookup", "lookup, γ = 3: XSum", Estimate(1.2, 1.1, 1.3)),
        ("lookup", "lookup, γ = 3: mine", Estimate(0.9, 0.8, 1.0)),
        ("an engine", "an engine, γ = 3: 24 prompts", Estimate(1.4, 1.3, 1.5)),
    ]
    draw(bars, tmp_path / "figures" / "rates")
    assert (tmp_path / "figures" / "rates.png").stat().st_size > 1000


def test_a_gamma_that_was_not_decoded_is_refused(tmp_path):
    write_jsonl(tmp_path / "gamma.jsonl", ROWS)
    (tmp_path / "engine.json").write_text(json.dumps({"summaries": []}))
    with pytest.raises(SystemExit, match="no measured row at γ = 2"):
        loop_bars(tmp_path, 2, "lookup")
    with pytest.raises(SystemExit, match="no row of all prompts at γ = 3"):
        engine_bar("an engine", tmp_path / "engine.json", 3)
