"""How many steps a run has, and the learning rate at each of them."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from transformers import get_scheduler

from vit_dist.config import Config
from vit_dist.errors import UserError

POINTS = 11  # of the curve in a plan


def total_steps(config: Config, steps_per_epoch: int) -> int:
    asked = config.training["max_steps"]
    return asked if asked > 0 else math.ceil(config.training["num_train_epochs"] * steps_per_epoch)


def warmup_steps(config: Config, steps: int) -> int:
    """As `TrainingArguments.get_warmup_steps`: a value below 1 is a share of all steps."""
    asked = config.training["warmup_steps"] or 0
    return int(asked) if asked >= 1 else math.ceil(steps * asked)


def describe_rate(config: Config, rate: float, steps: int) -> str:
    """For people. `rate` is the actual one; how it came about is said where the recipe's was scaled."""
    text, warmup = f"{rate:g}", warmup_steps(config, steps)
    if reference := config.scaling.learning_rate_reference_batch:
        before, scaling = config.training["learning_rate"], config.scaling.learning_rate_scaling
        text += f" = {before:g} x {rate / before:g} ({scaling}, from a batch of {reference})"
    text += f", {str(config.training['lr_scheduler_type']).rpartition('.')[2].lower()}"
    text += f", {warmup:,} warm-up step{'s' if warmup > 1 else ''}" if warmup else ""
    return text + (f"; sgd with {momentum}" if (momentum := sgd_arguments(config.training)) else "")


def sgd_arguments(training: dict[str, Any]) -> str | None:
    """`--optim_args` of SGD, with momentum 0.9 unless another is given; None for another optimizer."""
    if str(training["optim"]).rpartition(".")[2].lower() != "sgd":
        return None
    given = str(training["optim_args"] or "").replace(" ", "").strip(",")
    if any(part.partition("=")[0] == "momentum" for part in given.split(",")):
        return given
    return ",".join(filter(None, (given, "momentum=0.9")))


def curve(config: Config, rate: float, steps: int) -> dict[int, float]:
    """The learning rate at some steps, by the scheduler that the run would use; empty if it follows a metric."""
    name = str(config.training["lr_scheduler_type"]).rpartition(".")[2].lower()
    if "plateau" in name:
        return {}
    given = config.training["lr_scheduler_kwargs"] or {}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    try:
        settings = json.loads(given) if isinstance(given, str) else dict(given)
        scheduler: Any = get_scheduler(
            config.training["lr_scheduler_type"], optimizer, warmup_steps(config, steps), steps, settings
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"lr_scheduler_type={name}: {' '.join(str(error).split())}; see --lr_scheduler_kwargs"
        ) from None
    shown = {round(i * (steps - 1) / (POINTS - 1)) for i in range(POINTS)}
    rates = {}
    for step in range(steps):
        if step in shown:
            rates[step] = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
    return rates
