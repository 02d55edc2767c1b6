"""Ranks share out the work while they run, each number once."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
import torch

from drafter.ranks import deal, join, wait_for_all
from tests.training.test_faults import FORKED


def take(rank, port, folder):
    """Take numbers twice. Rank 1 is slow: it keeps its first until rank 0 has taken all others."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks, mine = join(), []
    for index, number in deal([10, 11, 12, 13, 14] if rank == 0 else [12], ranks.world_size):
        assert number == 10 + index
        mine.append(number)
        Path(folder, f"{number}").touch()
        while rank == 1 and len(list(Path(folder).glob("1?"))) < 5:
            time.sleep(0.01)
    wait_for_all()
    again = [number for _, number in deal([7, 8], ranks.world_size)]
    Path(folder, f"of-{rank}").write_text(json.dumps([mine, again]), encoding="utf-8")
    wait_for_all()


@pytest.mark.end_to_end
def test_a_slow_rank_takes_fewer_numbers_and_each_number_is_taken_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKED.Process(target=take, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (fast, again), (slow, also) = (json.loads((tmp_path / f"of-{rank}").read_text()) for rank in range(2))
    assert sorted(fast + slow) == [10, 11, 12, 13, 14]
    assert len(slow) <= 1
    assert sorted(again + also) == [7, 8]


def test_a_single_process_takes_all_numbers_in_order():
    assert list(deal([3, 1], 1)) == [(0, 3), (1, 1)]


@pytest.mark.parametrize(("processes", "backend"), [(2, "cpu:gloo,cuda:nccl"), (5, "gloo")])
def test_processes_beyond_the_number_of_gpus_share_them_and_do_without_nccl(monkeypatch, processes, backend):
    """NCCL refuses two ranks on one GPU, and there is no GPU with the number of the third rank."""
    chosen, backends = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **_: backends.append(name))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    devices = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        devices.append(join().device)
    assert devices == chosen == [torch.device("cuda", rank % 2) for rank in range(processes)]
    assert backends == [backend] * processes
