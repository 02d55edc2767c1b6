"""Which of several processes this one is (under torchrun), for the stages that are plain loops."""

import atexit
import os
from typing import NamedTuple

import torch
import torch.distributed as dist


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
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
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


def wait_for_all() -> None:
    """Return once every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def leave_at_exit() -> None:
    """End the process group before the interpreter does: gloo's threads, left running, abort about one exit in ten."""
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
