"""Choose rows from several sources in turn, up to a quota for each split, and count the rows that are left out."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from drafter.artifacts.manifest import read_jsonl

Row = dict[str, Any]


class Candidate(NamedTuple):
    """A row for one of the splits, or the reason why it is left out; `absent` are the fields that it lacks."""

    row: Row
    split: str
    left_out: str | None = None
    absent: tuple[str, ...] = ()


@dataclass
class Tally:
    """Count what became of the rows of a source. Rows after the last one that was needed are neither read nor counted.

    Attributes:
        read: the number of rows read.
        used: split -> the number of rows used.
        left_out: reason -> the number of rows left out.
        absent: field -> the number of rows that lack it.
        shortest: the length in tokens of the shortest prompt that was too long.
    """

    read: int = 0
    used: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)
    shortest: int | None = None

    def counts(self) -> dict[str, Any]:
        """Return the counts for a manifest; "read" is the sum of "used" and "left_out"."""
        counts: dict[str, Any] = {"read": self.read, "used": dict(self.used), "left_out": dict(self.left_out)}
        return counts | ({"rows_that_lack": dict(self.absent)} if self.absent else {})

    def __str__(self) -> str:
        """Return the counts as text for a log."""
        used = f"{self.used.total()} used"
        if len(self.used) > 1:
            used += " (" + ", ".join(f"{number} for {split}" for split, number in self.used.items()) + ")"
        reasons = "".join(f", {number} {reason}" for reason, number in self.left_out.items())
        lacking = "".join(f"; {number} lack the field {name}, which is empty" for name, number in self.absent.items())
        return f"{self.read} rows read, {used}{reasons}{lacking}"


class Selection:
    """Choose rows for each split from several streams of candidates.

    Args:
        streams: source -> its candidates.
        quotas: split -> the number of rows to choose, or None for all.
        limit: the largest number of tokens that a row may have.
        length: returns the number of tokens of a row, or the reason why the row cannot be encoded.
        weights: source -> how often it is drawn from, relative to the others. By default all have the same weight.
    """

    def __init__(
        self,
        streams: Mapping[str, Iterator[Candidate]],
        quotas: Mapping[str, int | None],
        limit: int,
        length: Callable[[Row], int | str],
        weights: Mapping[str, float] | None = None,
    ):
        self.streams, self.quotas, self.limit, self.length = streams, quotas, limit, length
        self.weights = weights or dict.fromkeys(streams, 1.0)
        self.tallies = {name: Tally() for name in streams}
        self._waiting = {name: {split: deque[Row]() for split in quotas} for name in streams}
        self.rows = {split: [] if quota == 0 else self._choose(split, quota) for split, quota in quotas.items()}
        for name, waiting in self._waiting.items():
            self.tallies[name].left_out["not needed"] += sum(map(len, waiting.values()))
            self.tallies[name].left_out = +self.tallies[name].left_out

    def _choose(self, split: str, quota: int | None) -> list[Row]:
        """Choose the rows of a split, each from the source that has contributed the least relative to its weight."""
        chosen: list[Row] = []
        drawn = dict.fromkeys(self.streams, 0)
        while drawn and (quota is None or len(chosen) < quota):
            name = min(drawn, key=lambda name: (drawn[name] + 1) / self.weights[name])
            row = self._next(name, split)
            if row is None:
                del drawn[name]
            else:
                drawn[name] += 1
                self.tallies[name].used[split] += 1
                chosen.append(row)
        self.quotas = {**self.quotas, split: 0}
        return chosen

    def _next(self, name: str, wanted: str) -> Row | None:
        """Return a source's next row of a split, or None. Rows of other splits wait until they are wanted."""
        waiting, tally = self._waiting[name], self.tallies[name]
        if waiting[wanted]:
            return waiting[wanted].popleft()
        for row, split, left_out, absent in self.streams[name]:
            tally.read += 1
            tally.absent.update(absent)
            quota = self.quotas[split] if not left_out else None
            if not left_out and quota is not None and len(waiting[split]) >= quota:
                left_out = "not needed"
            if reason := left_out or self._reason_against(row, tally):
                tally.left_out[reason] += 1
            elif split == wanted:
                return row
            else:
                waiting[split].append(row)
        return None

    def _reason_against(self, row: Row, tally: Tally) -> str | None:
        """Return why a row cannot be used, or None."""
        tokens = self.length(row)
        if isinstance(tokens, str):
            return tokens
        if tokens > self.limit:
            tally.shortest = min(tokens, tally.shortest or tokens)
            return "too long"
        return None


def read_instructions(path: str | Path) -> list[Row]:
    """Read the rows of an instructions.jsonl.

    Raises:
        ValueError: an id is missing or occurs twice, so that a response could be assigned to another instruction.
    """
    rows = read_jsonl(path)
    check_ids(rows, str(path))
    return rows


def check_ids(rows: Iterable[Row], owner: str) -> None:
    """Refuse rows without an id, and ids that belong to several rows.

    Args:
        rows: the rows to check.
        owner: the file or source of the rows, for the error.

    Raises:
        ValueError: an id is missing or occurs twice; names the owner and an id.
    """
    found = Counter(row.get("id") for row in rows)
    if missing := sum(number for name, number in found.items() if not name):
        raise ValueError(
            f"{owner}: {missing} rows have no id. Make the file again with `python -m experiments.prepare`"
        )
    if repeated := [name for name, number in found.items() if number > 1]:
        raise ValueError(
            f"{owner}: {len(repeated)} ids belong to more than one row, e.g. '{repeated[0]}'. Make the "
            f"file again with `python -m experiments.prepare`"
        )
