"""The batch arithmetic: what is asked for, for a number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vit_dist.config import Config
from vit_dist.errors import UserError

MOST_ON_CPU = 32  # images at once; more are hardly faster there (docs/decisions.md, 2026-11-28)


@dataclass(frozen=True)
class Batch:
    """How a step's images are split: a device takes `per_device` at once, `accumulation` times.

    `note` is the reason, where it was found and not given.
    """

    per_device: int
    world_size: int
    accumulation: int
    note: str = ""

    @property
    def total(self) -> int:
        return self.per_device * self.world_size * self.accumulation

    @property
    def sizes(self) -> list[int]:
        """What a device could take at once, smallest first: the divisors of its share of the step."""
        share = self.per_device * self.accumulation
        return [size for size in range(1, share + 1) if share % size == 0]

    def split_into(self, per_device: int, note: str) -> Batch:
        """The same step with another of its `sizes` at once."""
        return replace(self, per_device=per_device, accumulation=self.total // self.world_size // per_device, note=note)

    def __str__(self) -> str:
        devices = f"{self.world_size} device{'s' if self.world_size > 1 else ''}"
        split = f"{self.total} = {self.per_device} per device x {devices} x {self.accumulation} accumulation"
        return f"{split} ({self.note})" if self.note else split


def split_batch(config: Config, world_size: int, keep: int | None = None) -> Batch:
    """The batch on `world_size` processes; `--global_batch_size` decides the accumulation.

    `keep` is the global batch of a run that goes on: it is split anew, with at most `per_device_train_batch_size`
    images at once on a device. With `auto` it is split as on CPUs; on GPUs `auto_batch` finds a better split.
    Raises UserError, with the nearest sizes that divide, for one that does not.
    """
    per_device = config.training["per_device_train_batch_size"]
    accumulation, asked = config.training["gradient_accumulation_steps"], config.scaling.global_batch_size
    if asked is not None and accumulation != 1:
        raise UserError(
            f"global_batch_size={asked} and gradient_accumulation_steps={accumulation}: the first decides the second; "
            "leave one of them out"
        )
    total = asked if keep is None else keep
    if config.finds_batch and total is not None:
        batch = _split_share(MOST_ON_CPU, world_size, total)
        share = batch.per_device * batch.accumulation
        more = f"; {share} has no larger divisor" if 2 * batch.per_device < min(share, MOST_ON_CPU) else ""
        return replace(batch, note=f"auto: at most {MOST_ON_CPU} at once on CPUs{more}")
    if keep is not None:
        return _split_share(per_device, world_size, keep)
    if asked is None:
        return Batch(per_device, world_size, accumulation)
    unit = per_device * world_size
    if asked % unit:
        below = asked // unit * unit
        nearest = [str(size) for size in (below, below + unit) if size]
        hint = f"the nearest that can: {' and '.join(nearest)}"
        if asked % world_size == 0:
            hint += f"; or --per_device_train_batch_size {_largest_divisor(asked // world_size, per_device)}"
        raise UserError(
            f"global_batch_size={asked} cannot be made of {per_device} per device x {world_size} processes; {hint}"
        )
    return Batch(per_device, world_size, asked // unit)


def _split_share(most: int, world_size: int, total: int) -> Batch:
    if total % world_size:
        sizes = [str(size) for size in range(1, total + 1) if total % size == 0]
        raise UserError(
            f"a global batch of {total} images cannot be shared by {world_size} processes; it can by {', '.join(sizes)}"
        )
    share = total // world_size
    per_device = _largest_divisor(share, most)
    return Batch(per_device, world_size, share // per_device)


def _largest_divisor(of: int, most: int) -> int:
    return next(size for size in range(min(most, of), 0, -1) if of % size == 0)


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
