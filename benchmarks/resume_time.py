"""How soon after its model is loaded a run that goes on at 90 % of an epoch of 50,000 images takes its first step.

    python benchmarks/resume_time.py [OUT.json]

One process, images of 32 x 32 pixels in Parquet, a ViT of one block, steps of 500 images. The run is stopped by SIGTERM
at step 90 of 100 and goes on by the same command, three times. The clock runs from the model being in memory to the
first forward: making the trainer, reading the checkpoint back, finding the place in the epoch, and decoding the first
batch. A run that begins at its first image is measured beside it. Decoded images are counted: those that were trained
on before are not among them.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from record import record

IMAGES, BATCH = 50_000, 500
STOP_AT = 9 * IMAGES // BATCH // 10
FLAGS = [
    "--num_train_epochs", "1", "--per_device_train_batch_size", str(BATCH), "--eval_strategy", "no",
    "--save_strategy", "no", "--load_best_model_at_end", "false", "--report_to", "none", 
    "--dataloader_num_workers", "0", "--verify_images", "false", "--max_eval_samples", "500",
]  # fmt: skip


def write_images(path: Path) -> None:
    random = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})

    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()

    pixels = random.integers(0, 255, (IMAGES, 32, 32, 3), dtype=np.uint8)
    rows = {"image": [{"bytes": png(each), "path": None} for each in pixels], "label": [i % 10 for i in range(IMAGES)]}
    for split, part in (("train", rows), ("validation", {key: values[:500] for key, values in rows.items()})):
        datasets.Dataset.from_dict(part, features=features).to_parquet(path / f"{split}.parquet")


def write_model(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32, image_size=32, patch_size=16
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def observed_run(argv: list[str], stop_at: int) -> None:
    """One start of `vit_dist.train`; prints what was measured. It stops itself after `stop_at` steps."""
    from vit_dist import model, train
    from vit_dist.data import dataset
    from vit_dist.trainer import ExactTrainer

    seen: dict[str, Any] = {"decoded": 0}
    clocks: list[float] = []
    build_model, step, items = model.build_model, ExactTrainer.training_step, dataset.ImageDataset.__getitems__

    def built(*args: Any, **kwargs: Any) -> Any:
        made = build_model(*args, **kwargs)
        clocks.extend((time.perf_counter(), time.process_time()))
        return made

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.setdefault("seconds", round(time.perf_counter() - clocks[0], 3))
        seen.setdefault("seconds of the processor", round(time.process_time() - clocks[1], 3))
        seen.setdefault("first step", self.state.global_step + 1)
        seen.setdefault("decoded by then", seen["decoded"])
        if self.state.global_step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    def decoded(self: Any, keys: list[int]) -> Any:
        seen["decoded"] += len(keys)
        return items(self, keys)

    model.build_model, ExactTrainer.training_step = built, stepped  # type: ignore[assignment, method-assign]
    dataset.ImageDataset.__getitems__ = decoded  # type: ignore[method-assign]
    train.main(argv)
    sys.stdout.write(f"\n{json.dumps(seen)}\n")


def start(folder: Path, name: str, stop_at: int) -> dict[str, Any]:
    argv = ["--data", str(folder / "data"), "--model", str(folder / "vit"), "--output_dir", str(folder / name), *FLAGS]
    done = subprocess.run([sys.executable, __file__, "--observe", str(stop_at), *argv], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(out: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as root:
        folder = Path(root)
        (folder / "data").mkdir()
        write_images(folder / "data")
        write_model(folder / "vit")
        begun = start(folder, "run", STOP_AT)
        again = [start(folder, "run", STOP_AT + turn) for turn in range(1, 4)]
    record(
        __file__, out, ("torch", "transformers", "accelerate"),
        images=IMAGES, images_per_step=BATCH, new_run=begun, resumed_runs=again,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--observe"]:
        observed_run(sys.argv[3:], int(sys.argv[2]))
    else:
        main(*sys.argv[1:])
