"""Show the progress of a stage: its name and directory, and one bar or a line every 30 seconds."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)
REFRESH, LINE = 0.5, 30.0  # seconds between two states of the bar, and between two lines of a log


class Progress:
    """Shows how far a loop is, on rank 0 only: a bar on a terminal, a log line every 30 seconds elsewhere.

    It can be given to the library as a `Report`.

    Args:
        name: the stage.
        unit: what is counted.
        ranks: how many ranks share the work; each is taken to process as many tokens per second as rank 0.
        done: how many units were done before.
        clock: the time in seconds, for tests.
    """

    def __init__(
        self, name: str, unit: str, ranks: int = 1, done: int = 0, clock: Callable[[], float] = time.monotonic
    ):
        self.name, self.unit, self.ranks, self.start, self.clock = name, unit, ranks, done, clock
        self.is_first, self.is_terminal = int(os.environ.get("RANK", 0)) == 0, sys.stderr.isatty()
        self.begun = self.shown = clock()
        self.tokens: Any = 0
        self.bar: tqdm | None = None

    def __call__(
        self, done: int, total: int | None, tokens: Any = 0, loss: Callable[[], float | None] = lambda: None
    ) -> None:
        """Report that `done` of `total` are finished and that this rank has processed `tokens` more.

        `tokens` may be a tensor, and `loss` is called only when something is shown, so that a step on an accelerator
        does not wait for the host.
        """
        if not self.is_first:
            return
        self.tokens = self.tokens + tokens
        now = self.clock()
        if now - self.shown < (REFRESH if self.is_terminal else LINE) and done != total:
            return
        self.shown = now
        seconds = max(now - self.begun, 1e-9)
        details = [] if (value := loss()) is None else [f"loss {value:.4g}"]
        details += [f"{float(self.tokens) * self.ranks / seconds:,.0f} tokens/s"] if float(self.tokens) else []
        if self.is_terminal:
            self.bar = self.bar or tqdm(
                total=total, initial=self.start, desc=self.name, unit=f" {self.unit}s", unit_scale=True
            )
            self.bar.n = done
            self.bar.set_postfix_str(", ".join(details))
        else:
            if done == total:
                details.append(f"took {duration(seconds)}")
            elif total is not None and done > self.start:
                details.append(f"{duration(seconds * (total - done) / (done - self.start))} left")
            out_of = "" if total is None else f" of {total:,}"
            log.info("%s: %s", self.name, ", ".join([f"{self.unit} {done:,}{out_of}", *details]))

    def __enter__(self) -> "Progress":
        """Start the clock."""
        self.begun = self.shown = self.clock()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def announce(stage: str, out: str | None, number: int = 1, total: int = 1) -> None:
    """Log on rank 0 which stage begins, its number in the pipeline, and where it writes."""
    if int(os.environ.get("RANK", 0)) == 0 and out:
        position = f"stage {number} of {total}: " if total > 1 else ""
        log.info("%s%s → %s", position, stage, out)


def quiet() -> None:
    """Silence messages of libraries: Lightning's tips and hardware summary, and the bars of loading weights."""
    for noisy in ("httpx", "lightning.pytorch", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    if "transformers" in sys.modules:
        from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        hidden = are_progress_bars_disabled()
        disable_progress_bar()  # this hides the bars of downloads too, which are worth seeing
        if not hidden:
            enable_progress_bars()


def duration(seconds: float) -> str:
    """Return a time in a readable unit, such as "90 s", "12 min" or "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
