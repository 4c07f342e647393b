"""A process that fails, hangs, or has no memory left ends the whole job soon, and says what it was at."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import command, rows
from lab import ARGS, Lab, committed, status, still_running

from vit_dist import stop


@pytest.fixture(scope="module")
def lab(photos: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("ends"), ["--data", photos, "--model", checkpoint, *ARGS])


def launched(lab: Lab, folder: Path, fault: str, *args: object) -> tuple[float, str]:
    """Through torchrun; the seconds from the fault's step being logged to the end of all, and what was printed."""
    process = subprocess.Popen(
        command("torchrun", 2, *lab.args, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--output_dir",
                folder, *args, module="faulty_train"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "VIT_DIST_FAULT": fault, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(row["step"] >= 6 for row in rows(folder)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begun = time.monotonic()
    family = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
    output = process.communicate(timeout=100)[0]
    assert not still_running(family, 1), "a process was left behind"
    assert process.returncode == 1
    return time.monotonic() - begun, output


def failure(folder: Path) -> dict[str, object]:
    return json.loads((folder / "failure.json").read_text())


@pytest.mark.launch
def test_out_of_memory_on_one_rank_ends_all_with_a_suggestion(lab: Lab) -> None:
    seconds, output = launched(lab, lab.root / "oom", "before_optim:1:7:oom")
    assert seconds < 10
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    for said in ("out of memory", "--per_device_train_batch_size", "--activation_checkpointing", "zero2", "Rank 1: "):
        assert said in line
    assert re.search(r"resident \d+\.\d\d GB", line)
    record = failure(lab.root / "oom")
    assert (record["rank"], record["step"]) == (1, 6) and "OutOfMemoryError" in str(record["reason"])
    assert status(lab.root / "oom")["state"] == "failed" and committed(lab.root / "oom") == [5]


@pytest.mark.launch
def test_rank_that_hangs_is_noticed_on_all(lab: Lab) -> None:
    """It sleeps; the other waits for it in a collective, where PyTorch's own time-out does not work on CPUs."""
    folder = lab.root / "hang"
    seconds, output = launched(lab, folder, "before_optim:1:7:sleep:90", "--hang_timeout", "4s")
    assert 3 < seconds < 4 + 10
    assert "no step for" in output
    stacks = {rank: (folder / f"stacks-rank-{rank}.txt").read_text() for rank in (0, 1)}
    assert "points.py" in stacks[1] and "_get_grad_norm" not in stacks[0]
    assert "no step for" in str(failure(folder)["reason"]) and status(folder)["state"] == "failed"
    lab.run(folder, "--logging_steps", 1, processes=2)
    assert status(folder)["state"] == "complete"


def test_killed_rank_is_named_by_another(lab: Lab) -> None:
    """It cannot say anything itself, and the traceback of the one that waited for it would mislead."""
    folder = lab.root / "killed"
    job = lab.start(folder, processes=2, fault="before_optim:1:7:kill9,before_optim:1:7:sleep:1")
    assert job.wait(60) == [1, -signal.SIGKILL], job.output
    record, pid = failure(folder), job.pids[1]
    said = f"rank 1 (process {pid} on {socket.gethostname()}) is gone: killed from outside, or out of memory"
    assert (record["reason"], record["rank"], record["noticed_by_rank"]) == (said, None, 0)
    assert [status(folder)[key] for key in ("state", "reason", "attempt", "step")] == ["failed", said, 1, 5]
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert said in line and "Traceback" not in job.output
    lab.run(folder, processes=2)
    assert status(folder)["state"] == "complete" and not (folder / "failure.json").exists()


@pytest.mark.parametrize("late", ["", "late"])
@pytest.mark.parametrize("what", ["gradient", "weight"])
def test_nan_on_one_rank_stops_all_and_is_never_saved(lab: Lab, what: str, late: str) -> None:
    """On one rank; before the step, or on GPUs before anything is kept. In an image's pixels: test_failures.py."""
    folder = lab.root / f"nan_{what}{late}"
    job = lab.run(folder, processes=2, expect=2, POISON=f"{what}:1:7", LOOK_LATE=late)
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    when = "noticed later, and nothing since was saved" if late else "before the optimizer step"
    assert f"the {'loss' if what == 'weight' else what} is NaN or infinite at step 7, {when}" in line
    assert ("rank 1: images" in line) == (what == "weight") and "rank 0" not in line
    assert committed(folder) == [5] and status(folder)["state"] == "failed"
    lab.run(folder, processes=2)
    assert status(folder)["state"] == "complete"


def test_slow_report_at_the_end_is_no_hang(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_dist.run import report

    check = report.check_export

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(6)
        check(*args, **kwargs)

    monkeypatch.setattr(report, "check_export", slow)
    lab.run(lab.root / "slow_end", "--hang_timeout", "3s", processes=2)


@pytest.mark.parametrize("name", ["best", ".best.partial", "all_results.json"])
def test_results_with_a_file_in_their_place_are_replaced_or_refused(lab: Lab, name: str) -> None:
    """Replaced, or one line and the same command once it is out of the way."""
    folder = lab.root / f"in_the_way_{name}"
    lab.run(folder, fault="before_optim:0:22:term", expect=stop.EXIT_CODE)
    if name == "all_results.json":
        (folder / name).mkdir()
        job = lab.run(folder, expect=2)
        (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
        assert "results cannot be written" in line and name in line
        (folder / name).rmdir()
    else:
        (folder / name).write_text("")
    lab.run(folder)
    assert status(folder)["state"] == "complete" and (folder / "best/model.safetensors").exists()


def test_suspended_rank_does_not_keep_the_others(lab: Lab) -> None:
    """SIGSTOP: it cannot even notice. The others write their stacks, and the launcher kills it."""
    folder = lab.root / "stopped"
    job = lab.start(folder, "--hang_timeout", "3s", processes=2, fault="before_optim:1:7:stop,before_optim:1:7:sleep:1")
    codes = job.wait(60)
    assert codes == [1, -signal.SIGKILL], job.output
    assert (folder / "stacks-rank-0.txt").exists() and committed(folder) == [5]


@pytest.mark.parametrize("action", ["exc", "kill9"])
def test_data_loading_process_that_fails_ends_the_run(lab: Lab, action: str) -> None:
    folder = lab.root / f"worker_{action}"
    job = lab.start(
        folder, "--dataloader_num_workers", 2, "--verify_images", "false", processes=2, fault=f"in_worker:1:3:{action}"
    )
    begun = time.monotonic()
    assert 0 not in job.wait(60), job.output
    assert time.monotonic() - begun < 40
    record = failure(folder)
    assert ("a fault of the test" if action == "exc" else "DataLoader worker") in " ".join(map(str, record.values()))
    lab.run(folder, "--verify_images", "false", processes=2)
    assert status(folder)["state"] == "complete"


def test_failure_record_names_rank_step_and_images(lab: Lab) -> None:
    folder = lab.root / "record"
    lab.start(folder, processes=2, fault="before_optim:1:7:exc").wait()
    record = failure(folder)
    assert (record["rank"], record["step"], record["reason"]) == (1, 6, "RuntimeError: a fault of the test")
    assert isinstance(record["last_images"], list) and len(record["last_images"]) == 4
    assert all(re.fullmatch(r"\d+ \(.*\d+\.png\)", str(image)) for image in record["last_images"])
    assert "before_optim" not in str(record) and "points.py" in str(record["traceback"])
    assert set(record) >= {"host", "time", "memory", "versions"}
