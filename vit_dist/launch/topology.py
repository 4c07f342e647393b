"""Which processes to start, and where: by flags of the command line, else by environment variables."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from vit_dist.errors import UserError
from vit_dist.launch.gpus import Gpus

FLAGS = {  # flag -> variable, help
    "nproc": ("NPROC_PER_NODE", "processes on this node (default: its visible GPUs)"),
    "nodes": ("NNODES", "nodes of the job; run the same command on each (1)"),
    "node_rank": ("NODE_RANK", "number of this node, counted from 0"),
    "master_addr": ("MASTER_ADDR", "name or address of node 0, as the other nodes reach it"),
    "master_port": ("MASTER_PORT", "free port of node 0 (29500; on one node any that is free)"),
    "replicas": ("HSDP_REPLICAS", "hsdp: copies of the sharded model (default: one per node)"),
}
HERE = "127.0.0.1"
PORT = 29500  # torchrun's default


@dataclass(frozen=True)
class Asked:
    """What was asked for: values, each with the flag or variable that gave it."""

    strategy: str | None
    values: Mapping[str, tuple[str, str]]
    dry_run: bool

    @classmethod
    def of(cls, flags: argparse.Namespace, environ: Mapping[str, str]) -> Asked:
        """Flags win over variables. An empty variable counts as unset."""
        values: dict[str, tuple[str, str]] = {}
        for name, (variable, _) in FLAGS.items():
            if (given := getattr(flags, name)) is not None:
                values[name] = given, f"--{name}"
            elif environ.get(variable):
                values[name] = environ[variable], variable
        dry_run = flags.dry_run or environ.get("DRY_RUN", "0") not in ("", "0", "no", "false")
        return cls(flags.strategy, values, dry_run)

    def text(self, name: str) -> str | None:
        return self.values[name][0] if name in self.values else None

    def label(self, name: str) -> str:
        """How messages name a value: as the user gave it, or else the variable."""
        return self.values[name][1] if name in self.values else FLAGS[name][0]

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """Raises UserError for anything but a whole number from `least` to `most`."""
        text = self.text(name)
        return default if text is None else whole(self.label(name), text, least, most)


@dataclass(frozen=True)
class Topology:
    """The processes of a job, as one of its nodes starts them."""

    nodes: int
    node_rank: int
    per_node: int  # processes on each node
    address: str  # of node 0
    port: int | None  # None: a free one

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node

    @property
    def listens(self) -> bool:
        """Whether this node holds the port that the others connect to."""
        return self.processes > 1 and self.node_rank == 0


def whole(label: str, text: str, least: int, most: int) -> int:
    """Raises UserError for anything but a whole number from `least` to `most`."""
    if not re.fullmatch("0|[1-9][0-9]{0,5}", text) or not least <= int(text) <= most:
        raise UserError(f"{label} is '{text[:60]}' on {host()}; set it to a whole number from {least} to {most}")
    return int(text)


def host() -> str:
    return socket.gethostname()


def read_topology(asked: Asked, gpus: Gpus, environ: Mapping[str, str] = os.environ) -> Topology:
    """The topology that was asked for; raises UserError if this node cannot have it."""
    nodes = asked.number("nodes", 1, 1, 99999)
    if nodes > 1:
        several = f"{asked.label('nodes')} is {nodes}, but"
        if asked.text("node_rank") is None:
            raise UserError(
                f"{several} NODE_RANK is not set on {host()}; set it (or --node_rank) to 0 on the first node, 1 on the "
                "next, and so on"
            )
        if asked.text("master_addr") is None:
            raise UserError(
                f"{several} MASTER_ADDR is not set on {host()}; set it (or --master_addr) on all nodes to the name or "
                "address of node 0"
            )
    node_rank = asked.number("node_rank", 0, 0, 99999)
    if node_rank >= nodes:
        raise UserError(
            f"{asked.label('node_rank')} is {node_rank}, but {asked.label('nodes')} is {nodes} on {host()}; ranks are "
            "counted from 0, and the number of nodes is the same on all of them"
        )
    port = asked.number("master_port", PORT, 1, 65535) if nodes > 1 or asked.text("master_port") else None
    # On one node an address is left over from another job.
    address = HERE if nodes == 1 else asked.text("master_addr") or HERE
    return Topology(nodes, node_rank, _per_node(asked, gpus, environ), address, port)


def _per_node(asked: Asked, gpus: Gpus, environ: Mapping[str, str]) -> int:
    promised = whole("GPUS_PER_NODE", environ.get("GPUS_PER_NODE") or "0", 0, 9999)
    if promised > gpus.count:
        why = gpus.why_none or "nvidia-smi lists no more"
        raise UserError(
            f"this job was given {promised} GPUs on {host()}, but {gpus.count} can be used ({why}); leave this node "
            "out, and report it to the administrators"
        )
    if asked.text("nproc") is None:
        if not gpus.count:
            raise UserError(
                f"no GPU on {host()} ({gpus.why_none}); set NPROC_PER_NODE=N or --nproc N to start N processes on CPUs"
            )
        return gpus.count
    per_node = asked.number("nproc", 1, 1, 9999)
    if gpus.count and per_node > gpus.count:
        raise UserError(
            f"{asked.label('nproc')} is {per_node}, but {host()} has {gpus.count} visible GPUs; ask for no more, or "
            "set CUDA_VISIBLE_DEVICES='' to start the processes on CPUs"
        )
    return per_node


def environment_of(topology: Topology, cores: int, environ: MutableMapping[str, str]) -> dict[str, str]:
    """Variables that the launcher and its processes read, without those that are set already."""
    found = {
        # What the processes find is compared with it.
        "VIT_DIST_PROCESSES": str(topology.processes),
        # vit_dist.launch.agent: node 0 leaves last.
        "VIT_DIST_NODE_RANK": str(topology.node_rank),
    }
    # Both launchers set 1 thread a process unless told otherwise, which leaves most cores of a CPU machine idle.
    defaults = {**FOR_LAUNCHERS, "OMP_NUM_THREADS": str(max(1, cores // topology.per_node))}
    if topology.nodes > 1:
        defaults["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # else each name that cannot be looked up is a warning
    whole("PET_SHUTDOWN_TIMEOUT", environ.get("PET_SHUTDOWN_TIMEOUT") or "110", 0, 86400)
    return found | {name: environ.get(name) or value for name, value in defaults.items()}


# torchrun's agent reads its options from these: signals to pass on to the processes, and how long it waits for the
# processes to commit a checkpoint before it kills them (seconds).
FOR_LAUNCHERS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
    "PET_SHUTDOWN_TIMEOUT": "110",
}
