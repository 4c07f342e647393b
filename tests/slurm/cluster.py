"""A Slurm cluster to submit real jobs to, and a job that was submitted."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **os.environ, "SLURM_CONF": str(folder.parent / "slurm" / "etc" / "slurm.conf"), "DEBIAN_HOSTS": "n1,n2",
            "SHARE": f"{folder.parent}:{ROOT}", "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "1", "WANDB_MODE": "offline",
        }  # fmt: skip

    def control(self, verb: str, *words: object) -> str:
        command = [Path(__file__).parent / "cluster.sh", verb, self.folder.parent / "slurm", *words]
        return self.call(*command)

    def call(self, *command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: object, script: str = "train.sh", options: tuple[object, ...] = (), **env: str) -> Job:
        assigned = ",".join(["--export=ALL", *(f"{name}={value}" for name, value in env.items())])
        told = self.call("sbatch", assigned, *options, ROOT / "slurm" / script, *words)
        return Job(self, told.split()[-1])


class Job:
    def __init__(self, cluster: Cluster, number: str) -> None:
        self.cluster, self.number, self.begun = cluster, number, time.monotonic()

    @property
    def log(self) -> str:
        path = self.cluster.folder / f"vit_dist-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def facts(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.cluster.call("scontrol", "show", "job", self.number)))

    def wait_until(self, reached: Callable[[], Any], seconds: float = 150, over: bool = False) -> None:
        """Until `reached`, which the job must live to see unless it may be `over`."""
        end = time.monotonic() + seconds
        while not reached():
            state = self.facts()["JobState"]
            alive = state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "REQUEUED", "NODE_FAIL")
            assert over or alive or reached(), f"{state}\n{self.log}"
            assert time.monotonic() < end, f"not reached in {seconds} s, {state}\n{self.log}"
            time.sleep(0.1)

    def end(self, state: str = "COMPLETED", restarts: int = 0, seconds: float = 150) -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait_until(lambda: self.facts()["JobState"] in over, seconds, over=True)
        facts = self.facts()
        assert (facts["JobState"], int(facts["Restarts"])) == (state, restarts), f"{facts}\n{self.log}"

    def warn(self) -> None:
        self.cluster.call("scancel", "--batch", "--signal=USR1", self.number)
