"""A disk that is full or broken, and files that were changed since: never half a checkpoint, never a wrong one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lab import Lab, committed, fingerprint, status

from vit_dist import stop
from vit_dist.checkpoint import store
from vit_dist.checkpoint.snapshot import Snapshot, TorchFile
from vit_dist.checkpoint.writer import CheckpointWriter
from vit_dist.config import load_config
from vit_dist.distributed import GlooGroup
from vit_dist.errors import UserError
from vit_dist.run import attempts


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "after_weights:0:2:enospc",
            "checkpoint-10 was not saved (rank 0: No space left on device (model.safetensors))",
        ),
        ("before_write:1:2:eio", "checkpoint-10 was not saved (rank 1: Input/output error (optimizer.pt))"),
        ("before_rename:0:2:enospc", "checkpoint-10 was not saved (rank 0: No space left on device"),
    ],
)
def test_failed_save_is_reported_once_and_training_goes_on(
    lab: Lab, whole: dict[int, Any], fault: str, said: str
) -> None:
    """Steps 10 and 15 are better than what came before: the copy of step 10 is kept and written before 15."""
    folder = lab.root / fault.replace(":", "_")
    job = lab.run(folder, processes=2, fault=fault)
    assert job.output.count("was not saved") == 1 and said in job.output
    assert "the last one is of step 5; training goes on" in job.output and "was saved again" in job.output
    assert fingerprint(folder) == whole[2]


def test_disk_that_stays_full_fails_the_run_and_keeps_its_checkpoints(lab: Lab, whole: dict[int, Any]) -> None:
    """The best model has no place: the run says so at its end, and once there is room the same command ends well."""
    folder = lab.root / "full"
    faults = ",".join(f"before_write:1:{count}:enospc" for count in range(3, 30))
    job = lab.run(folder, processes=2, fault=faults, expect=2)
    assert job.output.count("was not saved") == 1
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "the best model, of step" in line and "goes on from checkpoint-10" in line
    assert committed(folder)[-1] == 10 and status(folder)["state"] == "failed"
    lab.run(folder, processes=2)
    assert fingerprint(folder) == whole[2]


@pytest.mark.cluster
def test_too_little_disk_space_is_refused_before_training(lab: Lab, whole: dict[int, Any], tmp_path: Path) -> None:
    """A file system of 12 MB; less than the margin stays free."""
    small = tmp_path / "small"
    small.mkdir()
    assert os.system(f"mount -t tmpfs -o size=12M none {small}") == 0, "mounting a file system needs root"
    try:
        job = lab.run(small / "run", expect=2)
        assert "13 MB are free, and a checkpoint takes more than 17 MB" in job.output and "step" not in job.output
        assert not (small / "run").exists()
        os.system(f"mount -o remount,size=100M {small}")
        lab.run(small / "run")
        assert fingerprint(small / "run") == whole[1]
    finally:
        os.system(f"umount {small}")


def test_too_little_disk_space_for_a_save_is_seen_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(["--output_dir", str(tmp_path / "run")])
    writer = CheckpointWriter(config, GlooGroup())
    writer.submit(Snapshot(3, None, {}, [TorchFile("state.pt", torch.ones(1_000_000))]))
    writer.wait()
    assert (writer.committed, writer.problem) == (3, None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000))
    writer.submit(Snapshot(4, None, {}, [TorchFile("state.pt", torch.ones(1_000_000))]))
    writer.wait()
    assert (writer.committed, writer.problem) == (3, "rank 0: No space left on device: 21 MB needed, 20 MB free")
    assert committed(tmp_path / "run") == [3] and not (tmp_path / "run/.staging").exists()


def test_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    writer = CheckpointWriter(load_config(["--output_dir", str(tmp_path / "run")]), GlooGroup())
    writer.submit(Snapshot(3, None, {}, [TorchFile("state.pt", {"weight": torch.tensor([1.0, float("nan")])})]))
    writer.wait()
    assert writer.problem == "rank 0: weights or optimizer state are NaN or infinite"
    assert not list(store.checkpoints(tmp_path / "run"))


def test_file_size_limit_is_reported_and_the_run_goes_on_without_it(
    lab: Lab, whole: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_FSIZE: the error comes out of the library that writes the weights."""
    folder = lab.root / "limit"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))  # inherited by the forked run
    try:
        job = lab.start(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert job.wait() == [2] and job.output.count("was not saved") == 1, job.output
    assert not list(store.checkpoints(folder))
    lab.run(folder)
    assert fingerprint(folder) == whole[1]


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
}


def test_checkpoint_with_any_file_damaged_is_named_and_skipped_on_resume(
    lab: Lab, whole: dict[int, Any], tmp_path: Path
) -> None:
    """Every file of the newest checkpoint and four damages; four of them are resumed to the end."""
    source = lab.root / "cut"
    lab.run(source, "--max_steps", 30, fault="before_optim:0:22:term", expect=stop.EXIT_CODE)
    steps = committed(source)
    newest = store.named(source, steps[-1])
    files = sorted(path.name for path in newest.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "manifest.json"} <= set(files)
    for name in files:
        for kind, damage in DAMAGE.items():
            folder = tmp_path / f"{name}_{kind}"
            shutil.copytree(source, folder)
            damage(folder / newest.name / name)
            config = load_config(
                list(map(str, [*lab.args, "--output_dir", folder, "--per_device_train_batch_size", 8]))
            )
            attempt = attempts.inspect(config, "single", 1)
            assert attempt.begins_at == steps[-2], (name, kind)
            assert any(newest.name in note and name in note for note in attempt.notes), (name, kind, attempt.notes)
            if (name, kind) in (
                ("model.safetensors", "flipped"),
                ("manifest.json", "cut"),
                ("optimizer.pt", "deleted"),
            ):
                again = lab.run(folder)
                assert f"{newest.name} is passed over" in again.output
                assert fingerprint(folder) == whole[1], (name, kind)


def test_run_with_all_checkpoints_damaged_is_refused(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(lab.root / "cut", folder)
    for path in store.checkpoints(folder):
        os.truncate(path / "model.safetensors", 100)
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*") if path != folder)
    job = lab.run(folder, expect=2)
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "is whole; --fresh starts over" in line and "model.safetensors has 100 bytes" in line
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*") if path != folder) == before


def test_files_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of each file, of each folder, rename, fsync of the folder above: in this order."""
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        calls.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)))
        fsync(descriptor)

    def renamed(old: Any, new: Any) -> None:
        calls.append(("rename", os.path.relpath(new, tmp_path)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    staged = store.begin(tmp_path, 7)
    (staged / "part").mkdir()
    for name in ("weights", "part/share"):
        (staged / name).write_bytes(b"1")
    files = {name: store.settle(staged / name) for name in ("weights", "part/share")}
    store.commit(staged, files, {"step": 7})
    inside = ".staging/checkpoint-7"
    assert calls == [
        ("fsync", f"{inside}/weights"), ("fsync", f"{inside}/part/share"), ("fsync", f"{inside}/manifest.json"),
        ("fsync", f"{inside}/part"), ("fsync", inside), ("rename", "checkpoint-7"), ("fsync", "."),
    ]  # fmt: skip
    assert store.integrity_error(tmp_path / "checkpoint-7") is None
    assert json.loads((tmp_path / "checkpoint-7/manifest.json").read_text())["files"]["weights"]["bytes"] == 1


def test_checkpoint_with_an_unknown_file_is_not_committed(tmp_path: Path) -> None:
    staged = store.begin(tmp_path, 7)
    (staged / "stray").write_bytes(b"1")
    with pytest.raises(OSError, match="stray is not what was to be written"):
        store.commit(staged, {}, {"step": 7})
    assert not list(store.checkpoints(tmp_path))


@pytest.mark.parametrize(
    ("bests", "limit", "every", "kept"),
    [
        ({}, 1, None, [9]),
        ({}, 2, None, [8, 9]),
        ({}, None, 4, list(range(1, 10))),
        (dict.fromkeys(range(3, 10), 3), 2, None, [3, 9]),
        (dict.fromkeys(range(3, 10), 3), 1, None, [3, 9]),  # the best is never one too many
        (dict.fromkeys(range(3, 10), 3), 3, None, [3, 8, 9]),
        (dict.fromkeys(range(3, 10), 3), 2, 4, [3, 4, 8, 9]),
        # 8 names another best than 9: it could not be gone back to, and 3 can
        ({**dict.fromkeys(range(3, 9), 3), 9: 9}, 2, None, [3, 9]),
        # 6 was saved before it was known to be the best: it names 3
        ({**dict.fromkeys(range(3, 8), 3), 8: 6, 9: 6}, 2, None, [3, 6, 9]),
    ],
)
def test_retention_keeps_the_best_and_the_newest(
    tmp_path: Path, bests: dict[int, int], limit: int | None, every: int | None, kept: list[int]
) -> None:
    for step in range(1, 10):
        best = bests.get(step, None if not bests else step)
        store.commit(store.begin(tmp_path, step), {}, {"step": step, "best_step": best})
    os.utime(tmp_path / "checkpoint-1")  # the newest by time; steps decide
    store.retain(tmp_path, limit, every)
    assert committed(tmp_path) == kept


def test_run_folder_in_use_is_refused_and_a_stale_lock_recovered(lab: Lab, tmp_path: Path) -> None:
    from vit_dist.run.lock import run_lock

    folder = tmp_path / "run"
    lab.run(folder, fault="before_optim:0:3:kill9", expect=-9)
    assert (folder / ".lock").exists() and status(folder)["state"] == "running"
    with run_lock(folder, environ={"VIT_DIST_JOB_ID": "4711"}):
        refused = lab.run(folder, expect=2)
        assert f"in use by process {os.getpid()} on " in refused.output and ", job 4711, since " in refused.output
    lab.run(folder)
    assert not (folder / ".lock").exists() and status(folder)["state"] == "complete"
    fresh = lab.start(folder, "--fresh", "--max_steps", 3000, "--eval_strategy", "no")
    while not (folder / "metrics.jsonl").exists() or (folder / "all_results.json").exists():
        time.sleep(0.01)
    assert "in use by process" in lab.run(folder, expect=2).output, "the new folder is locked like the old one"
    fresh.signal(signal.SIGKILL)
    fresh.wait()
    with pytest.raises(UserError, match="boom"), run_lock(tmp_path / "new"):
        raise UserError("boom")
    assert not (tmp_path / "new").exists(), "a run that is refused leaves nothing"
