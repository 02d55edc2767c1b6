"""Which rows of several sources are used: from each in turn, up to a number for each split; all others are counted."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from drafter.artifacts.manifest import read_jsonl

Row = dict[str, Any]


class Candidate(NamedTuple):
    """A row for one of the splits, or the reason why a source's row gives none; `absent` are the fields it lacks."""

    row: Row
    split: str
    left_out: str | None = None
    absent: tuple[str, ...] = ()


@dataclass
class Tally:
    """What became of the rows of a source. Rows behind the last that was needed are not read, and not counted.

    Attributes:
        shortest: tokens of the shortest prompt that was too long.
    """

    read: int = 0
    used: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)
    shortest: int | None = None

    def counts(self) -> dict[str, Any]:
        """For a manifest: read = used + left out."""
        counts: dict[str, Any] = {"read": self.read, "used": dict(self.used), "left_out": dict(self.left_out)}
        return counts | ({"rows_that_lack": dict(self.absent)} if self.absent else {})

    def __str__(self) -> str:
        """For a log."""
        used = f"{self.used.total()} used"
        if len(self.used) > 1:
            used += " (" + ", ".join(f"{number} for {split}" for split, number in self.used.items()) + ")"
        reasons = "".join(f", {number} {reason}" for reason, number in self.left_out.items())
        lacking = "".join(f"; {number} lack the field {name}, which is empty" for name, number in self.absent.items())
        return f"{self.read} rows read, {used}{reasons}{lacking}"


class Selection:
    """Rows by split from several streams of candidates.

    Args:
        streams: source -> its candidates.
        quotas: split -> how many rows are wanted; None: all.
        limit: the most tokens that a row may have.
        length: a row's tokens; None where the row cannot be encoded.
        weights: source -> how often it is drawn from, relative to the others; without, all are drawn from in turn.
    """

    def __init__(
        self,
        streams: Mapping[str, Iterator[Candidate]],
        quotas: Mapping[str, int | None],
        limit: int,
        length: Callable[[Row], int | None],
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
        """The rows of a split: each comes from the source that has given the least for its weight."""
        chosen: list[Row] = []
        given = dict.fromkeys(self.streams, 0)
        while given and (quota is None or len(chosen) < quota):
            name = min(given, key=lambda name: (given[name] + 1) / self.weights[name])
            row = self._next(name, split)
            if row is None:
                del given[name]
            else:
                given[name] += 1
                self.tallies[name].used[split] += 1
                chosen.append(row)
        self.quotas = {**self.quotas, split: 0}
        return chosen

    def _next(self, name: str, wanted: str) -> Row | None:
        """A source's next row of a split; those of the other splits wait until they are wanted."""
        waiting, tally = self._waiting[name], self.tallies[name]
        if waiting[wanted]:
            return waiting[wanted].popleft()
        for row, split, left_out, absent in self.streams[name]:
            tally.read += 1
            tally.absent.update(absent)
            quota = self.quotas[split] if not left_out else None
            if not left_out and quota is not None and len(waiting[split]) >= quota:
                left_out = "not needed"
            if reason := left_out or self._unfit(row, tally):
                tally.left_out[reason] += 1
            elif split == wanted:
                return row
            else:
                waiting[split].append(row)
        return None

    def _unfit(self, row: Row, tally: Tally) -> str | None:
        tokens = self.length(row)
        if tokens is None:
            return "with control tokens that cannot be encoded as text"
        if tokens > self.limit:
            tally.shortest = min(tokens, tally.shortest or tokens)
            return "too long"
        return None


def read_instructions(path: str | Path) -> list[Row]:
    """The rows of an instructions.jsonl.

    Raises:
        ValueError: an id is missing, or there twice, so that an answer could be given to another's question.
    """
    rows = read_jsonl(path)
    check_ids(rows, str(path))
    return rows


def check_ids(rows: Iterable[Row], owner: str) -> None:
    """Refuse rows without an id, and an id of two rows.

    Raises:
        ValueError: names the row or the id.
    """
    found = Counter(row.get("id") for row in rows)
    if missing := sum(number for name, number in found.items() if not name):
        raise ValueError(
            f"{owner}: {missing} rows have no id. Make the file again with `python -m experiments.prepare`"
        )
    if doubled := [name for name, number in found.items() if number > 1]:
        raise ValueError(
            f"{owner}: {len(doubled)} ids belong to more than one row, e.g. '{doubled[0]}'. Make the "
            f"file again with `python -m experiments.prepare`"
        )
