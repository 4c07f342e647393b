"""How long a save keeps training waiting, against a save that blocks, and what it takes of host memory.

    python benchmarks/checkpoint_stall.py [OUT.json]

ViT-B/16 with AdamW in float32 (86 M parameters, 1.03 GB of state), one process, one optimizer step taken. Six saves of
each kind, turn by turn (upstream, blocking, background, background, blocking, upstream, ...), medians:

- upstream: `transformers.Trainer._save_checkpoint`, which blocks, flushes nothing and hashes nothing
- blocking: ours, waited for: copied, written, flushed, hashed, committed
- background: ours as it is used; training waits for the copy alone
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import record
from transformers import Trainer, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vit_dist import console
from vit_dist.arguments import build_arguments
from vit_dist.batch import split_batch
from vit_dist.checkpoint import store
from vit_dist.checkpoint.writer import CheckpointWriter
from vit_dist.config import load_config
from vit_dist.data.pipeline import build_data
from vit_dist.distributed import GlooGroup
from vit_dist.metrics import ClassificationMetrics
from vit_dist.model import build_model
from vit_dist.run.failure import memory
from vit_dist.trainer import ExactTrainer, build_trainer

ROUNDS = 6


def build(folder: Path) -> ExactTrainer:
    """After one step."""
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=10)).save_pretrained(folder / "vit")
    ViTImageProcessorPil().save_pretrained(folder / "vit")
    config = load_config(
        ["--data", "digits", "--model", str(folder / "vit"), "--output_dir", str(folder / "run"), "--max_steps", "1",
         "--per_device_train_batch_size", "1", "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none",
         "--max_train_samples", "20", "--max_eval_samples", "10"]
    )  # fmt: skip
    args = build_arguments(config, split_batch(config, 1))
    data = build_data(config.data, config.model, config.data_seed, lambda what: lambda done, total: None)
    model = build_model(config.model, data.classes, data.input_size, seed=0).model
    trainer = build_trainer(
        config, args, data, model, ClassificationMetrics(data.classes), CheckpointWriter(config, GlooGroup())
    )
    trainer.train()
    return trainer


def main(out: str | None = None) -> None:
    console.set_up(1)
    seconds: dict[str, list[float]] = {"upstream": [], "blocking": [], "background": []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        trainer = build(Path(folder))
        resident = [memory()["resident"]]
        kinds = ["upstream", "blocking", "background"]
        for turn in range(ROUNDS):
            for kind in kinds if turn % 2 == 0 else kinds[::-1]:
                trainer.state.global_step += 1
                begun = time.perf_counter()
                if kind == "upstream":
                    trainer.state.stateful_callbacks = {"TrainerControl": trainer.control.state()}  # type: ignore[assignment]
                    Trainer._save_checkpoint(trainer, trainer.model, None)
                else:
                    trainer._save_checkpoint(trainer.model, None)
                    if kind == "blocking":
                        trainer.writer.wait()
                seconds[kind].append(time.perf_counter() - begun)
                resident.append(memory()["resident"])
                trainer.writer.wait()
                for path in list(store.checkpoints(trainer.writer.folder)):
                    store.discard(path)
        assert trainer.writer.problem is None
    medians = {kind: statistics.median(times) for kind, times in seconds.items() if times}
    record(
        __file__, out, ("torch", "transformers", "accelerate", "safetensors"), str(trainer.args.device),
        state_bytes=3 * 4 * sum(p.numel() for p in trainer.model.parameters()),
        seconds={kind: [round(s, 3) for s in times] for kind, times in seconds.items() if times},
        median_seconds={kind: round(s, 3) for kind, s in medians.items()},
        stall_over_blocking=round(medians["background"] / medians["blocking"], 3),
        stall_over_upstream=round(medians["background"] / medians["upstream"], 3),
        resident_bytes={"before": resident[0], "most": max(resident), "most_ever": memory()["most_resident"]},
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
