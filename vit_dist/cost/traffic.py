"""What each strategy sends in one optimizer step, and how long a given link takes for it. Nothing is measured here.

Units are bytes, seconds and bytes per second. Overlap with computation is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# DDP reduces in buckets: Li et al. 2020, https://arxiv.org/abs/2006.15704, section 3.2; the first one is small.
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20
ZERO_BUCKET = 50_000_000  # elements; what strategy.REDUCE_BUCKET asks DeepSpeed for
# Seconds of a hop with large messages, NCCL's own estimates (src/graph/tuning.cc, Simple): PCIe, network.
HOP, NETWORK_HOP = 5.7e-6, 14e-6


@dataclass(frozen=True)
class Group:
    """The processes of a collective, and the slowest link of a ring through them."""

    devices: int
    nodes: int
    bytes_per_second: float

    @property
    def latency(self) -> float:
        """Seconds until a small message has reached all: the smaller of NCCL's ring and tree."""
        within = self.devices / self.nodes - 1  # hops in each node; both algorithms chain a node's GPUs
        ring = (self.devices - self.nodes) * HOP + (self.nodes - 1) * NETWORK_HOP
        return min(ring, within * HOP + math.ceil(math.log2(self.nodes)) * NETWORK_HOP)


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one micro-batch."""

    kind: str  # all-reduce, all-gather, reduce-scatter
    size: float  # bytes of the whole tensors, all collectives together
    count: int
    devices: int
    last_only: bool = False  # in the last micro-batch of a step, else in each
    group: str = "world"  # or shards, replicas

    @property
    def rounds(self) -> int:
        return 2 if self.kind == "all-reduce" else 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends round a ring: Patarasuk & Yuan 2009, doi.org/10.1016/j.jpdc.2008.09.002."""
        return self.rounds * (self.devices - 1) / self.devices * self.size

    def seconds(self, group: Group) -> float:
        return self.sent / group.bytes_per_second + self.count * self.rounds * group.latency


def collectives(
    strategy: str, *, weights: int, trained: int, blocks: int, devices: int, shards: int, size: int, ddp_size: int = 4
) -> list[Collective]:
    """The collectives that a strategy of configs/accelerate runs.

    ZeRO: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 7, as DeepSpeed 0.19 implements it.
    Stages 1 and 2 sum gradients with an all-reduce (use_multi_rank_bucket_allreduce), then gather the weights.
    Stages 2 and 3 reduce gradients in each micro-batch. FSDP2 gathers each block for every forward and backward
    and, as the Trainer uses it, scatters gradients in the last backward only.

    Args:
        weights, trained: parameters.
        blocks: modules that FSDP gathers one by one.
        shards: devices that share one copy of the weights.
        size: bytes of a value in the run's precision.
        ddp_size: bytes of a gradient that DDP reduces.
    """
    if devices == 1:
        return []
    if strategy == "ddp":
        count = 1 + math.ceil(max(0, ddp_size * trained - FIRST_BUCKET) / BUCKET)
        return [Collective("all-reduce", ddp_size * trained, count, devices, last_only=True)]
    gradients = size * trained
    if strategy in ("zero1", "zero2"):
        count = math.ceil(trained / ZERO_BUCKET)
        return [
            Collective("all-reduce", gradients, count, devices, last_only=strategy == "zero1"),
            Collective("all-gather", gradients, 1, devices, last_only=True),
        ]
    group = "shards" if strategy == "hsdp" else "world"
    gather = Collective("all-gather", 2 * size * weights, 2 * blocks, shards, group=group)  # forward and backward
    found = [gather, Collective("reduce-scatter", gradients, blocks, shards, strategy != "zero3", group)]
    if strategy == "hsdp":
        found.append(replace(found[1], kind="all-reduce", size=gradients / shards, devices=devices // shards,
                             group="replicas"))  # fmt: skip
    return found


def bytes_per_step(found: Sequence[Collective], accumulation: int = 1) -> int:
    """Bytes that a device sends in an optimizer step of `accumulation` micro-batches."""
    return int(sum(one.sent * (1 if one.last_only else accumulation) for one in found))


def seconds_per_step(found: Sequence[Collective], group: Callable[[Collective], Group], accumulation: int = 1) -> float:
    """Seconds of all collectives of an optimizer step, one after the other."""
    return sum(one.seconds(group(one)) * (1 if one.last_only else accumulation) for one in found)
