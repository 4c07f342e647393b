"""What a user sees of torchrun and accelerate: the error last, no traceback of a success, threads that do not spin."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import CONFIGS, rows
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.utils import store as store_util

from vit_dist.launch import agent
from vit_dist.launch.topology import FOR_LAUNCHERS
from vit_dist.threads import spin_briefly

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--config_file", CONFIGS / "ddp.yaml", "--num_processes", "2",
              "--main_process_port", "0"]  # fmt: skip


@pytest.mark.parametrize("start", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_users_error_is_the_last_line_and_the_exit_code_is_2(start: list[Any], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vit_dist.launch.agent", *start, "-m", "vit_dist.train", "--data", "/nope/photos"]
    command += ["--model", "tiny"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --data /nope/photos: there is no such file or folder")
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("text", ["distributed_type: [", "distributed_type: MULTI_GPU\nno_such_key: 1\n"])
def test_broken_file_of_accelerate_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    command = [sys.executable, "-m", "vit_dist.launch.agent", *ACCELERATE, "-m", "vit_dist.train"]
    command[command.index("--config_file") + 1] = tmp_path / "own.yaml"
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: accelerate.commands.launch refuses its arguments or file: ")


def test_agent_still_leaves_by_the_barrier_that_is_extended() -> None:
    assert "store_util.barrier(" in inspect.getsource(SimpleElasticAgent._exit_barrier)


def test_node_0_leaves_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_util, "barrier", lambda *args, **kwargs: None)
    agent._leave_in_order()
    store, left = dist.HashStore(), threading.Event()
    monkeypatch.setenv("VIT_DIST_NODE_RANK", "0")

    def node_0() -> None:
        store_util.barrier(store, 3, "end")
        left.set()

    thread = threading.Thread(target=node_0)
    thread.start()
    for _ in range(2):
        assert not left.wait(0.2)
        store.add("end/vit_dist_left", 1)
    thread.join(10)
    assert left.is_set()
    monkeypatch.setenv("VIT_DIST_NODE_RANK", "1")
    store_util.barrier(dist.HashStore(), 2, "end")  # does not wait for anybody


def test_spin_count_is_set_unless_the_user_or_torch_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    spin_briefly(environ)
    assert environ == {}, "torch has been imported here"
    monkeypatch.delitem(sys.modules, "torch")
    for given in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environ = dict(given)
        spin_briefly(environ)
        assert environ == given
    environ = {}
    spin_briefly(environ)
    assert environ == {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("runpy.run_module('vit_dist.train', run_name='__main__')", "1000 False"),
        ("runpy.run_module('vit_dist', run_name='__main__')", "1000 False"),
        ("import vit_dist; raise SystemExit", "None False"),
    ],
)
def test_entry_points_set_the_spin_count_and_an_import_does_not(code: str, expected: str) -> None:
    program = (
        "import os, runpy, sys\nsys.argv = ['x', 'train', '--version']\n"
        f"try:\n    {code}\nexcept SystemExit:\n    print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, timeout=60)
    assert done.stdout.splitlines()[-1] == expected, done.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_reaches_the_processes_through_the_launcher(
    number: signal.Signals, photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    args = ["--data", photos, "--model", checkpoint, "--output_dir", tmp_path / "run", "--max_steps", 100_000,
            "--logging_steps", 1, "--report_to", "none", "--eval_strategy", "no"]  # fmt: skip
    command = list(map(str, [sys.executable, "-m", "vit_dist.launch.agent", *TORCHRUN, "-m", "vit_dist.train", *args]))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **FOR_LAUNCHERS}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 200
        while not rows(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(100) != 0
    finally:
        process.kill()
    said = json.loads((tmp_path / "run/status.json").read_text())
    assert said["state"] == "preempted" and said["by"].startswith(number.name), (tmp_path / "log").read_text()
