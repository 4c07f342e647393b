"""The arithmetic of sending: its limits, its order, and a measurement that it must allow."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vit_dist.cost import scaling
from vit_dist.cost.scaling import Link, Send, Step, bounds, latency, sends, traffic
from vit_dist.strategy import REDUCE_BUCKET

MODEL = {"weights": 86_600_000, "trained": 86_600_000, "blocks": 13, "size": 4}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")


def found(strategy: str, devices: int = 8, **other: Any) -> list[Send]:
    return sends(strategy, devices=devices, shards=devices // 2 if strategy == "hsdp" else devices, **(MODEL | other))


def predicted(
    strategy: str, devices: int = 8, *, speed: float = 50e9, delay: float = 0.0, accumulation: int = 1, **other: Any
) -> tuple[float, float]:
    step = Step.of(0.0913, accumulation)
    return bounds(step, found(strategy, devices, **other), lambda send: Link(speed, delay))


def test_ddp_on_eight_h100_is_as_it_was_measured() -> None:
    """ViT-B/16, float32 gradients, NVLink with 126 GB/s of bus bandwidth: a step of 91.3 ms took 95.9."""
    low, high = predicted("ddp", speed=126e9, delay=latency(8, 1))
    assert low < 91.3 / 95.9 < high
    assert high - low < 0.1, "a range that allows everything says nothing"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_limits(strategy: str) -> None:
    assert predicted(strategy, speed=math.inf) == (1, 1)
    assert sends(strategy, devices=1, shards=1, **MODEL) == [] and bounds(Step.of(1.0), [], lambda _: Link(1)) == (1, 1)
    assert max(predicted(strategy, speed=1.0)) < 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scaling_is_worse_with_slower_links_more_devices_and_latency(strategy: str) -> None:
    for one, other in (
        ([predicted(strategy, speed=speed) for speed in (1e9, 1e10, 1e11, 1e12)], "link"),
        ([predicted(strategy, devices, speed=1e10) for devices in (64, 32, 16, 8, 4)], "devices"),
        ([predicted(strategy, delay=delay) for delay in (1e-3, 1e-4, 0.0)], "latency"),
    ):
        lows, highs = zip(*one, strict=True)
        assert list(lows) == sorted(lows) and list(highs) == sorted(highs), other
        assert all(low <= high for low, high in one)


@pytest.mark.parametrize("speed", [1e9, 1e10, 1e11, 1e12])
def test_sharding_weights_costs_more_than_ddp(speed: float) -> None:
    ddp, fsdp2 = predicted("ddp", speed=speed), predicted("fsdp2", speed=speed)
    assert fsdp2[0] < ddp[0] and fsdp2[1] <= ddp[1]


def test_accumulation_amortises_ddp_but_not_the_gathers_of_fsdp2() -> None:
    slow: dict[str, Any] = {"speed": 5e9}
    ddp = [predicted("ddp", accumulation=count, **slow)[0] for count in (1, 8)]
    fsdp2 = [predicted("fsdp2", accumulation=count, **slow)[0] for count in (1, 8, 1000)]
    zero2 = [predicted("zero2", accumulation=count, **slow)[0] for count in (1, 1000)]
    assert 1 / ddp[1] - 1 == pytest.approx((1 / ddp[0] - 1) / 8)
    assert 1 / fsdp2[2] - 1 == pytest.approx((1 / fsdp2[0] - 1) * 2 / 3, rel=1e-2), "two of three parts stay"
    assert fsdp2[0] < fsdp2[1] < ddp[0]
    assert 1 / zero2[1] - 1 == pytest.approx((1 / zero2[0] - 1) * 2 / 3, rel=1e-2), "the gather is of the step"


def test_bytes_sent() -> None:
    ring, parameters = 7 / 8, MODEL["trained"]
    per_parameter = {"ddp": 8, "zero1": 12, "zero2": 12, "zero3": 12, "fsdp2": 12}
    for strategy, size in per_parameter.items():
        assert traffic(found(strategy)) == pytest.approx(ring * size * parameters)
    assert traffic(found("fsdp2"), 4) == pytest.approx(ring * 36 * parameters), "gradients once, weights for each"
    assert traffic(found("zero3"), 4) == pytest.approx(ring * 48 * parameters)
    assert traffic(found("ddp"), 4) == traffic(found("ddp"))
    assert traffic(found("ddp", ddp_size=2)) == pytest.approx(ring * 4 * parameters)
    within, across = 3 / 4 * 12 * parameters, 2 * 1 / 2 * 4 * parameters / 4
    assert traffic(found("hsdp")) == pytest.approx(within + across)


def test_communication_is_hidden_behind_computation() -> None:
    step, link = Step(1.0, 2.0), Link(1.0)
    hidden = Send("all-reduce", 4.0, 10, 2, "backward", last_only=True)  # 4 s in ten parts
    assert bounds(step, [hidden], lambda _: link)[1] == pytest.approx(3 / (3 + 2)), "2 of 4 s behind the backward"
    light = Send("all-reduce", 1.0, 10, 2, "backward", last_only=True)
    assert bounds(step, [light], lambda _: link)[1] == pytest.approx(3 / 3.1), "but for the last part"
    waited = Send("all-reduce", 4.0, 10, 2, None)
    assert bounds(step, [waited], lambda _: link) == (pytest.approx(3 / 7), pytest.approx(3 / 7))
    assert bounds(Step(1.0, 2.0, optimizer=3.0), [hidden], lambda _: link)[0] == pytest.approx(6 / 10)


def test_copies_are_never_hidden() -> None:
    step, link = Step(1.0, 2.0, accumulation=2), Link(math.inf)
    each = Send("all-gather", 4.0, 10, 2, "forward", copied=12.0)
    once = Send("all-reduce", 4.0, 10, 2, "backward", last_only=True, copied=8.0)
    assert bounds(step, [each, once], lambda _: link, copies=8.0) == (pytest.approx(6 / 10), pytest.approx(6 / 10))
    assert bounds(step, [each, once], lambda _: link) == (1, 1)


def test_bytes_copied() -> None:
    """For each parameter, as the operators that PyTorch and DeepSpeed call read and write them."""
    expected = {
        ("ddp", 4): 8, ("zero1", 4): 24 + 1, ("zero1", 2): 12 + 0.5, ("zero2", 4): 24 + 1,
        ("fsdp2", 4): 2 * (8 + 8 / 8) + 8, ("fsdp2", 2): 2 * (4 + 10 / 8) + 4 + 6 / 8,
        ("hsdp", 4): 2 * (8 + 8 / 4) + 8, ("zero3", 4): 2 * (8 + 8 / 8) + 24, ("zero3", 2): 2 * (4 + 4 / 8) + 12,
    }  # fmt: skip
    for (strategy, size), per_parameter in expected.items():
        total = sum(send.copied for send in found(strategy, size=size))
        assert total == pytest.approx(per_parameter * MODEL["trained"]), (strategy, size)
    (halved,) = found("ddp", ddp_size=2)
    assert halved.copied == 24 * MODEL["trained"], "less is sent, more is copied"


def test_scaling_with_a_second_ring_starts_at_once() -> None:
    step = Step(1.0, 2.0)
    one = Send("reduce-scatter", 8.0, 10, 2, "backward")
    other = Send("all-reduce", 4.0, 10, 2, "backward", ring="replicas")
    assert bounds(step, [one, other], lambda _: Link(1.0))[1] == pytest.approx(3 / (3 + 4 - 2))


def test_constants_of_others() -> None:
    assert scaling.ZERO_BUCKET == REDUCE_BUCKET
    assert latency(16, 2) == pytest.approx(14 * scaling.HOP + scaling.NETWORK_HOP)
