"""Wall-clock time of work on a device, and its division into drafting and verification."""

import time
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """The wall-clock time of a decoding; sequences that were decoded together share it equally."""

    total: float
    drafting: float = 0.0
    verifying: float = 0.0


class Clock:
    """Measures the seconds of drafting, of verification, and in total; on a GPU it waits for the work to finish."""

    def __init__(self, device: torch.device):
        self.device = device
        self.drafting = self.verifying = 0.0
        self.began = self.last = now(device)

    def add_drafting(self) -> None:
        """Count the time since the previous lap as drafting."""
        self.drafting += self._lap()

    def add_verifying(self) -> None:
        """Count the time since the previous lap as verification."""
        self.verifying += self._lap()

    def _lap(self) -> float:
        before, self.last = self.last, now(self.device)
        return self.last - before

    def seconds(self, sequences: int) -> Seconds:
        """Return the share of each of so many sequences."""
        total = now(self.device) - self.began
        return Seconds(total / sequences, self.drafting / sequences, self.verifying / sequences)


def now(device: torch.device) -> float:
    """Return the wall-clock time in seconds, after waiting for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
