"""The function by which long loops of the library report their progress; the caller chooses how to show it."""

from collections.abc import Callable

# report(done, total, tokens): all ranks together have finished `done` of `total` items (None: the total is unknown),
# and this rank has processed `tokens` tokens since its previous report.
Report = Callable[[int, int | None, int], None]


def silent(done: int, total: int | None, tokens: int) -> None:
    """Show nothing."""
