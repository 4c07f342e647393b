"""What is said at the end of a save, a run or a launch is true."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import rows
from lab import Lab, committed, fingerprint, status

from vit_dist import files, stop
from vit_dist.checkpoint import store

ROOT = Path(__file__).parents[2]
SHORT = ["--max_steps", 10, "--save_steps", 2, "--eval_steps", 2, "--logging_steps", 1]


def test_a_disk_that_does_not_confirm_a_rename_costs_one_warning(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is in its place, so it counts, and older ones go."""
    sync, folder = files.sync_folder, tmp_path / "run"

    def failing(path: Path) -> None:
        if path == folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(path)

    monkeypatch.setattr(files, "sync_folder", failing)
    job = lab.run(folder, *SHORT, "--save_total_limit", 1)
    assert job.output.count("did not confirm") == 1 and "was not saved" not in job.output
    assert 1 <= len(committed(folder)) <= 2 and max(committed(folder)) == 10


def test_a_deleted_model_of_a_complete_run_is_exported_again(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lab.run(folder, *SHORT)
    before = fingerprint(folder)
    assert "Nothing to do" in lab.run(folder, *SHORT).output
    shutil.rmtree(folder / "best")
    job = lab.run(folder, *SHORT)
    assert "best/ was deleted" in job.output and fingerprint(folder) == before
    shutil.rmtree(folder / "best")
    for checkpoint in list(store.checkpoints(folder)):
        shutil.rmtree(checkpoint)
    (line,) = [line for line in lab.run(folder, *SHORT, expect=2).output.splitlines() if line.startswith("error: ")]
    assert "best) was deleted" in line and "--fresh" in line and status(folder)["state"] == "complete"


def test_waiting_for_data_is_measured_after_resuming_within_an_epoch(lab: Lab, tmp_path: Path) -> None:
    """An epoch has five steps."""
    folder = tmp_path / "run"
    args = ["--max_steps", 5, "--logging_steps", 1, "--save_steps", 5, "--eval_steps", 5]
    lab.run(folder, *args, fault="before_optim:0:1:term", expect=stop.EXIT_CODE)
    lab.run(folder, *args)
    waits = {row["step"]: row["data_wait"] for row in rows(folder) if "data_wait" in row}
    assert set(waits) >= {3, 4, 5} and all(waits[step] > 0 for step in (3, 4, 5))


def test_a_signal_after_the_work_is_done_changes_no_exit_code() -> None:
    script = (
        "import os, signal, sys\n"
        "from vit_dist import entry, stop\n"
        "def body():\n"
        "    stop.install_handlers(); stop.enter_graceful(); return 0\n"
        "code = entry.run(body, '')\n"
        "class Late:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.late = Late()\n"  # when the interpreter has given up its handlers
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(code)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "1e3", "$(id)", "99999999"])
@pytest.mark.parametrize("script", ["torchrun.sh train", "accelerate.sh ddp"])
def test_a_time_out_of_launchers_that_is_no_number_is_one_line(script: str, value: str) -> None:
    name, *words = script.split()
    done = subprocess.run(
        [ROOT / "launch" / name, *words], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        env={**os.environ, "PET_SHUTDOWN_TIMEOUT": value, "DRY_RUN": "1", "NPROC_PER_NODE": "2",
             "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: PET_SHUTDOWN_TIMEOUT is") and len(done.stderr.splitlines()) == 1
