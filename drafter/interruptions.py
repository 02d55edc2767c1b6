"""Ctrl-C and SIGTERM end a command in order.

While a command runs, either signal raises `Interrupted` where it comes: what was finished is on disk by then. Training
holds the signal back (`held`) until the running step is done; a second signal is not held back.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_held = False
_asked: list[int] = []
_handlers: list[Callable[[int, FrameType | None], None]] = []


class Interrupted(BaseException):
    """A signal asked the process to end.

    Attributes:
        number: of the signal; the exit status is 128 more.
        kept: what can be gone on with, for people to read.
    """

    def __init__(self, number: int, kept: str = "what was finished is kept"):
        super().__init__(number, kept)
        self.number, self.kept = number, kept


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Let the signals raise `Interrupted` in this process, not in those that it forks."""
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _held and not _asked:
            _asked.append(number)
        else:
            raise Interrupted(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    _handlers.append(handle)
    try:
        yield
    finally:
        _asked.clear()
        _handlers.remove(handle)
        for number, handler in before.items():
            signal.signal(number, handler)


def take_back() -> None:
    """Handle the signals here again, where `caught` is in effect and a library has put its own handlers in its place.

    Lightning's handler of SIGTERM broadcasts to the other ranks in the midst of whatever they exchange, and ends the
    process with the exit status of success.
    """
    for handler in _handlers[-1:]:
        for number in SIGNALS:
            signal.signal(number, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Note the first signal for `raise_asked`, in the place of raising.

    An error that comes after it is taken for its consequence: loader processes and other ranks got the signal too.
    """
    global _held
    _held = True
    try:
        yield
    except Exception:
        raise_asked()
        raise
    finally:
        _held = False


def raise_asked(kept: str = "what was finished is kept") -> None:
    """Raise the signal that was held back, if one was."""
    if _asked:
        raise Interrupted(_asked.pop(), kept)
