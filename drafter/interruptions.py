"""An orderly end of a command on Ctrl-C and SIGTERM.

While a command runs, either signal raises `Interrupted` in the line that is being executed; results that are finished
are on disk by then. Training defers the first signal until the end of the step (`defer_signals`); a second signal
raises at once.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_deferring = False
_deferred: list[int] = []
_handlers: list[Callable[[int, FrameType | None], None]] = []


class Interrupted(BaseException):
    """A signal asked the process to end.

    Attributes:
        number: the signal's number; the exit status is 128 more.
        kept: a sentence for the user that says which work a restart continues from.
    """

    def __init__(self, number: int, kept: str = "what was finished is kept"):
        super().__init__(number, kept)
        self.number, self.kept = number, kept


@contextlib.contextmanager
def catch_signals() -> Iterator[None]:
    """Let the signals raise `Interrupted` in this process, and end the processes that it forks, as is the default."""
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _deferring and not _deferred:
            _deferred.append(number)
        else:
            raise Interrupted(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    _handlers.append(handle)
    try:
        yield
    finally:
        _deferred.clear()
        _handlers.remove(handle)
        for number, handler in before.items():
            signal.signal(number, handler)


def restore_handlers() -> None:
    """Install the handlers of `catch_signals` again after a library has replaced them; outside it, do nothing.

    Lightning's handler of SIGTERM broadcasts to the other ranks in the middle of their other communication, and ends
    the process with exit status 0.
    """
    for handler in _handlers[-1:]:
        for number in SIGNALS:
            signal.signal(number, handler)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Record the first signal for `raise_deferred` instead of raising `Interrupted`.

    An error after the signal is taken to be its consequence, as loader processes and other ranks received it too.
    """
    global _deferring
    _deferring = True
    try:
        yield
    except Exception:
        raise_deferred()
        raise
    finally:
        _deferring = False


def raise_deferred(kept: str = "what was finished is kept") -> None:
    """Raise `Interrupted` for the signal that was deferred, if there was one."""
    if _deferred:
        raise Interrupted(_deferred.pop(), kept)
