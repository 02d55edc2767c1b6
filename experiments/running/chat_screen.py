"""What a chat reads from the terminal, and how it shows answers: drafted tokens in green."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from drafter.data.text_stream import Piece
from drafter.interruptions import Interrupted

GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


class ChatScreen:
    """Standard input and output of a chat: a terminal, or files and pipes, which get no colours and no hints."""

    def __init__(self) -> None:
        self.is_typed, self.is_seen = sys.stdin.isatty(), sys.stdout.isatty()
        self.has_colours = self.is_seen and not os.environ.get("NO_COLOR")
        with contextlib.suppress(AttributeError):  # a test's standard input
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
        if self.is_typed:
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401 (it gives `input` a history and its keys)

    def messages(self) -> Iterator[str]:
        """Yield the user's messages, a line each, until the end of the input or /quit.

        Lines of white space are skipped. On a terminal, Ctrl-C discards the line.
        """
        while True:
            try:
                line = input("> " if self.is_typed else "").strip()
            except EOFError:
                return
            except Interrupted as interruption:
                self.require_typed(interruption)
                self.note("\n/quit or Ctrl-D ends the chat")
                continue
            if line == "/quit":
                return
            if line and not self.is_typed:
                print(f"> {line}")
            if line:
                yield line

    def require_typed(self, interruption: Interrupted) -> None:
        """Raise an interruption again, unless it is a Ctrl-C of somebody who types the messages."""
        if not self.is_typed or interruption.number != signal.SIGINT:
            raise interruption

    def show(self, piece: Piece) -> None:
        """Print a piece of an answer."""
        is_coloured = self.has_colours and piece.drafted
        print(f"{GREEN}{piece.text}{PLAIN}" if is_coloured else piece.text, end="", flush=True)

    def note(self, text: str) -> None:
        """Print a line that is no part of the conversation."""
        print(f"{DIM}{text}{PLAIN}" if self.has_colours else text, flush=True)

    @contextlib.contextmanager
    def passing(self, text: str) -> Iterator[None]:
        """Show a line on a terminal for as long as the block runs."""
        if self.is_seen:
            print(text, end="", flush=True)
        try:
            yield
        finally:
            if self.is_seen:
                print("\r" + " " * len(text) + "\r", end="", flush=True)
