"""The batch arithmetic and the learning rate that follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_dist.batch import Batch, scaled_learning_rate, split_batch
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.schedule import curve, total_steps, warmup_steps


def config(*flags: object) -> Config:
    return load_config(["digits", *map(str, flags)])


def test_batch_without_global_size_scales_with_the_processes() -> None:
    settings = config("--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 2)
    assert [split_batch(settings, n).total for n in (1, 2, 8)] == [32, 64, 256]
    assert str(split_batch(settings, 8)) == "256 = 16 per device x 8 devices x 2 accumulation"


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 16), (2, 8), (4, 4), (16, 1)])
def test_global_batch_decides_the_accumulation(processes: int, accumulation: int) -> None:
    settings = config("--per_device_train_batch_size", 16, "--global_batch_size", 256)
    assert split_batch(settings, processes) == Batch(16, processes, accumulation)


@pytest.mark.parametrize(
    ("asked", "per_device", "processes", "told"),
    [
        (100, 16, 2, "the nearest that can: 96 and 128; or --per_device_train_batch_size 10"),
        (30, 32, 1, "the nearest that can: 32; or --per_device_train_batch_size 30"),
        (63, 16, 2, "the nearest that can: 32 and 64"),
    ],
)
def test_global_batch_that_does_not_divide_is_refused(asked: int, per_device: int, processes: int, told: str) -> None:
    settings = config("--per_device_train_batch_size", per_device, "--global_batch_size", asked)
    with pytest.raises(UserError) as error:
        split_batch(settings, processes)
    assert str(error.value).endswith(told)


def test_accumulation_set_twice_is_refused() -> None:
    settings = config("--global_batch_size", 64, "--gradient_accumulation_steps", 2)
    with pytest.raises(UserError, match="leave one of them out"):
        split_batch(settings, 1)


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_learning_rate_is_scaled_from_its_reference_batch(scaling: str, factor: float) -> None:
    flags = ["--learning_rate", 1e-3, "--learning_rate_reference_batch", 32, "--learning_rate_scaling", scaling]
    settings = config("--per_device_train_batch_size", 16, *flags)
    assert scaled_learning_rate(settings, split_batch(settings, 8)) == pytest.approx(1e-3 * factor, rel=1e-12)
    assert scaled_learning_rate(settings, split_batch(settings, 2)) == 1e-3


def test_half_of_the_scaling_is_refused() -> None:
    for flags in (["--learning_rate_scaling", "linear"], ["--learning_rate_reference_batch", 32]):
        settings = config(*flags)
        with pytest.raises(UserError, match="needs --learning_rate_"):
            scaled_learning_rate(settings, split_batch(settings, 1))


def test_schedule_equals_the_trainers(tmp_path: Path) -> None:
    settings = config("--warmup_steps", 0.1, "--max_steps", 50, "--lr_scheduler_type", "cosine")
    assert (total_steps(settings, 7), warmup_steps(settings, 50)) == (50, 5)
    assert total_steps(config("--num_train_epochs", 2.5), 7) == 18
    rates = curve(settings, 1e-3, 50)
    assert rates[0] == 0 and max(rates.values()) == rates[5] == 1e-3 and rates[49] < 1e-5
