"""What surrounds a run: variables, descriptors, names, shared memory, suspension, processes that do not come."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import command, write_photos
from lab import Lab, status

from vit_dist import build, distributed, entry, errors
from vit_dist.callbacks import watchdog
from vit_dist.config import load_config
from vit_dist.data import shared_memory
from vit_dist.data.index import folder_index
from vit_dist.environment import integer
from vit_dist.errors import UserError
from vit_dist.files import is_run_folder, read_object
from vit_dist.run import failure
from vit_dist.run.attempts import Attempt, known_record, split_to_keep
from vit_dist.run.lock import run_lock

# Variables


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "abc"), ("RANK", "-1"), ("RANK", "1.5"), ("RANK", "3"), ("WORLD_SIZE", "4"),
        ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "9" * 40), ("LOCAL_RANK", "x"), ("LOCAL_WORLD_SIZE", "0"), ("VIT_DIST_PROCESSES", "many"),
        ("VIT_DIST_HOSTS", "x"), ("VIT_DIST_CPUS", "all"), ("GPUS_PER_NODE", "gpu:2"), ("MASTER_PORT", "http"),
        ("MASTER_PORT", "70000"), ("TORCHELASTIC_RESTART_COUNT", "no"), ("VIT_DIST_JOB_ID", "../../x"),
        ("RANK", "\u0663"),
    ],
)  # fmt: skip
def test_a_variable_that_makes_no_sense_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert entry.run(lambda: pytest.fail("it went on"), "") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {name}=") and len(told.splitlines()) == 1 and len(told) < 500


@pytest.mark.parametrize(("text", "number"), [("", 5), ("  ", 5), ("7", 7), (" 7 ", 7), ("007", 7)])
def test_numbers_in_variables_are_read(text: str, number: int) -> None:
    assert integer("X", 5, {"X": text}) == number and integer("X", 5, {}) == 5


# Errors of the machine


def wrapped(cause: Exception) -> Exception:
    """As a library raises its own error from it."""
    error = RuntimeError("generating the data failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/cache/x"), "/cache/x: the disk is full"),
        (OSError(122, "Disk quota exceeded"), "the disk quota is used up"),
        (OSError(30, "Read-only file system", "/data"), "/data: the file system is read-only"),
        (OSError(36, "File name too long", "a" * 300), "the name is too long"),
        (MemoryError(), "no memory is left"),
        (RuntimeError("Could not determine home directory."), "set HOME"),
        (KeyError("getpwuid(): uid not found: 12345"), "set HOME and USER"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (ImportError("libx.so: failed to map segment from shared object"), "no memory is left"),
        (wrapped(OSError(28, "No space left on device")), "the disk is full"),
    ],
)
def test_what_the_machine_lacks_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception, said: str) -> None:
    def body() -> int:
        raise error

    assert entry.run(body, "") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told and len(told.splitlines()) == 1 and len(told) < 500


@pytest.mark.parametrize("error", [ValueError("x"), OSError(5, "Input/output error"), RuntimeError("x"), KeyError("x")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert errors.of_the_machine(error) is None


# Names


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output_dir", "runs/" + "x" * 240], "at most 239"),
        (["--output_dir", "é" * 150], "at most 239"),
        (["--output_dir", "x" * 300], "at most 239"),
        (["--output_dir", "/".join(["x" * 200] * 30)], "at most 3800"),
        (["--output_dir", os.fsdecode(b"runs/caf\xe9")], "not valid UTF-8"),
        (["--output_dir", "runs/a\u202eb"], "control character"),
        (["--data", "~nosuchuser/x"], "no such home directory"),
        (["--model", os.fsdecode(b"caf\xe9")], "not valid UTF-8"),
    ],
)
def test_names_that_cannot_be_used_are_refused_at_the_start(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_config(["--data", "digits", *flags])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["x" * 239, "café", "図" * 70, "a b", "a'b"])
def test_names_that_can_be_used_are_taken(name: str) -> None:
    assert load_config(["--data", "digits", "--output_dir", f"runs/{name}"]).output_dir.name == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [x, x]\nmetrics: *a\n", "x.yaml:1 .*anchors"),
        ("seed: 1\nmodel: *m\n", "x.yaml:2 .*anchors"),
        ("".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10 if n else ['x'])}]\n" for n in range(9)), "anchors"),
        ('model: "\\ud800"\n', "line 1 holds half of a character"),
    ],
)
def test_a_recipe_with_aliases_or_half_characters_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_config([str(tmp_path / "x.yaml")])


# State files


DEEP = '{"state": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("text", [DEEP, "[" * 100_000, "[]", "3", "", "{", "nul", '{"a": \udcff}', "null"])
def test_a_state_file_that_holds_no_object_counts_as_absent(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text, errors="surrogateescape")
    assert read_object(tmp_path / "status.json") == {}


def test_a_state_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "status.json")
    assert read_object(tmp_path / "status.json") == {}


@pytest.mark.parametrize("facts", [{}, {"attempts": "three"}, {"attempts": 1, "settings": []}, {"changes": {}}])
def test_a_record_of_another_shape_counts_as_absent(tmp_path: Path, facts: dict[str, Any]) -> None:
    from vit_dist.files import seal

    (tmp_path / "run.json").write_text(json.dumps(seal(facts)))
    assert known_record(tmp_path).get("attempts", 0) == 0


@pytest.mark.parametrize(
    "facts", [{}, {"batch": {}}, {"strategy": "ddp", "world_size": 1, "batch": {"per_device": 1}, "record": {}}]
)
def test_a_manifest_without_batch_or_record_is_one_line(tmp_path: Path, facts: dict[str, Any]) -> None:
    from vit_dist.batch import Batch
    from vit_dist.checkpoint import store

    checkpoint = store.commit(store.begin(tmp_path, 5), {}, {"step": 5, **facts})
    with pytest.raises(UserError, match=r"manifest\.json lacks "):
        split_to_keep(Attempt(checkpoint=str(checkpoint)), Batch(1, 1, 1), "ddp", "cpu")


# Run folders among the data


def listed(data: Path, cache: Path) -> tuple[list[str], list[str]]:
    index = folder_index(data, cache)
    return list(map(str, index.images)), index.tables


def test_a_run_folder_below_the_data_is_not_data(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "photos", {"train": 6})
    before = listed(data, tmp_path)
    run = data / "runs/x"
    with run_lock(run):
        assert is_run_folder(run)
        (run / "notes.csv").write_text("a\n1\n")
        assert listed(data, tmp_path) == before, "at the first start"
    run.mkdir(parents=True, exist_ok=True)
    (run / "notes.csv").write_text("a\n1\n")
    facts = {"state": "preempted", "attempt": 1, "host": "h", "pid": 1}
    (run / "status.json").write_text(json.dumps(facts))
    assert listed(data, tmp_path) == before, "at the second"
    (run / "status.json").unlink()
    assert listed(data, tmp_path)[1] == ["runs/x/notes.csv"]


def test_a_run_in_its_own_data_folder_goes_on(lab: Lab, tmp_path: Path) -> None:
    data = write_photos(tmp_path / "photos", {"train": 16, "validation": 6})
    args = ["--data", data, "--max_steps", 4, "--save_steps", 2, "--eval_steps", 2]
    lab.run(data / "run", *args, fault="before_optim:0:3:term", expect=75)
    lab.run(data / "run", *args)
    assert status(data / "run")["state"] == "complete"


# Shared memory


class Args:
    dataloader_num_workers = 4
    dataloader_prefetch_factor = None
    per_device_train_batch_size = per_device_eval_batch_size = 8


@pytest.mark.parametrize(
    ("free", "processes", "fitting"), [(64 << 10, 1, 0), (64 << 20, 1, 3), (64 << 20, 4, 0), (8 << 30, 8, 4)]
)
def test_workers_are_counted_by_the_room_that_their_batches_have(
    monkeypatch: pytest.MonkeyPatch, free: int, processes: int, fitting: int
) -> None:
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: free)
    room = shared_memory.room(Args(), 224, False, processes)  # type: ignore[arg-type]
    assert room is not None and room.fitting == fitting


def in_small_shm(*args: object) -> subprocess.CompletedProcess[str]:
    """A run where /dev/shm has 64 kB; skips where nothing can be mounted."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("needs root")
    mount = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    probe = subprocess.run(["unshare", "-m", "sh", "-c", mount, "sh", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("nothing can be mounted here")
    line = ["unshare", "-m", "sh", "-c", mount, "sh", *command("python", 1, *args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_too_little_shared_memory_is_refused_before_the_processes_start(
    photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    done = in_small_shm(
        "--data", photos, "--model", checkpoint, "--output_dir", tmp_path / "run", "--report_to", "none",
        "--max_steps", 2, "--dataloader_num_workers", 2,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "/dev/shm" in line and "--shm-size" in line and "--dataloader_num_workers 0" in line


def test_batches_that_cannot_be_handed_over_end_the_run_at_once(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else fills /dev/shm in mid run: a batch would be lost, and waited for until --hang_timeout."""
    from torch.multiprocessing import reductions

    def full(storage: Any) -> Any:
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(reductions, "reduce_storage", full)
    monkeypatch.setattr(shared_memory, "LITTLE", 1 << 62)
    import multiprocessing.reduction as pickling

    import torch

    registry = dict(pickling.ForkingPickler._extra_reducers)  # type: ignore[attr-defined]
    for kind in (torch.UntypedStorage, torch.storage.TypedStorage):
        pickling.ForkingPickler.register(kind, full)
    try:
        begun = time.monotonic()
        job = lab.run(tmp_path / "run", "--dataloader_num_workers", 1, "--verify_images", "false", expect=2)
    finally:
        pickling.ForkingPickler._extra_reducers.clear()  # type: ignore[attr-defined]
        pickling.ForkingPickler._extra_reducers.update(registry)  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 60
    assert "--shm-size" in job.output and status(tmp_path / "run")["state"] == "failed"


# Suspension and hangs


def watched(work: Callable[[Any], None], timeout: float, folder: Path) -> int:
    """A forked process under a watchdog that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            dog = watchdog.Watchdog(folder, 0, timeout, lambda: False, lambda why: None, lambda by: None)
            dog._launcher = None
            with dog:
                work(dog)
        finally:
            os._exit(0)
    return pid


def ended(pid: int, seconds: float) -> int | None:
    """Exit code, or None if it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.02)
    return None


def test_a_process_suspended_for_longer_than_the_time_out_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "GRACE", 0.5)

    def steps(dog: Any) -> None:
        for _ in range(60):
            dog.heartbeat()
            time.sleep(0.1)

    pid = watched(steps, 2.0, tmp_path)
    time.sleep(2)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(pid, signal.SIGCONT)
    assert ended(pid, 20) == 0 and not list(tmp_path.iterdir())


def test_a_process_that_stands_still_is_ended(tmp_path: Path) -> None:
    pid = watched(lambda dog: (dog.heartbeat(), time.sleep(60)), 1.0, tmp_path)  # type: ignore[arg-type, return-value]
    assert ended(pid, 20) == 1 and (tmp_path / "stacks-rank-0.txt").exists()


def test_a_process_that_keeps_the_interpreters_lock_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread of its own can do that."""
    monkeypatch.setattr(watchdog, "GRACE", 0.5)

    def hold(dog: Any) -> None:
        dog.heartbeat()
        time.sleep(1.5)
        dog.heartbeat()
        re.match(r"(a+)+$", "a" * 60 + "b")  # never lets go of the lock

    assert ended(watched(hold, 2.0, tmp_path), 30) == -signal.SIGKILL


# Processes that are lost or do not come


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_before_training_is_named(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    make = build.build_model

    def build_model(*args: Any, **kwargs: Any) -> Any:
        if distributed.launched_rank() == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        return make(*args, **kwargs)

    monkeypatch.setattr(build, "build_model", build_model)
    folder = tmp_path / "run"
    job = lab.start(folder, processes=2)
    codes = job.wait(60)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1, job.output
    said = f"rank {killed} (process {job.pids[killed]} on {socket.gethostname()}) is gone"
    assert said in status(folder)["reason"] and status(folder)["state"] == "failed"
    assert said in json.loads((folder / failure.FAILURE).read_text())["reason"] and said in job.output


def test_ranks_asked_to_stop_before_training_are_preempted_and_not_lost(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: object, **kwargs: object) -> None:
        (tmp_path / f"building-{os.getpid()}").touch()
        time.sleep(60)

    monkeypatch.setattr(build, "build_model", slow)
    job = lab.start(tmp_path / "run", processes=2)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("building-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.signal(signal.SIGTERM)
    assert job.wait(30) == [75, 75], job.output
    assert status(tmp_path / "run")["state"] == "preempted" and not (tmp_path / "run/failure.json").exists()


def test_a_left_over_world_size_is_told_and_the_first_signal_ends_it() -> None:
    """In PyTorch's real wait for the others, a call during which no handler of Python's runs."""
    wait = (
        "import torch.distributed as dist\n"
        "from vit_dist import distributed, stop\n"
        "stop.install_handlers()\n"
        "real = distributed.time.monotonic\n"
        "distributed.time.monotonic = lambda: real() * 20\n"
        "with distributed.joining():\n"
        "    dist.init_process_group('gloo', rank=0)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {**os.environ, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, "-c", wait],
        stderr=subprocess.PIPE, text=True, env=environ,
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    assert f"waiting for 4 processes at 127.0.0.1:{port}" in line and "unset WORLD_SIZE" in line
    process.terminate()
    assert process.wait(20) == 75
    assert "SIGTERM" in process.stderr.read()


# Descriptors


def test_what_is_printed_without_stdout_goes_into_no_file(tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys\n"
        "from vit_dist.terminal import open_standard_streams, show\n"
        "open_standard_streams()\n"
        "file = open(sys.argv[1], 'w')\n"
        "show(['a line']); print('another', file=sys.stderr)\n"
        "subprocess.run(['sh', '-c', 'echo of a child; echo and its error >&2'])\n"
        "os.write(1, b'raw'); file.write('whole'); file.close()\n"
    )
    line = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script, str(tmp_path / "file")]
    assert subprocess.run(line, timeout=60).returncode == 0
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_verb_without_a_place_to_print_to_ends_well(closed: str) -> None:
    line = f'exec "$@" {closed}'
    for words, code in ((["--version"], 0), (["trian"], 2)):
        done = subprocess.run(["sh", "-c", line, "sh", sys.executable, "-m", "vit_dist.cli", *words], timeout=60)
        assert done.returncode == code
