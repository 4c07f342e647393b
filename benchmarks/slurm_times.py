"""What Slurm adds: seconds from sbatch to the first step, from a warning to the commit and back to work.

    PYTHONPATH=tests:tests/slurm python benchmarks/slurm_times.py [OUT.json]

As root, with Debian's slurmctld, slurmd, slurm-client, munge and iproute2. Two nodes with a process each, namespaces of
this machine (tests/slurm/cluster.sh), train a ViT of 24,000 parameters on the embedded digits. After a few steps
the job is warned by `scancel --batch --signal=USR1`, which is what Slurm does before a time limit. torchrun starts the
same two processes without Slurm. Three rounds, in turn. The last figure has the time in it that Slurm lets a requeued
job wait: cred_expire + 1 s, 6 here and 121 by default.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster, Job
from conftest import rows, write_checkpoint
from record import record

ROUNDS = 3
FLAGS = [
    "digits", "--model", "vit", "--max_steps", "3000", "--per_device_train_batch_size", "16", "--eval_strategy", "no",
    "--save_strategy", "no", "--load_best_model_at_end", "false", "--logging_steps", "1", "--report_to", "none",
]  # fmt: skip


def since(begun: float, reached: Callable[[], bool]) -> float:
    while not reached():
        if time.monotonic() - begun > 180:
            raise TimeoutError
        time.sleep(0.01)
    return round(time.monotonic() - begun, 2)


def last_step(folder: Path) -> int:
    return max((row["step"] for row in rows(folder)), default=0)


def by_torchrun(cluster: Cluster, folder: Path) -> float:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    begun = time.monotonic()
    process = subprocess.Popen(
        [*launcher, "-m", "vit_dist.train", *FLAGS, "--output_dir", str(folder)],
        cwd=cluster.folder, env=cluster.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = since(begun, lambda: last_step(folder) >= 1)
    process.terminate()
    process.wait()
    return seconds


def by_slurm(cluster: Cluster, folder: Path) -> dict[str, float]:
    begun = time.monotonic()
    job: Job = cluster.submit(*FLAGS, "--output_dir", folder, options=("-N", 2))
    times = {"sbatch to first step": since(begun, lambda: last_step(folder) >= 1)}
    since(time.monotonic(), lambda: last_step(folder) >= 20)
    warned = time.monotonic()
    job.warn()
    times["warning to commit"] = since(warned, lambda: any(folder.glob("checkpoint-*/manifest.json")))
    times["warning to requeue"] = since(warned, lambda: "back into the queue" in job.log)
    requeued, stopped_at = time.monotonic(), last_step(folder)
    times["requeue to first new step"] = since(requeued, lambda: last_step(folder) > stopped_at)
    cluster.call("scancel", job.number)
    job.end("CANCELLED", restarts=1)
    return times


def main() -> None:
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="vit_dist-slurm-") as root:
        Path(root).chmod(0o755)
        folder = Path(root) / "work"
        folder.mkdir()
        write_checkpoint(folder / "vit")
        cluster = Cluster(folder)
        cluster.control("start")
        try:
            slurm = cluster.call("sinfo", "--version").strip()
            for number in range(ROUNDS):
                times = {"torchrun to first step, without Slurm": by_torchrun(cluster, folder / f"torchrun-{number}")}
                for name, seconds in (times | by_slurm(cluster, folder / f"slurm-{number}")).items():
                    measured.setdefault(name, []).append(seconds)
        finally:
            cluster.control("stop")
    record(
        __file__, next(iter(sys.argv[1:]), None), ("torch", "transformers", "accelerate"), slurm=slurm,
        python=sys.version.split()[0], load=os.getloadavg()[0],
        seconds={name: {"rounds": times, "median": statistics.median(times)} for name, times in measured.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
