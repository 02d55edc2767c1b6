"""Ranks, the processes under torchrun, for the stages that are plain loops: joining them and sharing out the work."""

import atexit
import os
import secrets
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

TIMEOUT = timedelta(days=1)  # for ranks that wait while another one works on a shard or loads a model


class Ranks(NamedTuple):
    """This process among those that share the work.

    Attributes:
        rank: the number of this process, from 0.
        world_size: the number of processes.
        device: the device of this process.
        writes: whether this process writes results; with tensor parallelism all processes have the same ones.
    """

    rank: int
    world_size: int
    device: torch.device
    writes: bool = True

    @property
    def first(self) -> bool:
        """Whether this process finishes the stage on behalf of all."""
        return self.rank == 0 and self.writes


def join(together: bool = False) -> Ranks:
    """Join the process group that torchrun's environment describes, if it has several processes.

    If there are fewer GPUs than processes, they share them: a small model leaves a GPU idle while its kernels are
    launched. NCCL refuses that, so these processes talk through the CPU.

    Args:
        together: the ranks share every matrix product (see models.sharding) rather than the items of work. Each then
            has rank 0 of 1, and only the first one writes.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu")
    if gpus:
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        own_gpu = 0 < int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= gpus
        dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo", timeout=TIMEOUT)
    leave_at_exit()
    return Ranks(0, 1, device, rank == 0) if together else Ranks(rank, world_size, device)


def as_under_torchrun() -> None:
    """Set the environment variables that torchrun would set, in a submitit job with several tasks."""
    if "SUBMITIT_EXECUTOR" in os.environ and "RANK" not in os.environ:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        job = JobEnvironment()
        if job.num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
            group = {"GROUP_RANK": str(job.node), "GROUP_WORLD_SIZE": str(job.num_nodes)}
            os.environ.update(group, TORCHELASTIC_RUN_ID=str(job.job_id))


def deal(numbers: list[int], world_size: int) -> Iterator[tuple[int, int]]:
    """Yield (index, number) for the numbers that fall to this rank: each rank takes the next one when it is free.

    All ranks use the first rank's list. The count of numbers taken lies in the process group's store, which ends with
    the processes, so a restart deals again the number that a killed rank had taken.
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
    """Return once every rank has called this function."""
    if dist.is_initialized():
        dist.barrier()


def from_first(value: Any) -> Any:
    """Return the first rank's value on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def leave_at_exit() -> None:
    """Destroy the process group at exit, as gloo's threads otherwise abort about one exit in ten."""
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
