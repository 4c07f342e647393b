"""Every image counts once: for any number of images and processes the metrics are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_photos
from fork_ranks import fork_ranks

SIZES = (1, 7, 37, 41, 101)
KEYS = ("accuracy", "f1_macro", "balanced_accuracy", "loss")


def evaluate(rank: int, world_size: int, checkpoint: str, photos: str, out: str) -> None:
    """On each rank: evaluate the first n images for each n, at per-device batches of 1 and 4."""
    from vit_dist import console
    from vit_dist.arguments import build_arguments
    from vit_dist.batch import split_batch
    from vit_dist.checkpoint.writer import CheckpointWriter
    from vit_dist.config import load_config
    from vit_dist.data.dataset import ImageDataset
    from vit_dist.data.pipeline import build_data
    from vit_dist.distributed import GlooGroup
    from vit_dist.metrics import ClassificationMetrics
    from vit_dist.model import build_model
    from vit_dist.run.results import predict
    from vit_dist.trainer import build_trainer

    console.set_up(rank)
    found: dict[str, Any] = {}
    config = load_config(["--data", photos, "--model", checkpoint, "--output_dir", f"{out}/run", "--report_to", "none",
                          "--per_device_eval_batch_size", "4"])  # fmt: skip
    args = build_arguments(config, split_batch(config, world_size))
    assert args.world_size == world_size
    data = build_data(config.data, config.model, config.data_seed, console.progress)
    model = build_model(config.model, data.classes, data.input_size, seed=0).model
    metrics = ClassificationMetrics(data.classes)
    trainer = build_trainer(config, args, data, model, metrics, CheckpointWriter(config, GlooGroup(), rank))
    gathers: list[int] = []
    gather = trainer.accelerator.gather
    trainer.accelerator.gather = lambda rows: gathers.append(len(rows)) or gather(rows)  # type: ignore[method-assign, func-returns-value]
    for batch in (4, 1):
        args.per_device_eval_batch_size = batch
        for size in SIZES:
            part = ImageDataset(
                data.validation.table.select(range(size)), data.validation.transform, data.validation.rules
            )
            logits, numbers = predict(trainer, part, metrics, "eval")
            assert len(logits) == size
            gathers.clear()
            numbers["in_training"] = trainer.evaluate(part)["eval_loss"]
            numbers["gathers"] = len(gathers)
            found[f"{batch}/{size}"] = numbers
    if rank == 0:
        Path(out, f"{world_size}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    root = tmp_path_factory.mktemp("evaluation")
    photos = write_photos(root / "photos", {"train": 12, "validation": max(SIZES)})
    for world_size in (1, 2, 3):
        fork_ranks(evaluate, world_size, str(checkpoint), str(photos), str(root))
    return {world_size: json.loads((root / f"{world_size}.json").read_text()) for world_size in (1, 2, 3)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_metrics_do_not_depend_on_the_number_of_processes(found: Any, world_size: int, batch: int, size: int) -> None:
    one, other = found[1][f"4/{size}"], found[world_size][f"{batch}/{size}"]
    for key in KEYS:
        assert other[f"eval_{key}"] == pytest.approx(one[f"eval_{key}"], abs=1e-6), key
    assert other["eval_samples"] == size
    assert other["gathers"] == 1, "nothing is gathered before the end, and no logits"
    assert other["in_training"] == pytest.approx(one["eval_loss"], abs=1e-6)


def test_evaluation_loss_of_an_untrained_model_is_near_log_3(found: Any) -> None:
    """Not a constant: it differs between sizes, and is near log 3 for a model that has learnt nothing."""
    values = [found[3][f"1/{size}"]["eval_loss"] for size in SIZES]
    assert len(set(values)) == len(SIZES)
    assert np.allclose(values, np.log(3), atol=0.3)
