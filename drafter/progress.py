"""How the long loops of the library report how far they are. What is shown of it is up to the caller."""

from collections.abc import Callable

# report(done, total, tokens): all ranks have finished `done` of `total` items (None: unknown number), and this rank has
# processed `tokens` tokens since its previous report.
Report = Callable[[int, int | None, int], None]


def silent(done: int, total: int | None, tokens: int) -> None:
    """Show nothing."""
