"""What goes wrong, goes wrong clearly: one line or one traceback, non-zero, at once, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import results, run, write_photos
from fork_ranks import fork_ranks
from lab import fork

from vit_dist import stop
from vit_dist.distributed import check_launch, use_one_device
from vit_dist.errors import UserError

FEW = ["--max_steps", 4, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--report_to", "none"]


@pytest.fixture(scope="module")
def finished(photos: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures") / "run"
    fork("--data", photos, "--model", checkpoint, *FEW, "--output_dir", folder)
    return folder


def test_run_folder_with_other_settings_is_refused_and_kept(finished: Path, photos: Path, checkpoint: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    refused = fork(
        "--data", photos, "--model", checkpoint, *FEW, "--learning_rate", "1e-3", "--output_dir", finished, expect=2
    )
    assert "learning_rate 5e-05 -> 0.001" in refused.stderr and "--fresh" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert before == {path: path.stat().st_mtime_ns for path in finished.iterdir()}


def test_run_folder_with_fresh_is_moved_aside(finished: Path, photos: Path, checkpoint: Path) -> None:
    accuracy = results(finished)["test_accuracy"]
    again = fork("--data", photos, "--model", checkpoint, *FEW, "--seed", 7, "--fresh", "--output_dir", finished)
    aside = finished.with_name("run.previous")
    assert f"test accuracy {accuracy:.4f}" in again.stdout and str(aside) in again.stdout
    assert results(aside)["test_accuracy"] == accuracy
    assert json.loads((finished / "run.json").read_text())["attempts"] == 1


def test_folder_that_is_no_run_is_refused_and_kept(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for flags in ([], ["--fresh"]):
        refused = fork("--data", photos, "--model", checkpoint, *FEW, *flags, "--output_dir", tmp_path, expect=2)
        assert "is not empty and not a run folder" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.launch
def test_exception_on_one_rank_ends_all_and_is_shown_once(tmp_path: Path, checkpoint: Path) -> None:
    data = write_photos(tmp_path / "photos", {"train": 37, "validation": 5})
    broken = sorted((data / "train" / "cat").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    failed = run(
        "--data", data, "--model", checkpoint, *FEW, "--max_steps", 50, "--verify_images", "false",
        "--output_dir", tmp_path / "run", launcher="torchrun", processes=2, expect=1,
    )  # fmt: skip
    assert time.time() - (tmp_path / "run" / "failure.json").stat().st_mtime < 20, "from the failure to the end of all"
    assert failed.stderr.count("Traceback (most recent call last)\n") <= 1 or "failed\nTraceback" in failed.stderr
    shown = [line for line in failed.stderr.splitlines() if line.startswith("rank ") and line.endswith(" failed")]
    assert len(shown) == 1, failed.stderr
    assert f"cat/{broken.name}" in failed.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and broken.name in status["reason"]
    assert shown == [f"rank {status['rank']} failed"]


def test_bad_image_found_before_training_refuses_the_run_or_is_skipped(tmp_path: Path, checkpoint: Path) -> None:
    data = write_photos(tmp_path / "photos", {"train": 37, "validation": 5})
    broken = sorted((data / "train" / "cat").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    args = ["--data", data, "--model", checkpoint, *FEW, "--output_dir", tmp_path / "run"]
    failed = fork(*args, processes=2, expect=2)
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--on_bad_image skip" in errors[0] and broken.name in failed.stderr
    assert not (tmp_path / "run").exists()
    fork(*args, "--on_bad_image", "skip", "--max_bad_fraction", 0.1)
    found = results(tmp_path / "run")
    assert (found["skipped_images"], found["train_samples"]) == (1, 36)


def test_loss_that_is_not_finite_stops_the_run_and_names_the_images(
    tmp_path: Path, photos: Path, checkpoint: Path
) -> None:
    failed = fork(
        "--data", photos, "--model", checkpoint, *FEW, "--learning_rate", "1e30", "--max_grad_norm", 0,
        "--output_dir", tmp_path / "run", expect=2,
    )  # fmt: skip
    assert "NaN or infinite at step" in failed.stderr and "rank 0: images" in failed.stderr and ".png" in failed.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


@pytest.mark.launch
def test_exception_with_data_loading_processes_left_ends_the_run_at_once(
    tmp_path: Path, photos: Path, checkpoint: Path
) -> None:
    """They are shielded from signals; the interpreter would wait for them, and PyTorch report their end as well."""
    script = [sys.executable, Path(__file__).parent / "faulty_train.py", "--data", photos, "--model", checkpoint, *FEW]
    more = ["--dataloader_num_workers", 2, "--output_dir", tmp_path / "run"]
    failed = subprocess.run(
        list(map(str, [*script, *more])), env={**os.environ, "VIT_DIST_FAULT": "after_snapshot:0:1:exc"},
        capture_output=True, text=True, timeout=stop.WORKER_GRACE + 90,
    )  # fmt: skip
    assert failed.returncode == 1 and failed.stderr.count("Traceback") == 1
    assert failed.stderr.rstrip().endswith("RuntimeError: a fault of the test")


def one_nan_image(rank: int, world_size: int, checkpoint: str, photos: str, out: str) -> None:
    """On each rank: image 5 is NaN; write down what stopped training, and whether the weights moved since."""
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
    from vit_dist.trainer import build_trainer

    class Poisoned(ImageDataset):
        def __getitems__(self, keys: list[int]) -> dict[str, Any]:
            batch = super().__getitems__(keys)
            batch["pixel_values"][batch["index"] == 5] = float("nan")
            return batch

    console.set_up(1)
    config = load_config(["--data", photos, "--model", checkpoint, "--output_dir", f"{out}/run", "--report_to", "none",
                          "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"])  # fmt: skip
    args = build_arguments(config, split_batch(config, world_size))
    data = build_data(config.data, config.model, config.data_seed, console.progress)
    model = build_model(config.model, data.classes, data.input_size, seed=0).model
    trainer = build_trainer(
        config, args, data, model, ClassificationMetrics(data.classes), CheckpointWriter(config, GlooGroup(), rank)
    )
    trainer.train_dataset = Poisoned(data.train.table, data.train.transform, data.train.rules)
    message = ""
    try:
        trainer.train()
    except UserError as error:
        message = str(error)
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    Path(out, f"{rank}.json").write_text(json.dumps([message, finite, trainer.state.global_step]))


def test_nan_image_on_one_rank_stops_every_rank_before_the_step(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    fork_ranks(one_nan_image, 2, str(checkpoint), str(photos), str(tmp_path))
    (one, finite, step), other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [one, finite, step] == other
    assert finite, "the optimizer step was not taken"
    assert f"at step {step + 1}" in one and one.count("images 5 (") == 1 and one.count("rank ") == 1


@pytest.mark.launch
def test_accelerate_that_starts_one_process_of_two_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    launch = ["launch", "--num_processes", 2, "-m", "vit_dist.train"]  # without our configuration file
    refused = run(*launch, "--output_dir", tmp_path / "run", module="accelerate.commands.accelerate_cli", expect=1)
    assert "asked for several processes but started one" in refused.stderr and "--multi_gpu" in refused.stderr
    assert not (tmp_path / "run").exists()


def args(**kwargs: object) -> SimpleNamespace:
    return SimpleNamespace(**{"world_size": 1, "n_gpu": 1, "deepspeed": None, "fsdp": None, **kwargs})


def test_world_size_unknown_to_the_arguments_is_refused() -> None:
    with pytest.raises(UserError, match="started 2 processes but the training arguments see 1"):
        check_launch(args(), {"RANK": "0", "WORLD_SIZE": "2"})  # type: ignore[arg-type]
    check_launch(args(world_size=2), {"RANK": "0", "WORLD_SIZE": "2"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="DataParallel"):
        check_launch(args(n_gpu=4), {})  # type: ignore[arg-type]


def test_process_without_launcher_uses_one_gpu_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environ = {"CUDA_VISIBLE_DEVICES": "2,3,5,7"}
    assert use_one_device(environ) == 3
    assert environ["CUDA_VISIBLE_DEVICES"] == "2"
    launched = {"WORLD_SIZE": "4"}
    assert use_one_device(launched) == 0 and "CUDA_VISIBLE_DEVICES" not in launched
