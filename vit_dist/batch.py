"""The batch arithmetic: what is asked for, for a number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vit_dist.config import Config
from vit_dist.errors import UserError


@dataclass(frozen=True)
class Batch:
    """How a step's images are split: a device takes `per_device` at once, `accumulation` times."""

    per_device: int
    world_size: int
    accumulation: int

    @property
    def total(self) -> int:
        return self.per_device * self.world_size * self.accumulation

    def __str__(self) -> str:
        devices = f"{self.world_size} device{'s' if self.world_size > 1 else ''}"
        return f"{self.total} = {self.per_device} per device x {devices} x {self.accumulation} accumulation"


def split_batch(config: Config, world_size: int) -> Batch:
    """The batch on `world_size` processes; `--global_batch_size` decides the accumulation.

    Raises UserError, with the nearest sizes that divide, for one that does not.
    """
    per_device = config.training["per_device_train_batch_size"]
    accumulation, asked = config.training["gradient_accumulation_steps"], config.scaling.global_batch_size
    if asked is None:
        return Batch(per_device, world_size, accumulation)
    if accumulation != 1:
        raise UserError(
            f"global_batch_size={asked} and gradient_accumulation_steps={accumulation}: the first decides the second; "
            "leave one of them out"
        )
    unit = per_device * world_size
    if asked % unit:
        below = asked // unit * unit
        nearest = [str(size) for size in (below, below + unit) if size]
        hint = f"the nearest that can: {' and '.join(nearest)}"
        if asked % world_size == 0:
            share = asked // world_size
            fits = next(size for size in range(min(per_device, share), 0, -1) if share % size == 0)
            hint += f"; or --per_device_train_batch_size {fits}"
        raise UserError(
            f"global_batch_size={asked} cannot be made of {per_device} per device x {world_size} processes; {hint}"
        )
    return Batch(per_device, world_size, asked // unit)


def scaled_learning_rate(config: Config, batch: Batch) -> float:
    """The learning rate for the batch at hand, if the recipe gives the one for a reference batch and how to scale.

    linear: Goyal et al. 2017, https://arxiv.org/abs/1706.02677; sqrt: Krizhevsky 2014, https://arxiv.org/abs/1404.5997.
    Raises UserError if only one of the two settings is there.
    """
    rate: float = config.training["learning_rate"]
    reference, scaling = config.scaling.learning_rate_reference_batch, config.scaling.learning_rate_scaling
    if reference is None and scaling != "none":
        raise UserError(
            f"learning_rate_scaling={scaling} needs --learning_rate_reference_batch: the batch that the rate is for"
        )
    if reference is None:
        return rate
    if scaling == "none":
        raise UserError(f"learning_rate_reference_batch={reference} needs --learning_rate_scaling linear or sqrt")
    factor = batch.total / reference
    return rate * (factor if scaling == "linear" else math.sqrt(factor))
