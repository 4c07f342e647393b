"""The GPUs and links that a run is planned for."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass

from vit_dist.errors import UserError

GPU_MEMORY = {  # decimal GB, as they are sold; about 1 % less can be allocated
    "h200": 141, "h100": 80, "a100": 80, "a100-40": 40, "l40s": 48, "a6000": 48, "a10": 24, "l4": 24, "rtx4090": 24,
    "rtx3090": 24, "v100": 32, "t4": 16,
}  # fmt: skip
LINKS = {  # GB/s in one direction, peaks: of a GPU's NVLink or slot, of one network card
    "nvlink": 450, "nvlink-a100": 300, "pcie4": 32, "pcie5": 64, "ib400": 50, "ib200": 25, "eth100": 12.5, "eth25": 3.1,
    "eth10": 1.25,
}  # fmt: skip


@dataclass(frozen=True)
class ClusterSpec:
    nodes: int
    gpus: int  # on each node
    gpu: str | None
    memory: float | None  # bytes of one GPU
    replicas: int  # of the sharded model, with hsdp
    link: float | None  # bytes per second over the slowest link of a ring through all GPUs
    node_link: float | None  # the same, within a node
    cpu: bool = False  # the CPU of this machine, in one process

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus


def read_cluster_spec(asked: argparse.Namespace, on_cpu: bool = False) -> ClusterSpec:
    """Of the flags of `vit-dist plan`; `on_cpu`: this machine's CPU unless they name machines. Raises UserError."""
    named = ("gpus", "nodes", "gpu", "gpu_memory", "link", "node_link", "replicas")
    on_cpu = on_cpu and asked.strategy in ("auto", "single") and all(getattr(asked, name) is None for name in named)
    asked.gpus, asked.nodes = (1 if count is None else count for count in (asked.gpus, asked.nodes))
    for name in ("gpus", "nodes"):
        if getattr(asked, name) < 1:
            raise UserError(f"--{name} {getattr(asked, name)}: give at least 1")
    if asked.gpu is not None and asked.gpu.lower() not in GPU_MEMORY:
        raise UserError(f"--gpu {asked.gpu}: not in the list ({', '.join(GPU_MEMORY)}); give --gpu_memory in GB")
    memory = asked.gpu_memory if asked.gpu_memory is not None else GPU_MEMORY.get((asked.gpu or "").lower())
    if memory is not None and not 0 < memory < math.inf:
        raise UserError(f"--gpu_memory {memory:g}: give a number of GB above 0")
    if asked.images_per_second is not None and not 0 < asked.images_per_second < math.inf:
        raise UserError(f"--images_per_second {asked.images_per_second}: give a number above 0")
    if on_cpu:
        return ClusterSpec(1, 1, None, None, 1, None, None, cpu=True)
    if asked.node_link is not None and asked.nodes == 1:
        raise UserError(f"--node_link {asked.node_link}: there is one node; give --link")
    replicas, processes = asked.replicas or asked.nodes, asked.nodes * asked.gpus
    if not 1 <= replicas <= processes or processes % replicas:
        raise UserError(f"--replicas {replicas}: {processes} GPUs cannot be shared by as many; give a divisor")
    machines = ClusterSpec(
        asked.nodes, asked.gpus, asked.gpu, None if memory is None else memory * 1e9, replicas,
        _link("link", asked.link), _link("node_link", asked.node_link),
    )  # fmt: skip
    if asked.strategy != "auto" and asked.strategy not in valid_strategies(machines):
        raise UserError(
            f"--strategy {asked.strategy} is not for {asked.nodes} x {asked.gpus} GPUs; there are "
            f"{', '.join(valid_strategies(machines))}" + ("; hsdp needs --replicas 2 or more" if asked.gpus > 3 else "")
        )
    return machines


def valid_strategies(machines: ClusterSpec) -> list[str]:
    if machines.cpu:
        return ["single"]
    if machines.processes == 1:
        return ["single", "zero2", "zero3_offload"]
    hsdp = ["hsdp"] if 1 < machines.replicas < machines.processes else []
    return ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", *hsdp]


def is_named(gpu: str | None, device: str) -> bool:
    """Whether `--gpu` may mean a device: h100 "NVIDIA H100 80GB HBM3", rtx4090 "NVIDIA GeForce RTX 4090", but l4 not
    "NVIDIA L40S". None may be any.
    """
    name = re.sub(r"(?<=\D)(?=\d)", " ?", (gpu or "").lower().partition("-")[0])
    return bool(re.search(rf"\b{name}(?!\d)", device.lower()))


def _link(flag: str, asked: str | None) -> float | None:
    if asked is None:
        return None
    try:
        speed = LINKS.get(asked.lower()) or float(asked)
    except ValueError:
        speed = 0.0
    if not 0 < speed < math.inf:
        raise UserError(f"--{flag} {asked}: give GB/s, or one of {', '.join(LINKS)}")
    return speed * 1e9
