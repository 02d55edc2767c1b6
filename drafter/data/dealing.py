"""Deal the shards of a set that are still missing to the ranks, with random numbers that depend on the shard alone."""

from collections.abc import Callable, Iterator, Sequence

import torch

from drafter.artifacts import rows
from drafter.artifacts.storage import Folder
from drafter.progress import Report
from drafter.ranks import deal


def deal_missing(
    folder: Folder, sizes: Sequence[int], seed: int, world_size: int, report: Report
) -> Iterator[tuple[int, Callable[[int, int], None]]]:
    """Yield the number of each missing shard that falls to this rank, and a function that reports its progress.

    The random numbers are seeded with the number, so that any number of ranks, and a run that was interrupted, writes
    the same files. The function takes how many more items of the shard are done, and how many tokens they have.

    Args:
        folder: where shards are written. Those that are complete are left out.
        sizes: the number of items of each shard.
        seed: of the whole set.
        world_size: the number of ranks.
        report: is told how many items of the missing shards are done, and how many there are.
    """
    missing = rows.missing_shards(folder, len(sizes))
    total = sum(sizes[number] for number in missing)
    for index, number in deal(missing, world_size):
        torch.manual_seed(seed * 1_000_003 + number)
        done = sum(sizes[before] for before in missing[:index])

        def tell(items: int, tokens: int) -> None:
            nonlocal done
            done += items
            report(done, total, tokens)

        yield number, tell
