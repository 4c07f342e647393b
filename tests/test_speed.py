"""What a row says of speed and of what was waited for; the advice; profiles."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import rows
from lab import fork

from vit_dist import clock
from vit_dist.callbacks.speed import Speed, Step, data_advice
from vit_dist.checkpoint import store

FEW = ["--max_train_samples", 64, "--max_eval_samples", 20, "--max_predict_samples", 20, "--report_to", "none"]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which passes only where a test says so."""
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    return now


def speed(time: clock.Clock, **facts: Any) -> Speed:
    return Speed(time, Step(32, **facts), "eat more batches")


def train(one: Speed, now: list[float], steps: int, seconds: float) -> None:
    for _ in range(steps):
        now[0] += seconds
        one.on_step_end(*[SimpleNamespace()] * 3)


def logged(one: Speed) -> dict[str, Any]:
    logs: dict[str, Any] = {"loss": 1.0}
    one.on_log(*[SimpleNamespace()] * 3, logs=logs)  # type: ignore[arg-type]
    return logs


def test_row_has_rate_mfu_and_waits(now: list[float]) -> None:
    time = clock.Clock(torch.device("cpu"))
    one = speed(time, devices=2, flop=1e9, peak=80e9)
    train(one, now, steps=1, seconds=50)  # compiles
    train(one, now, steps=4, seconds=1.5)
    for what, seconds in (("data", 1.0), ("evaluation", 7.0), ("checkpoint", 0.5), ("data", 0.5)):
        with time.waiting(what):
            now[0] += seconds
    assert logged(one) == {
        "loss": 1.0, "images_per_second": 16.0, "mfu": 0.1, "data_wait": 1.5 / 8, "checkpoint_wait": 0.5 / 8,
    }  # fmt: skip
    train(one, now, steps=2, seconds=1)
    assert logged(one) == {"loss": 1.0, "images_per_second": 32.0, "mfu": 0.2, "data_wait": 0, "checkpoint_wait": 0}
    assert logged(one) == {"loss": 1.0}, "no step since"
    evaluation: dict[str, Any] = {"eval_loss": 1.0}
    one.on_log(*[SimpleNamespace()] * 3, logs=evaluation)  # type: ignore[arg-type]
    assert evaluation == {"eval_loss": 1.0}


def test_advice_for_a_starved_run_is_printed_once(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    time = clock.Clock(torch.device("cpu"))
    one = speed(time)
    logging.getLogger("vit_dist").propagate = True
    with caplog.at_level(logging.INFO, logger="vit_dist"):
        for _ in range(5):
            train(one, now, steps=10, seconds=1)
            with time.waiting("data"):
                now[0] += 10
            logged(one)
    assert [record.message for record in caplog.records] == [
        "51% of the time goes into waiting for data: eat more batches"  # the first of 50 steps does not count
    ]


def test_advice_after_one_slow_row_is_not_printed(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    time = clock.Clock(torch.device("cpu"))
    one = speed(time)
    logging.getLogger("vit_dist").propagate = True
    with caplog.at_level(logging.INFO, logger="vit_dist"):
        for waited in (0, 0, 0, 2, 0):
            train(one, now, steps=10, seconds=1)
            with time.waiting("checkpoint"):
                now[0] += waited
            logged(one)
    assert not caplog.records


@pytest.mark.parametrize(
    ("workers", "cores", "told"),
    [
        (0, 8, "--dataloader_num_workers 1 or more"),
        (2, 8, "than 2, there are 8 cores"),
        (7, 8, "cache where they are"),
    ],
)
def test_advice_about_data(workers: int, cores: int, told: str) -> None:
    assert told in data_advice(workers, cores)


def test_batches_are_waited_for(now: list[float]) -> None:
    def slow() -> Any:
        for batch in range(3):
            now[0] += 2.0
            yield batch

    time = clock.Clock(torch.device("cpu"))
    for _ in time.batches(slow()):
        now[0] += 1.0
    assert time.read() == (9.0, {"data": 6.0})


def test_clock_without_reader_does_not_grow(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a mark of a GPU wait for it: events are made up, of which the device has not passed the last three."""

    made: list[Event] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]
            made.append(self)

        def query(self) -> bool:
            return self not in made[-3:]

        def synchronize(self) -> None:
            assert self.query() or reading, "only a reading waits"

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(clock.torch.cuda, "Event", Event)
    reading, time = False, clock.Clock(torch.device("cuda"))
    for _ in range(100):
        with time.waiting("data"):
            now[0] += 1.0
        assert len(time._pending) <= 2
    reading = True
    assert time.read() == (100.0, {"data": 100.0})


@pytest.fixture(scope="module")
def two(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed") / "run"
    more = ["--max_steps", 14, "--logging_steps", 3, "--save_steps", 4, "--profile", 3, "--measure_peak", "true"]
    more += ["--keep_checkpoints"]
    fork(
        "digits", "--model", checkpoint, *FEW, *more, "--per_device_train_batch_size", 4, "--output_dir", folder,
        processes=2,
    )  # fmt: skip
    return folder


def test_rows_of_two_processes_have_their_waits(two: Path) -> None:
    found = [row for row in rows(two) if "loss" in row]
    assert [row["step"] for row in found] == [3, 6, 9, 12, 14]
    for row in found:
        assert row["images_per_second"] > 0 and 0 < row["mfu"] < 1
        assert 0 < row["data_wait"] < 1 and 0 <= row["checkpoint_wait"] < 1
        assert 0 <= row["communication_wait"] <= 1
    assert any(row["communication_wait"] for row in found), "PyTorch no longer measures it"
    assert any(row["checkpoint_wait"] for row in found)


def test_profile_has_a_trace_of_the_steps_for_each_process(two: Path) -> None:
    for rank in range(2):
        with gzip.open(two / f"profile/rank{rank}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        assert sum(event["name"].startswith("Optimizer.step#") for event in events) == 3


def test_checkpoint_has_no_rates(two: Path) -> None:
    state = json.loads((next(store.checkpoints(two)) / "trainer_state.json").read_text())
    assert state["log_history"] and not any("images_per_second" in row for row in state["log_history"])


def test_profile_of_a_short_run_is_refused_with_a_note(checkpoint: Path, tmp_path: Path) -> None:
    done = fork(
        "digits", "--model", checkpoint, *FEW, "--max_steps", 3, "--profile", 2, "--output_dir", tmp_path / "run"
    )
    assert "the profile is not made: it begins after 5 steps, and 3 are left to train" in done.stdout + done.stderr
    assert not (tmp_path / "run/profile").exists()
