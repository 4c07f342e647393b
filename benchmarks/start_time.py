"""Seconds from the command to the first step of the digits recipe, and to its end after that one step; caches warm.

python benchmarks/start_time.py OUT.json [ROUNDS]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

FLAGS = [
    "--max_steps", "1", "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none",
]  # fmt: skip


def start(folder: Path) -> tuple[float, float]:
    command = [sys.executable, "-u", "-m", "vit_dist.cli", "train", "digits", *FLAGS, "--output_dir", str(folder)]
    begun, first = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1/1 ") and not first:
                first = time.perf_counter() - begun
    if process.returncode or not first:
        raise RuntimeError(f"exit code {process.returncode}, first step after {first} s")
    return first, time.perf_counter() - begun


def main(out: str | None = None, rounds: str = "5") -> None:
    with tempfile.TemporaryDirectory() as root:
        start(Path(root, "warm"))
        seconds = [start(Path(root, str(number))) for number in range(int(rounds))]
    record(
        __file__, out, ("torch", "transformers", "accelerate", "datasets", "evaluate"),
        first_step=[first for first, _ in seconds], end=[end for _, end in seconds],
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
