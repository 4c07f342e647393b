"""slurm/ on a real cluster: slurmctld, and three nodes as namespaces of this machine (cluster.sh); the real sbatch.

n1 and n2 have no GPUs, n3 says that it has two. The hosts' own names are 127.0.1.1, as Debian's installer leaves them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, Job
from conftest import rows, run, write_checkpoint
from lab import committed, fingerprint, status
from safetensors.numpy import load_file

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
pytestmark = pytest.mark.cluster
TRAINING = (  # the model has no dropout, which differs by rank
    "digits", "--model", "vit", "--max_steps", 60, "--global_batch_size", 32, "--per_device_train_batch_size", 8,
    "--eval_strategy", "steps", "--eval_steps", 20, "--max_eval_samples", 40, "--max_predict_samples", 40,
    "--logging_steps", 5, "--report_to", "wandb", "--keep_checkpoints",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    missing = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    assert not missing, f"not installed: {', '.join(missing)} (see .ci/run)"
    assert os.geteuid() == 0, "network namespaces need root"
    with tempfile.TemporaryDirectory(prefix="vit_dist-slurm-") as root:  # pytest's are closed to others, munge objects
        Path(root).chmod(0o755)
        folder = Path(root) / "work"
        write_checkpoint(folder / "vit")
        cluster = Cluster(folder)
        try:
            cluster.control("start")
            yield cluster
        finally:
            cluster.control("stop")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Path:
    """The run of two nodes with a process each, which nothing happened to."""
    folder = cluster.folder / "two nodes"
    cluster.submit(*TRAINING, "--output_dir", folder, options=("-N", 2)).end()
    return folder


def reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(row["step"] >= step for row in rows(folder))


def wandb_ids(folder: Path) -> list[str]:
    return [path.name.split("-")[-1] for path in sorted((folder / "wandb").glob("offline-run-*"))]


@pytest.mark.slow
def test_job_on_two_nodes_trains_the_model_of_one_process(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    run(*TRAINING, "--model", cluster.folder / "vit", "--output_dir", alone, OMP_NUM_THREADS="1", WANDB_MODE="offline")
    four = cluster.folder / "four"
    job = cluster.submit(*TRAINING, "--output_dir", four, options=("-N", 2), NPROC_PER_NODE="2")
    job.end()
    expected = load_file(alone / "best" / "model.safetensors")
    for folder, world in ((undisturbed, 2), (four, 4)):
        found = load_file(folder / "best" / "model.safetensors")
        assert max(abs(found[name] - expected[name]).max() for name in expected) < 1e-4
        assert json.loads((folder / "run.json").read_text())["world_size"] == world
        assert len(wandb_ids(folder)) == 1
    table = re.findall(r"^(\d)  +(n\d) +cpu +(\d+) +\d+$", job.log, re.M)
    assert [row[:2] for row in table] == [("0", "n1"), ("1", "n1"), ("2", "n2"), ("3", "n2")]
    logs = four / "jobs" / job.number
    written = ["began", "job.log", *(f"rank-{i}.log" for i in range(4)), "status"]
    assert sorted(path.name for path in logs.iterdir()) == written
    assert (logs / "job.log").read_text() == job.log and "complete, eval accuracy" in (logs / "rank-0.log").read_text()


@pytest.mark.slow
def test_job_warned_is_requeued_once_and_ends_with_the_same_bits(cluster: Cluster, undisturbed: Path) -> None:
    folder = cluster.folder / "warned"
    job = cluster.submit(*TRAINING, "--output_dir", folder, options=("-N", 2))
    job.wait_until(reached(folder, 10))
    job.warn()
    job.wait_until(lambda: "back into the queue" in job.log)
    facts = status(folder)
    assert (facts["state"], facts["by"]) == ("preempted", "SIGUSR1 on rank 0") and committed(folder)[-1] == facts[
        "step"
    ] < 60
    job.end(restarts=1)
    assert fingerprint(folder) == fingerprint(undisturbed)
    assert len(set(wandb_ids(folder))) == 1
    assert job.log.count("back into the queue") == 1 and job.log.rstrip().endswith("complete")


@pytest.mark.slow
def test_job_whose_nodes_lose_power_ends_with_the_same_bits(cluster: Cluster, undisturbed: Path) -> None:
    folder = cluster.folder / "power"
    job = cluster.submit(*TRAINING, "--output_dir", folder, options=("-N", 2))
    for restarts, node, step in ((1, "n2", 5), (2, "n1", 30)):
        job.wait_until(reached(folder, step))
        cluster.control("kill-node", node)
        job.wait_until(lambda count=restarts: int(job.facts()["Restarts"]) == count)
        cluster.control("start-node", node)
    job.end(restarts=2)
    assert fingerprint(folder) == fingerprint(undisturbed)


def test_job_preempted_by_another_partition_is_requeued_and_ends_with_the_same_bits(
    cluster: Cluster, undisturbed: Path
) -> None:
    folder = cluster.folder / "preempted"
    job = cluster.submit(*TRAINING, "--output_dir", folder, options=("-N", 2))
    job.wait_until(reached(folder, 10))
    urgent = cluster.call("sbatch", "--parsable", "-p", "urgent", "-N", 2, "--exclusive", "--wrap", "sleep 1").strip()
    job.end(restarts=1)
    assert Job(cluster, urgent).facts()["JobState"] == "COMPLETED"
    assert fingerprint(folder) == fingerprint(undisturbed)


@pytest.mark.slow
def test_job_cancelled_saves_and_is_not_requeued(cluster: Cluster) -> None:
    folder = cluster.folder / "cancelled"
    words = ["-N", 2, "--time", 10, "--", "train", *TRAINING, "--output_dir", folder]
    told = cluster.call(sys.executable, "-m", "vit_dist.cli", "slurm", *words)
    found = re.search(r"job (\d+)", told)
    assert found, told
    job = Job(cluster, found[1])
    job.wait_until(reached(folder, 10))
    cluster.call("scancel", job.number)
    job.end("CANCELLED")
    assert status(folder)["by"].startswith("SIGTERM") and committed(folder)[-1] == status(folder)["step"]


@pytest.mark.slow
def test_job_with_a_killed_rank_fails_and_names_it_last(cluster: Cluster) -> None:
    folder = cluster.folder / "killed"
    job = cluster.submit(*TRAINING, "--output_dir", folder, options=("-N", 2))
    job.wait_until(reached(folder, 5))
    process = re.search(r"^1 +n2 .* (\d+)$", job.log, re.M)
    assert process, job.log
    cluster.control("exec", "n2", "kill", "-9", process[1])
    job.end("FAILED")
    assert "is gone: killed from outside" in job.log.splitlines()[-2]
    assert str(folder / "failure.json") in job.log.splitlines()[-1]


@pytest.mark.slow
def test_job_warned_before_it_trains_is_requeued(cluster: Cluster) -> None:
    job = cluster.submit(*TRAINING, "--output_dir", cluster.folder / "early")
    job.wait_until(lambda: "start 1 on n" in job.log)
    job.warn()
    job.wait_until(lambda: "start 2 on n" in job.log)
    assert int(job.facts()["Restarts"]) == 1 and "before the training began; back into the queue" in job.log
    cluster.call("scancel", job.number)
    job.end("CANCELLED", restarts=1)


@pytest.mark.slow
def test_sweep_members_run_as_tasks_of_an_array(cluster: Cluster) -> None:
    sweep = cluster.folder / "a sweep.yaml"
    sweep.write_text("recipe: digits\nname: seeds\ngrid: {seed: [1, 2, 3]}\n")
    words = [*TRAINING[1:], "--max_steps", 6, "--eval_steps", 6, "--output_dir", cluster.folder / "seeds"]
    array = cluster.submit(sweep, *words, script="sweep.sh", options=("--array=0-2%2",))
    most = 0
    jobs = [Job(cluster, f"{array.number}_{i}") for i in range(3)]
    end = time.monotonic() + 240
    while any(job.facts()["JobState"] in ("PENDING", "RUNNING", "COMPLETING") for job in jobs):
        most = max(most, sum(job.facts()["JobState"] == "RUNNING" for job in jobs))
        assert time.monotonic() < end, [job.log for job in jobs]
        time.sleep(0.3)
    assert most == 2
    for i, job in enumerate(jobs):
        job.end()
        folder = cluster.folder / "seeds" / f"seed={i + 1}"
        assert json.loads((folder / "run.json").read_text())["settings"]["seed"] == i + 1
        assert (folder / "jobs" / job.number / "rank-0.log").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words", "env", "message"),
    [
        (("-p", "gpu"), ("digits",), {}, "this job was given 2 GPUs on n3, but 0 can be used (there is no nvidia-smi)"),
        ((), ("digits",), {"NPROC_PER_NODE": ""}, "this job has no GPUs; ask for them (sbatch --gpus-per-node N)"),
        (("-N", 2), ("--data", "./photo"), {}, "--data ./photo: there is no such file or folder"),
        (("-N", 2), ("digits",), {"VIT_DIST_BUNDLE": "/nowhere"}, "the bundle /nowhere does not exist on this machine"),
        (("-N", 2), ("digits", "--strategy", "zero5"), {}, "unknown strategy zero5; did you mean zero"),
    ],
)
def test_job_that_cannot_work_fails_at_once_with_one_line(
    cluster: Cluster, options: tuple[object, ...], words: tuple[str, ...], env: dict[str, str], message: str
) -> None:
    job = cluster.submit(*words, "--output_dir", cluster.folder / "refused", options=options, **env)
    job.end("FAILED", seconds=20)
    assert f"error: {message}" in job.log
    assert not (cluster.folder / "refused" / "run.json").exists()


@pytest.mark.slow
def test_node_with_gpus_gets_a_process_for_each(cluster: Cluster) -> None:
    smi = cluster.folder / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: Test\\nGPU 1: Test\\n'\n")
    smi.chmod(0o755)
    path = f"{smi.parent}:{os.environ['PATH']}"
    words = ["fsdp2", "digits", "--run_name", "a b", "--output_dir", cluster.folder / "gpus"]
    job = cluster.submit("--strategy", *words, options=("-p", "gpu"), DRY_RUN="1", NPROC_PER_NODE="", PATH=path)
    job.end()
    assert "--num_processes 2 --num_machines 1" in job.log and "-m vit_dist.train digits --run_name 'a b'" in job.log
    part = ("-p", "gpu", "--oversubscribe", "--gpus-per-node", 1, "--mem", 500)
    half = cluster.submit("--strategy", *words[:2], options=part, DRY_RUN="1", NPROC_PER_NODE="", PATH=path)
    half.end("FAILED")
    assert "error: fsdp2 has nothing to shard over with one process" in half.log


@pytest.mark.slow
def test_job_in_a_container_needs_no_slurm_there(cluster: Cluster) -> None:
    folder, programs = cluster.folder / "contained", cluster.folder / "programs"
    programs.mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name not in ("srun", "scontrol"):
            (programs / program.name).symlink_to(program)
    training = "digits --model vit --max_steps 100000 --logging_steps 1 --report_to none --output_dir contained"
    saves = "--eval_strategy no --save_strategy no --load_best_model_at_end false"
    options = ("--parsable", "--signal=B:USR1@60", "--output=vit_dist-%j.log", f"--export=ALL,VIT_DIST_ROOT={ROOT}")
    script = f"export PATH={programs}; exec {ROOT}/slurm/train.sh {training} {saves}"
    told = cluster.call("sbatch", *options, "--wrap", script)
    job = Job(cluster, told.strip())
    job.wait_until(reached(folder, 5))
    job.warn()
    job.end("FAILED")
    assert committed(folder) == [status(folder)["step"]]
    assert "which this job may not; submit the same command again to go on" in job.log
    assert job.facts()["ExitCode"] == "75:0"


@pytest.mark.slow
def test_gpus_that_no_node_has_are_refused_by_sbatch(cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        cluster.submit("digits", options=("--gpus-per-node", 4))


@pytest.mark.slow
def test_job_warned_before_its_time_limit_is_requeued(cluster: Cluster) -> None:
    folder = cluster.folder / "limit"
    words = [*TRAINING, "--max_steps", 100_000, "--eval_steps", 50_000, "--output_dir", folder]
    job = cluster.submit(*words, options=("--time", 2, "--signal=B:USR1@60"))
    job.wait_until(lambda: "back into the queue" in job.log, 150)
    assert status(folder)["by"].startswith("SIGUSR1") and committed(folder)[-1] == status(folder)["step"]
    cluster.call("scancel", job.number)
    job.end("CANCELLED", restarts=1)
