"""Tests of the progress of a stage and of the last lines of a pipeline."""

import logging
import sys

import pytest

from drafter.metrics import Counts
from experiments.reporting.conclusions import conclusions
from experiments.reporting.identity import DrafterIdentity
from experiments.reporting.results import Evaluation
from experiments.running.progress import Progress, announce, duration


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch, caplog):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO)
    return Clock()


def run(clock, **how):
    """Report a hundred items, one per second, of 50 tokens each; the first ten were done before."""
    with Progress("respond", "row", done=10, clock=clock, **how) as progress:
        for done in range(11, 101):
            clock.now += 1
            progress(done, 100, 50, lambda: 1.23456)


def test_a_log_has_a_line_every_thirty_seconds_with_loss_rate_and_time_left(clock, caplog):
    run(clock, ranks=2)
    assert caplog.messages == [
        "respond: row 40 of 100, loss 1.235, 100 tokens/s, 60 s left",
        "respond: row 70 of 100, loss 1.235, 100 tokens/s, 30 s left",
        "respond: row 100 of 100, loss 1.235, 100 tokens/s, took 90 s",
    ]


def test_other_ranks_are_silent_and_the_total_may_be_unknown(clock, caplog, monkeypatch):
    with Progress("prepare", "token", clock=clock) as progress:
        clock.now += 31
        progress(5000, None)
    assert caplog.messages == ["prepare: token 5,000"]
    monkeypatch.setenv("RANK", "1")
    run(clock)
    announce("respond", "runs/x", 3, 7)
    assert len(caplog.messages) == 1


def test_a_terminal_shows_one_bar(clock, caplog, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(clock)
    shown = capsys.readouterr().err
    assert "100/100" in shown.replace("100.", "100")
    assert "loss 1.235, 50 tokens/s" in shown
    assert caplog.messages == []


def test_a_stage_logs_its_number_and_directory(clock, caplog):
    announce("respond", "runs/tiny/responses", 3, 7)
    announce("respond", "runs/tiny/responses")
    assert caplog.messages == ["stage 3 of 7: respond → runs/tiny/responses", "respond → runs/tiny/responses"]


def test_durations_have_a_readable_unit():
    assert [duration(seconds) for seconds in (90, 720, 12_600)] == ["90 s", "12 min", "3.5 h"]


def evaluation(loss, calls, seconds, folder):
    counts = {}
    for number in range(20):
        values = dict.fromkeys(Counts._fields, 1) | {"tokens": 60, "target_calls": calls}
        values |= {"seconds": seconds, "baseline_seconds": 1.0}
        values |= {name: 60 for name in Counts._fields if name == "baseline_tokens"}
        counts["task", 3, str(number)] = Counts(**values)
    return Evaluation(DrafterIdentity(loss, loss, seed=1), 0.05, ("task",), counts, [], folder)


@pytest.mark.parametrize(("seconds", "verdict"), [(2.0, "It does not pay"), (0.5, "It pays"), (1.0, "It is undecided")])
def test_the_last_lines_name_the_best_drafter_whether_it_pays_and_the_next_step(tmp_path, seconds, verdict):
    found = [
        evaluation(name, calls, seconds, tmp_path) for name, calls in (("pretrained", 50), ("kld", 40), ("ce", 45))
    ]
    best, pays, following = conclusions(found, "runs/tiny/report")
    assert best.startswith("Best drafter: kld, block efficiency 1.50 [1.50, 1.50] against 1.20 [1.20, 1.20] pretrained")
    assert pays.startswith(verdict)
    assert "runs/tiny/report/report.html" in following
    assert "make demo ARGS=" in following


def test_the_last_lines_say_if_times_were_not_measured(tmp_path):
    found = [evaluation("kld", 40, seconds, tmp_path) for seconds in (1.0, float("nan"))]
    _, pays, _ = conclusions(found, "runs/tiny/report")
    assert pays == "Whether it pays on this machine was not measured: evaluate with evaluate.batch_size=1."


def test_the_last_lines_say_of_the_best_drafter_with_a_model_if_another_one_is_best(tmp_path):
    found = [
        evaluation(name, calls, seconds, tmp_path)
        for name, calls, seconds in (("pretrained", 50, 1.0), ("kld", 40, 2.0), ("ngram", 30, 0.5))
    ]
    found[2] = found[2]._replace(drafter=DrafterIdentity("ngram"), size_ratio=0.0)
    best, pays, trained, _ = conclusions(found, "runs/tiny/report")
    assert best == "Best drafter: ngram, block efficiency 2.00 [2.00, 2.00] (γ = 3, the task task). It has no model."
    assert pays.startswith("It pays")
    assert trained.startswith("Best drafter with a model: kld, block efficiency 1.50 [1.50, 1.50] against 1.20")
    assert "It does not pay on this machine" in trained
    assert len(conclusions(found[:2], "runs/tiny/report")) == 3
    alone = conclusions(found[2:], "runs/tiny/report")
    assert alone[0].startswith("Best drafter: ngram, block efficiency 2.00")
    assert len(alone) == 3
