"""Test accuracy over seeds, for what changes pixels or arithmetic a little.

python benchmarks/accuracy.py OUT.json [--seeds 5]           the digits recipe
python benchmarks/accuracy.py OUT.json --photos FOLDER       photos, `tiny` at 32 pixels

One thread a process, as many processes at once as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import record

DIGITS: dict[str, list[str]] = {
    "processor": ["--image_source", "processor"],
    "stream": ["--image_source", "stream"],
    "resident": ["--image_source", "resident"],
    "bf16": ["--image_source", "resident", "--bf16", "true"],
    "bf16, bf16 residual": ["--image_source", "resident", "--bf16", "true", "--bf16_residual", "true"],
}
PHOTOS = {source: ["--image_source", source] for source in ("processor", "stream", "cache")}
SETTINGS = {"model": "tiny", "num_train_epochs": 40, "per_device_train_batch_size": 64, "learning_rate": 1e-3}


def accuracy(folder: Path, seed: int, recipe: list[str], flags: list[str]) -> float:
    command = [sys.executable, "-m", "vit_dist.cli", "train", *recipe, "--seed", str(seed), "--report_to", "none"]
    subprocess.run(
        [*command, *flags, "--output_dir", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True,
    )  # fmt: skip
    return json.loads((folder / "all_results.json").read_text())["test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--photos", type=Path, help="a class folder with train, validation and test")
    given = parser.parse_args()
    recipe, variants, facts = ["digits"], DIGITS, {"recipe": "digits"}
    if given.photos:
        words = {**SETTINGS, "data": str(given.photos.resolve())}
        recipe, variants = [word for name, value in words.items() for word in (f"--{name}", str(value))], PHOTOS
        facts = {"recipe": {**SETTINGS, "data": given.photos.name}}
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = {
            (name, seed): pool.submit(accuracy, Path(root, f"{name}-{seed}"), seed, recipe, flags)
            for seed in range(given.seeds)
            for name, flags in variants.items()
        }
        found = {name: [runs[name, seed].result() for seed in range(given.seeds)] for name in variants}
    spread = {name: [statistics.mean(values), statistics.stdev(values)] for name, values in found.items()}
    record(__file__, given.out, ("torch", "transformers", "accelerate"), **facts, test_accuracy=found,
           mean_and_deviation=spread)  # fmt: skip


if __name__ == "__main__":
    main()
