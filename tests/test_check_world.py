"""Counts that a launcher was given are compared with what the processes find."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fork_ranks import fork_ranks

from vit_dist import distributed
from vit_dist.arguments import build_arguments
from vit_dist.batch import Batch
from vit_dist.config import load_config
from vit_dist.errors import UserError


def as_arguments(rank: int, world_size: int = 1) -> Any:
    return SimpleNamespace(device=torch.device("cpu"), process_index=rank, world_size=world_size, n_gpu=0)


def call(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo")
    told = {"VIT_DIST_CPUS": "1", "LOCAL_WORLD_SIZE": "2"}
    rank_table, allreduce_report = distributed.check_world(as_arguments(rank), told)
    assert allreduce_report.startswith("all-reduce of 1 to 2: 3, in ")
    assert [row[0] for row in rank_table] == ["rank", "0", "1"] and {row[2] for row in rank_table[1:]} == {"cpu"}
    assert len({row[-1] for row in rank_table[1:]}) == 2, "each has a process of its own"
    with pytest.raises(UserError, match=f"the job has 2 nodes, but its 2 processes run on 1: {os.uname().nodename}"):
        distributed.check_world(as_arguments(rank), {"VIT_DIST_HOSTS": "2"})
    if rank == 1:  # a device that does not add up
        distributed.add_up = lambda tensor: dist.all_reduce(tensor.mul_(2))
    with pytest.raises(UserError, match=r"an all-reduce of 1 to 2 gave 5, not 3"):
        distributed.check_world(as_arguments(rank), told)
    Path(folder, str(rank)).touch()


def test_ranks_that_are_not_where_they_should_be_are_refused(tmp_path: Path) -> None:
    fork_ranks(call, 2, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_launch_with_fewer_processes_than_started_is_refused() -> None:
    with pytest.raises(UserError, match="4 processes were to be started, but 1 found each other"):
        distributed.check_launch(as_arguments(0), {"VIT_DIST_PROCESSES": "4"})
    distributed.check_launch(as_arguments(0), {"VIT_DIST_PROCESSES": "1"})


def test_cores_are_shared_by_the_processes_of_a_host() -> None:
    usable = len(os.sched_getaffinity(0))
    assert distributed.cores({}) == usable and distributed.cores({"VIT_DIST_CPUS": "1"}) == 1
    assert distributed.cores({"LOCAL_WORLD_SIZE": str(4 * usable)}) == 1, "never none"


def test_gpus_that_pytorch_does_not_see_refuse_training_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("GPUS_PER_NODE", "2")
    with pytest.raises(UserError, match=r"has GPUs for this job, but PyTorch .* sees none"):
        build_arguments(load_config(["digits"]), Batch(32, 1, 1))
