"""Asked to stop: all ranks agree, commit within one step, say so in status.json and leave; the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import CONFIGS, command, rows, run
from lab import Job, Lab, committed, fingerprint, status, still_running

from vit_dist import stop


def at_step(folder: Path, step: int, job: Job) -> None:
    """Wait until a row of this step or a later one is logged."""
    deadline = time.monotonic() + 60
    while not any(row["step"] >= step for row in rows(folder)):
        assert time.monotonic() < deadline, job.output
        time.sleep(0.002)


CASES = {  # fault, the step at whose end all leave, who asked
    "within a step": ("before_optim:1:7:term", 7, "SIGTERM on rank 1"),
    "at a step's end, heard one later": ("in_step_end:0:7:usr1", 8, "SIGUSR1 on rank 0"),
    "at the end of an epoch": ("before_optim:0:10:term", 10, "SIGTERM on rank 0"),
    "twice, two ranks": ("before_optim:1:7:int,before_optim:0:7:term,in_step_end:0:7:term", 7, "on rank"),
    "in an evaluation": ("mid_eval:1:1:term", 5, "SIGTERM on rank 1"),
    "in a save": ("before_write:0:2:term", 11, "SIGTERM on rank 0"),
    "in the first step": ("before_optim:1:1:term", 1, "SIGTERM on rank 1"),
}


@pytest.mark.parametrize(
    ("strategy", "case"),
    [*(("steps", case) for case in CASES), ("epoch", "at the end of an epoch"), ("epoch", "in an evaluation")],
)
def test_signal_on_one_rank_makes_all_commit_within_one_step_and_leave(
    lab: Lab, whole: dict[int, Any], case: str, strategy: str
) -> None:
    fault, step, by = CASES[case]
    folder = lab.root / f"{case}_{strategy}".replace(" ", "_")
    more = ["--eval_strategy", "epoch", "--save_strategy", "epoch"] if strategy == "epoch" else []
    job = lab.start(folder, *more, processes=2, fault=fault)
    assert job.wait(60) == [stop.EXIT_CODE] * 2, job.output
    said = status(folder)
    assert said["state"] == "preempted" and by in said["by"] and said["attempt"] == 1
    assert step <= said["step"] <= step + (case == "in a save"), "the save goes on beside the training"
    assert max(committed(folder)) == said["step"]
    assert f"checkpoint-{said['step']} is committed; the same command goes on" in job.output
    assert "Traceback" not in job.output
    lab.run(folder, *more, processes=2)
    assert fingerprint(folder) == whole[2], "evaluations every 5 steps are those of the epochs"
    assert status(folder)["state"] == "complete"


def test_signal_while_the_model_compiles_is_heard_after_the_step(lab: Lab) -> None:
    """Compiling is part of the step: it is finished, committed, and need not be repeated for the same images."""
    flags = ["--torch_compile", "--torch_compile_backend", "eager", "--eval_strategy", "no"]
    folder = lab.root / "compiled"
    lab.run(folder, *flags, processes=2, fault="in_compile:1:1:term", expect=stop.EXIT_CODE)
    assert (status(folder)["step"], status(folder)["by"]) == (1, "SIGTERM on rank 1")
    lab.run(folder, *flags, processes=2)
    lab.run(lab.root / "compiled_whole", *flags, processes=2)
    assert fingerprint(folder) == fingerprint(lab.root / "compiled_whole")


def test_run_stopped_many_times_ends_with_the_same_bits(lab: Lab, whole: dict[int, Any]) -> None:
    """Also right after a resumption, twice at one step, and within a pending evaluation."""
    folder, steps = lab.root / "many", []
    faults = (
        "mid_eval:0:1:term",
        "mid_eval:0:1:int",
        "before_optim:0:1:usr2",
        "mid_eval:0:2:term",
        "in_step_end:0:6:int",
    )
    for fault in faults:
        lab.run(folder, fault=fault, expect=stop.EXIT_CODE)
        steps.append(status(folder)["step"])
    assert steps == [5, 5, 6, 10, 17]
    lab.run(folder)
    assert fingerprint(folder) == whole[1]


def test_run_stopped_in_an_evaluation_and_killed_later_ends_with_the_same_bits(lab: Lab) -> None:
    """Step 10 was saved before it was known to be the best; step 15 is worse and names it."""
    folder, losses = lab.root / "evaluated_later", json.dumps({5: 5.0, 10: 1.0, 15: 3.0, 20: 2.0, 25: 4.0, 30: 6.0})
    lab.run(folder, fault="mid_eval:0:6:term", expect=stop.EXIT_CODE, FAKE_LOSS=losses)
    assert status(folder)["step"] == 10
    job = lab.run(folder, fault="after_commit:0:2:kill9", expect=-signal.SIGKILL, FAKE_LOSS=losses)
    assert committed(folder)[-3:] == [10, 15, 20], job.output
    lab.run(folder, FAKE_LOSS=losses)
    lab.run(lab.root / "evaluated_whole", FAKE_LOSS=losses)
    assert fingerprint(folder) == fingerprint(lab.root / "evaluated_whole")
    assert fingerprint(folder)["results"]["best_step"] == 10


def test_run_without_checkpoints_stopped_in_its_last_evaluation_is_finished(lab: Lab) -> None:
    """With `save_strategy no` the last steps are nowhere yet: the run is finished instead."""
    job = lab.run(
        lab.root / "unsaved", "--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "false",
        fault="mid_eval:0:1:term",
    )  # fmt: skip
    assert status(lab.root / "unsaved")["state"] == "complete", job.output


@pytest.mark.launch
def test_ctrl_c_pressed_many_times_saves_once_and_leaves(lab: Lab) -> None:
    """Until the very end of the process, whose interpreter gives handlers up."""
    folder = lab.root / "ctrl_c"
    process = subprocess.Popen(
        command("python", 1, *lab.args, "--per_device_train_batch_size", 8, "--output_dir", folder,
                "--max_steps", 100_000, "--eval_strategy", "no"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not rows(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    output = process.communicate()[0]
    assert process.returncode == stop.EXIT_CODE, output
    assert "Traceback" not in output and status(folder)["state"] == "preempted"


@pytest.mark.parametrize(
    "seconds", [0.5, 2.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.1, 1.0, 3.0, 5.0))]
)
def test_sigterm_at_any_time_leaves_a_run_that_goes_on(lab: Lab, whole: dict[int, Any], seconds: float) -> None:
    folder = lab.root / f"after_{seconds}"
    job = lab.start(folder, processes=2)
    time.sleep(seconds)
    job.signal(signal.SIGTERM)
    assert set(job.wait(60)) <= {stop.EXIT_CODE, 0, -signal.SIGTERM, 1}, job.output
    lab.run(folder, processes=2)
    assert fingerprint(folder) == whole[2]


def test_max_time_stops_the_run(lab: Lab, whole: dict[int, Any]) -> None:
    folder = lab.root / "max_time"
    job = lab.run(folder, "--max_time", "1s", expect=stop.EXIT_CODE)  # of this process, whose imports took longer
    assert status(folder)["by"] == "--max_time on rank 0" and status(folder)["step"] == 1, job.output
    lab.run(folder)
    assert fingerprint(folder) == whole[1]


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_data_loading_processes_survive_a_signal_to_every_process(lab: Lab, where: str) -> None:
    """As a batch system sends it: a data loading process that died of it would take the run down."""
    folder = lab.root / f"workers_{where}"
    if where == "training":
        more, fault = ["--eval_strategy", "no"], ""
    else:  # most of the time; the workers of an evaluation are gone when it ends
        more, fault = ["--eval_steps", 1, "--save_steps", 1, "--per_device_eval_batch_size", 1], "mid_eval:0:3:sleep:2"
    job = lab.start(folder, "--dataloader_num_workers", 2, "--max_steps", 3000, *more, fault=fault)
    if where == "evaluation":
        deadline = time.monotonic() + 60
        while len(psutil.Process(job.pids[0]).children()) < 5:  # of training and evaluation, and the watchdog's
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)  # they have begun
        for process in psutil.Process(job.pids[0]).children(recursive=True):
            process.send_signal(signal.SIGTERM)
        job.signal(signal.SIGTERM)
        assert job.wait(60) == [stop.EXIT_CODE], job.output
        assert committed(folder) == [1]
        return
    at_step(folder, 3, job)
    family = psutil.Process(job.pids[0]).children(recursive=True)
    for process in family:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
    now = max(row["step"] for row in rows(folder))
    at_step(folder, now + 9, job)
    job.signal(signal.SIGTERM)
    assert job.wait(60) == [stop.EXIT_CODE], job.output
    assert family and not still_running(family, 10)


def test_child_process_of_others_obeys_sigterm() -> None:
    """A process pool forked off under our handlers must obey SIGTERM."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    try:
        stop.install_handlers()
        stop.enter_graceful()
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.1)
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert stop.asked() is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("launcher", "strategy", "number"),
    [
        ("torchrun", "ddp", signal.SIGTERM),
        ("accelerate", "ddp", signal.SIGUSR1),
        ("accelerate", "fsdp2", signal.SIGINT),
    ],
)
def test_signal_to_the_launcher_stops_the_run_with_a_checkpoint(
    lab: Lab, launcher: str, strategy: str, number: int
) -> None:
    """With the variables that launch/ and `vit-dist train` set, also SIGUSR1 and SIGUSR2."""
    from vit_dist.launch.topology import FOR_LAUNCHERS

    folder = lab.root / f"{launcher}_{strategy}_{int(number)}"
    args = [*lab.args, "--per_device_train_batch_size", 4, "--output_dir", folder]
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        launched = subprocess.Popen(
            command(launcher, 2, *args, "--max_steps", 100_000, "--logging_steps", 1, "--eval_strategy", "no",
                    config=CONFIGS / f"{strategy}.yaml"),
            stdout=output, stderr=output, env={**os.environ, **FOR_LAUNCHERS},
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while not rows(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    family = psutil.Process(launched.pid).children(recursive=True)
    launched.send_signal(number)
    assert launched.wait(20), "launchers turn every code into their own"
    assert not still_running(family, 2)
    said = status(folder)
    assert (said["state"], said["by"].split()[0]) == ("preempted", signal.Signals(number).name), log.read_text()
    assert max(committed(folder)) == said["step"]
    if launcher == "torchrun":
        again = run(*args, "--max_steps", 100_000, "--max_time", "1s", launcher=launcher, processes=2, expect=1,
                    **FOR_LAUNCHERS)  # fmt: skip
        assert "other settings" in again.stderr, "logging_steps is not the one that the run began with"
