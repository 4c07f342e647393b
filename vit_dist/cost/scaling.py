"""How much of its pace a device keeps when it also has to send: an arithmetic, nothing is measured here.

A step computes `accumulation` times forward and backward. What a strategy sends in it goes round rings: n devices pass
on (n-1)/n of a tensor to gather or to scatter it, twice that to sum it (Patarasuk & Yuan 2009,
doi.org/10.1016/j.jpdc.2008.09.002), and each collective waits for its hops. What is sent is first copied into a buffer
and what comes out of one, by the device that computes. The true step lies between two bounds: nothing is sent while
something is computed, or all that can be is. Seconds, bytes, bytes per second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# DDP reduces in buckets: Li et al. 2020, https://arxiv.org/abs/2006.15704, section 3.2; the first one is small.
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20
ZERO_BUCKET = 50_000_000  # elements; what strategy.REDUCE_BUCKET asks DeepSpeed for
FORWARD = 1 / 3  # of a micro-batch, by operations: the backward has two matrix products for each of the forward
# Seconds of a hop with large messages, NCCL's own estimates (src/graph/tuning.cc, ring, Simple): PCIe, network.
HOP, NETWORK_HOP = 5.7e-6, 14e-6


@dataclass(frozen=True)
class Step:
    """Seconds that one device computes in a step."""

    forward: float  # of one micro-batch
    backward: float  # of one micro-batch
    optimizer: float = 0.0
    accumulation: int = 1

    @classmethod
    def of(cls, micro_batch: float, accumulation: int = 1) -> Step:
        """Of one micro-batch's seconds, where the parts are not known; the optimizer counts with the backward."""
        return cls(FORWARD * micro_batch, (1 - FORWARD) * micro_batch, accumulation=accumulation)

    @property
    def seconds(self) -> float:
        return self.accumulation * (self.forward + self.backward) + self.optimizer


@dataclass(frozen=True)
class Link:
    """What a device can send to the next one of a ring."""

    bytes_per_second: float
    latency: float = 0.0  # seconds of a piece that goes once round


@dataclass(frozen=True)
class Send:
    """Collectives of one kind in one micro-batch."""

    kind: str  # all-reduce, all-gather, reduce-scatter
    size: float  # bytes of the whole tensors, all collectives together
    count: int
    devices: int
    during: str | None  # forward, backward: what can be computed meanwhile; None: nothing
    last_only: bool = False  # in the last micro-batch of a step, else in each
    ring: str = "world"  # or shards, replicas
    copied: float = 0.0  # bytes that the device reads and writes besides

    @property
    def rounds(self) -> int:
        return 2 if self.kind == "all-reduce" else 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return self.rounds * (self.devices - 1) / self.devices * self.size

    def seconds(self, link: Link) -> float:
        return self.sent / link.bytes_per_second + self.count * self.rounds * link.latency


def sends(
    strategy: str, *, weights: int, trained: int, blocks: int, devices: int, shards: int, size: int,
    accumulation: int = 1, ddp_size: int = 4,
) -> list[Send]:  # fmt: skip
    """What the strategy of configs/accelerate sends.

    `weights`, `trained`: parameters; `blocks`: what FSDP gathers one by one; `shards`: devices that share one copy of
    the weights; `size`: bytes of a value in the run's precision; `ddp_size`: of a gradient that DDP reduces.

    DDP reduces while the last backward runs; gradients are divided as they are copied into its buckets, and with bf16
    converted, divided, and converted back. FSDP2 gathers each block for every forward and backward and, as the Trainer
    has it, scatters gradients in the last backward only; it copies shards into a buffer, weights out of one and
    gradients into one (torch's fsdp/_fully_shard/_fsdp_collectives.py). DeepSpeed copies gradients into buckets,
    divides and joins them (runtime/zero/stage_1_and_2.py, comm/coalesced_collectives.py). ZeRO: Rajbhandari et al.
    2020, https://arxiv.org/abs/1910.02054, section 7, as DeepSpeed 0.19 does it: stages 1 and 2 sum gradients with an
    all-reduce (use_multi_rank_bucket_allreduce), wait for it (overlap_comm is off), and gather the weights after the
    optimizer; stages 2 and 3 do so for each micro-batch.
    """
    if devices == 1:
        return []
    if strategy == "ddp":
        count = 1 + math.ceil(max(0, ddp_size * trained - FIRST_BUCKET) / BUCKET)
        passes = 2 if ddp_size == 4 else 12
        return [
            Send("all-reduce", ddp_size * trained, count, devices, "backward", True, copied=passes * ddp_size * trained)
        ]
    gradients = size * trained
    if strategy in ("zero1", "zero2"):
        count, copied = math.ceil(trained / ZERO_BUCKET), (6 + 2 / devices) * gradients
        return [
            Send("all-reduce", gradients, count, devices, None, last_only=strategy == "zero1", copied=copied),
            Send("all-gather", gradients, 1, devices, None, last_only=True),
        ]
    ring, sharded = "shards" if strategy == "hsdp" else "world", size * weights
    into, back = 2 * sharded / shards, 0.0
    if strategy != "zero3" and size == 2:  # shards are float32, and change their type as well
        into, back = 10 * weights / shards, 6 * trained / shards
    gather = Send("all-gather", sharded, blocks, shards, "forward", ring=ring, copied=2 * sharded + into)
    copied = 6 * gradients if strategy == "zero3" else 2 * gradients + back
    scatter = Send("reduce-scatter", gradients, blocks, shards, "backward", strategy != "zero3", ring, copied)
    found = [gather, replace(gather, during="backward"), scatter]
    if strategy == "hsdp":
        found.append(
            Send("all-reduce", size * trained / shards, blocks, devices // shards, "backward", True, "replicas")
        )
    return found


def traffic(found: Sequence[Send], accumulation: int = 1) -> int:
    """Bytes that a device sends in a step."""
    return int(sum(send.sent * (1 if send.last_only else accumulation) for send in found))


def bounds(
    step: Step, found: Sequence[Send], link: Callable[[Send], Link], copies: float = math.inf
) -> tuple[float, float]:
    """Efficiency (1: as fast as a device alone) with nothing overlapped, and with all that can be.

    `copies`: bytes per second that the device reads and writes; copies are never hidden.
    """
    early = [send for send in found if not send.last_only]
    apart = (step.accumulation - 1) * sum(send.seconds(link(send)) for send in early)
    apart += sum(send.seconds(link(send)) for send in found)
    hidden = (step.accumulation - 1) * _waited(step, early, link) + _waited(step, found, link)
    seconds = step.seconds + sum(send.copied * (1 if send.last_only else step.accumulation) for send in found) / copies
    return step.seconds / (seconds + apart), step.seconds / (seconds + hidden)


def _waited(step: Step, found: Sequence[Send], link: Callable[[Send], Link]) -> float:
    """Seconds of a micro-batch in which nothing can be computed.

    Rings have links of their own and are busy at once. Of each kind one collective cannot be hidden: the first gather
    of a pass has nothing before it, its last reduction nothing after it.
    """
    total = sum(send.seconds(link(send)) for send in found if send.during is None)
    for name, seconds in (("forward", step.forward), ("backward", step.backward)):
        here = [send for send in found if send.during == name]
        busy = [sum(send.seconds(link(send)) for send in here if send.ring == ring) for ring in {s.ring for s in here}]
        edge = sum(send.seconds(link(send)) / send.count for send in here)
        total += max(edge, max(busy, default=0.0) - seconds)
    return total


def latency(devices: int, nodes: int) -> float:
    """Seconds that a piece takes once round a ring of `devices` on `nodes` machines."""
    return (devices - nodes) * HOP + (nodes - 1) * NETWORK_HOP
