"""Ctrl-C and SIGTERM: one line that says how to go on, the exit status of the signal, and nothing that is lost."""

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

LOOPS = {  # a stage, what makes it several files, and a file that is there once it works
    "respond": (STEPS["respond"], "00000.json"),
    "cache": (STEPS["cache"], "00000.json"),
    "evaluate": (["drafters=[{root}/drafter]"], "drafter/started.json"),
}


def as_command(name, overrides, output):
    """A stage as its command line runs it."""
    torch.set_num_threads(1)
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [name, *overrides]
    importlib.import_module(f"experiments.{name}").main()


def interrupted(name, overrides, ready, number, output):
    """Run a command, and send it the signal once it is ready. Returns its status, its line, all that it printed."""
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


def go_on(name, overrides, output):
    process = FORKED.Process(target=as_command, args=(name, overrides, str(output)))
    process.start()
    process.join()
    assert process.exitcode == 0, output.read_text()


def test_training_ends_after_a_step_and_goes_on_to_the_same_curve_and_drafter(world, tmp_path):
    overrides, _ = world
    command = [*overrides, *STEPS["finetune"], "finetune.max_steps=40", f"hydra.run.dir={tmp_path}"]
    go_on("finetune", [*command, f"out={tmp_path}/whole"], tmp_path / "log")
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
    go_on("finetune", out, tmp_path / "log")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_ends_at_once_and_keeps_the_files_that_it_has(world, tmp_path, name):
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
        go_on(name, command, tmp_path / "log")
        assert (tmp_path / "out" / first).stat().st_mtime_ns == kept


def test_an_error_that_follows_a_signal_is_its_consequence_and_a_second_signal_is_not_held(tmp_path):
    with pytest.raises(Interrupted, match="15"), catch_signals(), defer_signals():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a loader process was killed")
    with pytest.raises(RuntimeError, match="of its own"), catch_signals(), defer_signals():
        raise RuntimeError("of its own")
    with pytest.raises(Interrupted) as second, catch_signals(), defer_signals():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert second.value.number == signal.SIGTERM
    with catch_signals():
        raise_deferred()  # the one that was held is forgotten with its command


def test_handlers_that_a_library_has_put_in_place_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    restore_handlers()
    assert signal.getsignal(signal.SIGTERM) is before  # outside a command the signals are others' own
    with pytest.raises(Interrupted), catch_signals():  # noqa: PT012
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        restore_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
