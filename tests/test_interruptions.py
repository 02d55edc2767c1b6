"""Ctrl-C and SIGTERM print one line that says how to continue, exit with the signal's status, and lose no result."""

import importlib
import os
import signal
import sys
import time

import pytest
import torch

from drafter.interruptions import Interrupted, catch_signals, defer_signals, raise_deferred, restore_handlers
from tests.training.test_faults import FORKED, STEPS, content

pytestmark = pytest.mark.end_to_end

LOOPS = {  # stage -> overrides that make it write several files, and the first file that it writes
    "respond": (STEPS["respond"], "00000.json"),
    "cache": (STEPS["cache"], "00000.json"),
    "evaluate": (["drafters=[{root}/drafter]"], "drafter/started.json"),
}


def as_command(name, overrides, output):
    """Run a stage as its command line does, with its output in a file."""
    torch.set_num_threads(1)
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [name, *overrides]
    importlib.import_module(f"experiments.{name}").main()


def interrupted(name, overrides, ready, number, output):
    """Run a command, send it the signal once it is ready, and return its status, its last line and all its output."""
    process = FORKED.Process(target=as_command, args=(name, overrides, str(output)))
    process.start()
    while not ready():
        time.sleep(0.005)
        assert process.is_alive(), output.read_text()
    os.kill(process.pid, number)
    process.join(60)
    text = output.read_text(encoding="utf-8")
    (line,) = (line for line in text.replace("\r", "\n").splitlines() if "Go on with" in line)
    return process.exitcode, line, text


def continue_run(name, overrides, output):
    process = FORKED.Process(target=as_command, args=(name, overrides, str(output)))
    process.start()
    process.join()
    assert process.exitcode == 0, output.read_text()


def test_training_ends_after_a_step_and_continues_to_the_same_curve_and_drafter(world, tmp_path):
    overrides, _ = world
    command = [*overrides, *STEPS["finetune"], "finetune.max_steps=40", f"hydra.run.dir={tmp_path}"]
    continue_run("finetune", [*command, f"out={tmp_path}/whole"], tmp_path / "log")
    out = [*command, f"out={tmp_path}/out"]
    last, before = tmp_path / "out" / "checkpoints" / "last.ckpt", 0
    for number in (signal.SIGINT, signal.SIGTERM):

        def saved(before=before):
            return last.exists() and last.stat().st_mtime_ns > before

        status, line, text = interrupted("finetune", out, saved, number, tmp_path / "log")
        assert status == 128 + number, text
        assert line.startswith(f"{number.name}: ended after ")
        assert "of 40 steps" in line
        assert f"out={tmp_path}/out" in line
        assert "Traceback" not in text
        assert not (tmp_path / "out" / "manifest.json").exists()
        before = last.stat().st_mtime_ns
    continue_run("finetune", out, tmp_path / "log")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_ends_at_once_and_keeps_its_finished_files(world, tmp_path, name):
    overrides, root = world
    extra, first = LOOPS[name]
    command = [
        *overrides,
        *(part.format(root=root) for part in extra),
        f"out={tmp_path}/out",
        f"hydra.run.dir={tmp_path}",
    ]
    ready = (tmp_path / "out" / first).exists
    status, line, text = interrupted(name, command, ready, signal.SIGINT, tmp_path / "log")
    assert status == 128 + signal.SIGINT, text
    assert line.startswith(f"SIGINT: what was finished is kept. Go on with: python -m experiments.{name} ")
    assert "Traceback" not in text
    kept = (tmp_path / "out" / first).stat().st_mtime_ns
    assert not list(tmp_path.glob("out/**/manifest.json"))
    if name != "evaluate":
        continue_run(name, command, tmp_path / "log")
        assert (tmp_path / "out" / first).stat().st_mtime_ns == kept


def test_an_error_after_a_signal_counts_as_its_consequence_and_a_second_signal_is_not_deferred(tmp_path):
    with pytest.raises(Interrupted, match="15"), catch_signals(), defer_signals():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a loader process was killed")
    with pytest.raises(RuntimeError, match="unrelated"), catch_signals(), defer_signals():
        raise RuntimeError("unrelated")
    with pytest.raises(Interrupted) as second, catch_signals(), defer_signals():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert second.value.number == signal.SIGTERM
    with catch_signals():
        raise_deferred()  # a deferred signal is discarded when its command ends


def test_handlers_that_a_library_has_replaced_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    restore_handlers()
    assert signal.getsignal(signal.SIGTERM) is before  # outside a command the handlers are not ours
    with pytest.raises(Interrupted), catch_signals():  # noqa: PT012
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        restore_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
