"""Which of several processes this one is (under torchrun), for the stages that are plain loops."""

import atexit
import os
from typing import NamedTuple

import torch
import torch.distributed as dist


class Ranks(NamedTuple):
    """This process's number, how many there are, and its device."""

    rank: int
    world_size: int
    device: torch.device


def join() -> Ranks:
    """Read torchrun's environment and join its process group; alone, there is nothing to join."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    leave_at_exit()
    local = int(os.environ.get("LOCAL_RANK", 0))
    return Ranks(rank, world_size, torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu"))


def wait_for_all() -> None:
    """Return once every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def leave_at_exit() -> None:
    """End the process group before the interpreter does: gloo's threads, left running, abort about one exit in ten."""
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
