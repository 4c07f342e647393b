"""Bytes and seconds that strategies send: limits, order, and sums by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vit_dist.cost import traffic
from vit_dist.cost.traffic import Collective, Group, bytes_per_step, collectives, seconds_per_step
from vit_dist.strategy import REDUCE_BUCKET

MODEL = {"weights": 86_600_000, "trained": 86_600_000, "blocks": 13, "size": 4}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")


def found(strategy: str, devices: int = 8, **other: Any) -> list[Collective]:
    shards = devices // 2 if strategy == "hsdp" else devices
    return collectives(strategy, devices=devices, shards=shards, **(MODEL | other))


def seconds(strategy: str, devices: int = 8, nodes: int = 1, speed: float = 50e9) -> float:
    return seconds_per_step(found(strategy, devices), lambda one: Group(one.devices, min(nodes, one.devices), speed))


def test_bytes_of_a_step_are_those_of_rings() -> None:
    ring, parameters = 7 / 8, MODEL["trained"]
    per_parameter = {"ddp": 8, "zero1": 12, "zero2": 12, "zero3": 12, "fsdp2": 12}
    for strategy, size in per_parameter.items():
        assert bytes_per_step(found(strategy)) == pytest.approx(ring * size * parameters)
    assert bytes_per_step(found("fsdp2"), 4) == pytest.approx(ring * 36 * parameters), "gradients once"
    assert bytes_per_step(found("zero3"), 4) == pytest.approx(ring * 48 * parameters)
    assert bytes_per_step(found("ddp"), 4) == bytes_per_step(found("ddp"))
    assert bytes_per_step(found("ddp", ddp_size=2)) == pytest.approx(ring * 4 * parameters)
    within, across = 3 / 4 * 12 * parameters, 2 * 1 / 2 * 4 * parameters / 4
    assert bytes_per_step(found("hsdp")) == pytest.approx(within + across)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seconds_grow_with_slower_links_devices_and_nodes(strategy: str) -> None:
    for rising in (
        [seconds(strategy, speed=speed) for speed in (1e12, 1e11, 1e10, 1e9)],
        [seconds(strategy, devices) for devices in (4, 8, 16, 32, 64)],
        [seconds(strategy, 8 * nodes, nodes) for nodes in (1, 2, 4, 32)],
    ):
        assert rising == sorted(rising) and rising[0] < rising[-1]
    assert collectives(strategy, devices=1, shards=1, **MODEL) == []
    sent = bytes_per_step(found(strategy)) / 1e9
    assert seconds(strategy, speed=1e9) == pytest.approx(sent, rel=5e-3), "a slow link: bytes alone"


def test_latency_is_the_smaller_of_ring_and_tree() -> None:
    assert Group(8, 1, math.inf).latency == pytest.approx(7 * traffic.HOP)
    assert Group(2, 2, math.inf).latency == pytest.approx(traffic.NETWORK_HOP)
    tree = 7 * traffic.HOP + 7 * traffic.NETWORK_HOP  # 128 nodes: 7 levels; the ring has 1,023 hops
    assert Group(1024, 128, math.inf).latency == pytest.approx(tree)
    one = Collective("all-reduce", 0.0, 3, 8)
    assert one.seconds(Group(8, 1, 1.0)) == pytest.approx(3 * 2 * 7 * traffic.HOP)


def test_bucket_is_the_one_that_deepspeed_gets() -> None:
    assert traffic.ZERO_BUCKET == REDUCE_BUCKET
