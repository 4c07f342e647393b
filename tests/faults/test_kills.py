"""SIGKILL, wherever it hurts: the same command again ends with the bits of a run that nobody disturbed."""

from __future__ import annotations

import random
import signal
import threading
import time
from typing import Any

import pytest
from lab import Lab, committed, fingerprint, still_running

from vit_dist.checkpoint import store

RANK_0 = ("before_stage", "after_weights", "after_optimizer", "after_write", "before_manifest", "before_rename",
          "after_rename", "mid_prune")  # fmt: skip
RANK_1 = ("before_snapshot", "after_snapshot", "before_stage", "before_check", "before_write", "after_write",
          "before_commit", "after_commit")  # fmt: skip


@pytest.mark.draw(4)
@pytest.mark.parametrize(("rank", "point"), [*((0, point) for point in RANK_0), *((1, point) for point in RANK_1)])
def test_run_killed_in_a_save_ends_with_the_same_bits(lab: Lab, whole: dict[int, Any], rank: int, point: str) -> None:
    folder = lab.root / f"{point}{rank}"
    count = 2 if point == "mid_prune" else 4  # of six saves; the second deletion is at the fourth or fifth
    codes = lab.start(folder, processes=2, fault=f"{point}:{rank}:{count}:kill9").wait()
    assert codes[rank] == -signal.SIGKILL and 0 not in codes
    steps = committed(folder)
    assert steps and max(steps) >= 15, "at most one save is lost"
    again = lab.run(folder, processes=2)
    assert f"from checkpoint-{max(steps)}" in again.output
    assert fingerprint(folder) == whole[2]
    assert not (folder / ".staging").exists() and not (folder / ".trash").exists()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("processes", "wanted"), [(1, 3), (2, 3), *(pytest.param(n, 25, marks=pytest.mark.slow) for n in (1, 2))]
)
def test_run_killed_at_random_times_ends_with_the_same_bits(
    lab: Lab, whole: dict[int, Any], pytestconfig: pytest.Config, processes: int, wanted: int
) -> None:
    """One rank, or the whole job; each attempt gets further or is not counted as stuck."""
    chance = random.Random(pytestconfig.getoption("seed") + processes)
    folder, kills = lab.root / f"random{processes}_{wanted}", 0
    redone: list[int] = []
    for attempt in range(20 * wanted):
        job = lab.start(folder, "--allow_change", "restarts", processes=processes)
        if kills == wanted:
            assert set(job.wait()) == {0}, job.output
            break
        time.sleep(chance.uniform(0.5, 4.0))
        before = max(committed(folder), default=0) if folder.exists() else 0
        job.signal(signal.SIGKILL, chance.choice([None, *range(processes)]))
        codes = job.wait()
        kills += -signal.SIGKILL in codes
        assert max(committed(folder), default=0) >= before, "what was committed stays"
        redone.append(before)
        if set(codes) == {0}:  # it was done before it was killed: once more, from the beginning
            assert fingerprint(folder) == whole[processes]
            folder = lab.root / f"random{processes}_{wanted}_{attempt}"
    assert kills == wanted
    assert fingerprint(folder) == whole[processes]


def test_checkpoints_while_every_step_saves_always_include_a_verified_one(lab: Lab) -> None:
    """Looked at all the time by another thread, from the first commit on, while every step saves and deletes."""
    folder, seen, missing, over = lab.root / "watched", 0, [], threading.Event()

    def look() -> None:
        nonlocal seen
        while not over.is_set():
            whole = 0
            for path in list(store.checkpoints(folder)):
                try:
                    whole += store.integrity_error(path) is None
                except OSError:  # deleted while we read it: the next one must be there
                    continue
            if whole:
                seen += 1
            elif seen and not any(store.integrity_error(path) is None for path in store.checkpoints(folder)):
                missing.append(time.monotonic())

    watcher = threading.Thread(target=look)
    job = lab.start(folder, "--save_steps", 1, "--eval_steps", 1, "--save_total_limit", 1)
    watcher.start()
    try:
        assert set(job.wait()) == {0}, job.output
    finally:
        over.set()
        watcher.join()
    assert seen > 20 and not missing
    assert len(committed(folder)) <= 2  # the last and the best


@pytest.mark.launch
def test_launcher_killed_makes_its_processes_save_and_leave(lab: Lab, whole: dict[int, Any]) -> None:
    """With the real launcher: kill -9 of torchrun leaves its workers, whose sessions are their own."""
    import subprocess

    import psutil
    from conftest import command, rows

    folder = lab.root / "orphans"
    launched = subprocess.Popen(
        command("torchrun", 2, *lab.args, "--per_device_train_batch_size", 4, "--output_dir", folder,
                "--max_steps", 100_000, "--save_steps", 100_000, "--eval_strategy", "no"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not rows(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(launched.pid).children(recursive=True)
    launched.kill()
    launched.wait()
    assert workers and not still_running(workers, 10), "an orphan after 10 s"
    assert len(committed(folder)) == 1, "the step at hand was saved; no save was due"
