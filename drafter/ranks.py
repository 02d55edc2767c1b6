"""Which of several processes this one is (under torchrun), for the stages that are plain loops."""

import atexit
import os
import secrets
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

LONGEST = timedelta(days=1)  # that ranks wait for each other: as long as a shard takes, or the loading of a model


class Ranks(NamedTuple):
    """This process's share of the work, how many shares there are, its device, and whether it writes what it makes."""

    rank: int
    world_size: int
    device: torch.device
    writes: bool = True

    @property
    def first(self) -> bool:
        """Whether it finishes a stage for all of them."""
        return self.rank == 0 and self.writes


def join(together: bool = False) -> Ranks:
    """Read torchrun's environment and join its process group; alone, there is nothing to join.

    Args:
        together: all ranks do all of the work at once, each a part of every product (see sharding); one of them writes.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, on_gpu = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=LONGEST)
    leave_at_exit()
    device = torch.device(f"cuda:{local}" if on_gpu else "cpu")
    return Ranks(0, 1, device, rank == 0) if together else Ranks(rank, world_size, device)


def as_under_torchrun() -> None:
    """In a submitit job of several tasks, on SLURM or this machine: the environment that torchrun would give each."""
    if "SUBMITIT_EXECUTOR" in os.environ and "RANK" not in os.environ:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        job = JobEnvironment()
        if job.num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
            group = {"GROUP_RANK": str(job.node), "GROUP_WORLD_SIZE": str(job.num_nodes)}
            os.environ.update(group, TORCHELASTIC_RUN_ID=str(job.job_id))


def deal(numbers: list[int], world_size: int) -> Iterator[tuple[int, int]]:
    """Yield those of the numbers that are this rank's, each with its index: every rank takes the next when it is free.

    The list is the first rank's. How many numbers are taken is counted in the store of the process group, which ends
    with the processes, so that a number that a killed rank had taken is dealt again to the next start.
    """
    if world_size == 1:
        yield from enumerate(numbers)
        return
    agreed: list[Any] = [numbers, secrets.token_hex(8)]
    dist.broadcast_object_list(agreed, src=0)
    numbers, name = agreed
    server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(name, server)
    while (index := store.add("taken", 1) - 1) < len(numbers):
        yield index, numbers[index]


def wait_for_all() -> None:
    """Return once every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def leave_at_exit() -> None:
    """End the process group before the interpreter does: gloo's threads, left running, abort about one exit in ten."""
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
