"""This package and the tutorial's recipe on this machine's CPU cores, process by process in the order ABBA.

    python benchmarks/cpu.py CIFAR10 OUT.json [--rounds 3]

CIFAR-10 as Parquet, 32 pixels, the package's `tiny` ViT; end to end, crops and flips included on our side, after the
first steps. The peers are those of benchmarks/peers/steps.py: the tutorial (image processor in the main process, batch
16), the transformers example and a plain loop (both with torch.compile and data loading processes; needs torchvision).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import steps as peers
from record import record
from transformers import TrainerCallback, ViTImageProcessor

SIDE, STEPS, WARM_UP = 32, 150, 20
OURS: dict[str, list[str]] = {
    "ours, batch 16": ["--per_device_train_batch_size", "16"],
    "ours, batch 16, resident": ["--per_device_train_batch_size", "16", "--image_source", "resident"],
    "ours, batch 128, resident": ["--per_device_train_batch_size", "128", "--image_source", "resident"],
}


class Clock(TrainerCallback):
    """Images a second after the first steps."""

    def __init__(self, batch: int) -> None:
        self.batch, self.rate = batch, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self._begun = time.perf_counter()
        if state.global_step == state.max_steps:
            self.rate = (state.global_step - WARM_UP) * self.batch / (time.perf_counter() - self._begun)


PEERS = {"tutorial": 16, "hf_example, batch 128": 128, "plain PyTorch, batch 128": 128}


def peer(name: str, cifar10: Path, root: Path) -> float:
    from vit_dist.data.transforms import load_processor
    from vit_dist.model import build_model
    from vit_dist.options import ModelOptions

    options, classes = ModelOptions(model="tiny"), [str(label) for label in range(10)]
    load_processor(options).save_pretrained(root)
    assert ViTImageProcessor.from_pretrained(root).size["height"] == SIDE
    model, workers, batch = build_model(options, classes, SIDE, seed=0).model, len(os.sched_getaffinity(0)), PEERS[name]
    if name.startswith("plain"):
        return peers.plain(model, root, cifar10, STEPS, WARM_UP, batch, workers)
    clock = Clock(batch)
    if name == "tutorial":
        peers.tutorial(model, root, cifar10, root / "run", STEPS, clock)
    else:
        peers.hf_example(model, root, cifar10, root / "run", STEPS, batch, workers, clock)
    return clock.rate


def ours(cifar10: Path, root: Path, flags: list[str]) -> float:
    from vit_dist import build, train

    clock, make = Clock(int(flags[1])), build.build_trainer

    def with_clock(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        trainer.add_callback(clock)
        return trainer

    build.build_trainer = with_clock
    fixed = {
        "data": cifar10, "model": "tiny", "output_dir": root / "run", "max_steps": STEPS, "cache_dir": root / "cache",
        "max_train_samples": 20000, "max_eval_samples": 50, "max_predict_samples": 50, "verify_images": "false",
        "eval_strategy": "no", "save_strategy": "no", "report_to": "none", "logging_steps": 10,
    }  # fmt: skip
    if code := train.main([str(word) for key, value in fixed.items() for word in (f"--{key}", value)] + flags):
        raise RuntimeError(f"vit_dist.train ended with {code}")
    return clock.rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as root:
            cifar10 = given.cifar10.resolve()
            if given.one in PEERS:
                rate = peer(given.one, cifar10, Path(root))
            else:
                rate = ours(cifar10, Path(root), OURS[given.one])
        sys.stdout.write(f"\n{json.dumps(rate)}\n")
        return
    rates: dict[str, list[float]] = {name: [] for name in (*PEERS, *OURS)}
    for _ in range(given.rounds):
        for name in [*rates, *reversed(rates)]:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", name], capture_output=True, text=True, timeout=300, check=True
            )
            rates[name].append(json.loads(done.stdout.splitlines()[-1]))
            sys.stderr.write(f"{name}: {rates[name][-1]:,.0f} images/s\n")
    base = statistics.median(rates["tutorial"])
    ratios = {name: statistics.median(values) / base for name, values in rates.items() if name != "tutorial"}
    record(
        __file__, given.out, ("torch", "transformers", "accelerate", "datasets", "pillow"), "cpu",
        cores=len(os.sched_getaffinity(0)), images_per_second=rates, ratios=ratios,
    )  # fmt: skip
    sys.stderr.write(f"{ratios}\n")


if __name__ == "__main__":
    main()
