"""Test accuracy of the digits recipe over seeds, for what changes pixels or arithmetic a little.

python benchmarks/accuracy.py OUT.json [SEEDS]

One thread a process, as many processes at once as there are cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import record

VARIANTS: dict[str, list[str]] = {
    "processor": ["--image_source", "processor"],
    "stream": ["--image_source", "stream"],
    "resident": ["--image_source", "resident"],
    "bf16": ["--image_source", "resident", "--bf16", "true"],
    "bf16, bf16 residual": ["--image_source", "resident", "--bf16", "true", "--bf16_residual", "true"],
}


def accuracy(folder: Path, seed: int, flags: list[str]) -> float:
    command = [sys.executable, "-m", "vit_dist.cli", "train", "digits", "--seed", str(seed), "--report_to", "none"]
    subprocess.run(
        [*command, *flags, "--output_dir", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True,
    )  # fmt: skip
    return json.loads((folder / "all_results.json").read_text())["test_accuracy"]


def main(out: str | None = None, seeds: str = "5") -> None:
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = {
            name: [pool.submit(accuracy, Path(root, f"{name}-{seed}"), seed, flags) for seed in range(int(seeds))]
            for name, flags in VARIANTS.items()
        }
        found = {name: [run.result() for run in each] for name, each in runs.items()}
    spread = {name: [statistics.mean(values), statistics.stdev(values)] for name, values in found.items()}
    record(__file__, out, ("torch", "transformers", "accelerate"), test_accuracy=found, mean_and_deviation=spread)


if __name__ == "__main__":
    main(*sys.argv[1:])
