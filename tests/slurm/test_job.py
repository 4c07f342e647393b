"""What slurm/job.sh decides, with programs in the place of srun and scontrol: moments that a cluster seldom has."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The check of the node, the check of the command, or the training, which is a script of the test's.
SRUN = """#!/bin/bash
case "$*" in
  *module.sh*) eval "$CHECK"; printf '%s\\n' "$RUN" ;;
  *) if [[ ${DRY_RUN:-} ]]; then echo command; else eval "$TRAINING"; fi ;;
esac
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) [[ -z ${SLOW:-} ]] || sleep 1; echo "   Command=$CALLED $ARGUMENTS" ;;
  requeue) echo "requeued $2" >>"$RECORDED"; kill -TERM $PPID ;;
esac
"""
SAVED = """trap 'exit 138' USR1; while :; do sleep 0.05; done"""


class Script:
    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.recorded = folder, folder / "run", folder / "recorded"
        programs = folder / "programs"
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.env = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "RUN": str(self.run), "CHECK": ":",
            "RECORDED": str(self.recorded), "CALLED": f"{ROOT}/slurm/train.sh", "ARGUMENTS": "", "NPROC_PER_NODE": "1",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1",
            "SLURM_SUBMIT_DIR": str(folder),
        }  # fmt: skip

    def start(self, training: str, **env: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                ["bash", ROOT / "slurm" / "train.sh"], env={**self.env, "TRAINING": training, **env}, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def end(self, job: subprocess.Popen[bytes]) -> int:
        try:
            return job.wait(timeout=30)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)

    def status(self, **facts: object) -> str:
        """The command that writes the job's status, as a training of this job would."""
        told = {"state": "preempted", "step": 5, **facts}
        lines = "".join(f"{key}={value}\n" for key, value in told.items())
        logs = self.run / "jobs" / str(told.get("job", 7))
        return f"mkdir -p {logs}; cat >{logs}/status <<'END'\n{lines}END\n"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def requeued(self) -> int:
        return self.recorded.read_text().count("requeued 7") if self.recorded.exists() else 0

    def wait_for(self, words: str) -> None:
        end = time.monotonic() + 20
        while words not in self.log:
            assert time.monotonic() < end, self.log
            time.sleep(0.02)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_warning_before_the_first_step_is_heard(script: Script) -> None:
    job = script.start("exit 1", SLOW="1")  # while the script looks for its own folder
    time.sleep(0.5)
    job.send_signal(signal.SIGUSR1)
    script.end(job)
    assert script.requeued == 1 and "stopped before the training began; back into the queue" in script.log


def test_warning_between_two_steps_reaches_the_next(script: Script) -> None:
    slow = script.folder / "programs" / "touch"  # a slow file system
    slow.write_text('#!/bin/bash\nsleep 1; exec /usr/bin/touch "$@"\n')
    slow.chmod(0o755)
    job = script.start(SAVED)
    end = time.monotonic() + 20
    while not (script.run / "jobs" / "7" / "job.log").exists() and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    script.end(job)
    assert script.requeued == 1


@pytest.mark.parametrize(
    ("facts", "requeued", "words"),
    [
        ({"by": "--max_time on rank 0"}, 1, "stopped after step 5; back into the queue"),
        ({"by": "SIGTERM on rank 0"}, 0, "stopped by SIGTERM on rank 0 after step 5; the same command goes on"),
        ({"by": "--max_time on rank 0", "job": "8"}, 0, "failed with exit code 1 before there was anything to record"),
        ({"state": "complete"}, 0, "complete"),
    ],
)
def test_job_without_warning_ends_by_its_status(
    script: Script, facts: dict[str, object], requeued: int, words: str
) -> None:
    code = script.end(script.start(script.status(**facts) + "exit 1"))
    assert script.requeued == requeued and words in script.log.splitlines()[-1], script.log
    assert (code == 0) == (facts.get("state") == "complete")


def test_status_of_an_earlier_start_is_ignored(script: Script) -> None:
    subprocess.run(["bash", "-c", script.status(by="--max_time on rank 0")], check=True)
    script.end(script.start("exit 1"))
    assert script.requeued == 0 and "failed with exit code 1" in script.log


def test_job_that_failed_names_reason_and_rank(script: Script) -> None:
    failure = script.status(state="failed", rank=3, host="n2", reason='ValueError: it\'s "bad" = 1,')
    script.end(script.start(f"{failure}exit 1"))
    reason, rank = script.log.splitlines()[-2:]
    assert (
        reason.endswith('failed: ValueError: it\'s "bad" = 1,')
        and f"rank 3 on n2 was first to say so; more in {script.run}" in rank
    )


def test_job_always_warned_before_training_gives_up_at_the_fourth(script: Script) -> None:
    for start in range(4):
        job = script.start("exit 1", CHECK=SAVED, SLURM_RESTART_COUNT=str(start))
        script.wait_for(f"start {start + 1} on")
        job.send_signal(signal.SIGUSR1)
        script.end(job)
    assert script.requeued == 3 and "for the fourth time in a row; give the job more time" in script.log


def test_job_with_earlier_progress_is_requeued_a_fourth_time(script: Script) -> None:
    for start in range(3):
        script.end(script.start(script.status(by="--max_time") + "exit 1", SLURM_RESTART_COUNT=str(start)))
    job = script.start("exit 1", CHECK=SAVED, SLURM_RESTART_COUNT="3")
    script.wait_for("start 4 on")
    job.send_signal(signal.SIGUSR1)
    script.end(job)
    assert script.requeued == 4


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RUN": ""}, "error: the check of the command names no run folder but ''"),
        ({"CHECK": "exit 0"}, "error: no answer from the first node; is /tmp full on"),
        ({"NPROC_PER_NODE": ""}, "error: this job has no GPUs; ask for them (sbatch --gpus-per-node N)"),
        ({"CALLED": "/nowhere/slurm/train.sh", "VIT_DIST_ROOT": "/no"}, "error: no slurm/job.sh in "),
    ],
)
def test_job_without_run_folder_or_gpus_starts_nothing(script: Script, env: dict[str, str], message: str) -> None:
    assert script.end(script.start("touch started", TMPDIR="/tmp", **env)) == 2
    assert message in script.log and "logs of all ranks" not in script.log


def test_checkout_is_found_with_any_arguments(script: Script) -> None:
    script.end(script.start("exit 0", ARGUMENTS="--run_name a/slurm/train.sh x"))
    assert script.log.rstrip().endswith("complete")
