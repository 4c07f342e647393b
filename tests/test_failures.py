"""What goes wrong, goes wrong clearly: one line or one traceback, non-zero, at once, nothing lost. Real launches."""

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
from conftest import results, run, run_until_step, write_photos
from fork_ranks import fork_ranks

from vit_dist import stop
from vit_dist.distributed import check_launch, use_one_device
from vit_dist.errors import UserError

FEW = ["--max_steps", 4, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--report_to", "none"]


@pytest.fixture(scope="module")
def finished(photos: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made with canary secrets in its environment and W&B writing offline."""
    folder = tmp_path_factory.mktemp("failures") / "run"
    done = run(
        "--data", photos, "--model", checkpoint, *FEW[:-1], "wandb", "tensorboard", "--output_dir", folder,
        WANDB_MODE="offline", WANDB_API_KEY="c0ffee" * 6 + "abcd", HF_TOKEN="hf_canaryCanaryCanary",
    )  # fmt: skip
    (folder / "stdout").write_text(done.stdout + done.stderr)
    return folder


def test_no_secret_is_in_any_file_or_line(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert {"config.yaml", "run.json", "stdout"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert b"c0ffee" * 3 not in content and b"canaryCanary" not in content, path


def test_other_settings_for_the_same_folder_are_refused(finished: Path, photos: Path, checkpoint: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    refused = run(
        "--data", photos, "--model", checkpoint, *FEW, "--learning_rate", "1e-3", "--output_dir", finished, expect=2
    )
    assert "learning_rate 5e-05 -> 0.001" in refused.stderr and "--fresh" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert before == {path: path.stat().st_mtime_ns for path in finished.iterdir()}


def test_fresh_moves_the_old_run_aside_and_says_so(finished: Path, photos: Path, checkpoint: Path) -> None:
    accuracy = results(finished)["test_accuracy"]
    again = run("--data", photos, "--model", checkpoint, *FEW, "--seed", 7, "--fresh", "--output_dir", finished)
    aside = finished.with_name("run.previous")
    assert f"test accuracy {accuracy:.4f}" in again.stdout and str(aside) in again.stdout
    assert results(aside)["test_accuracy"] == accuracy
    assert json.loads((finished / "run.json").read_text())["attempts"] == 1


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for flags in ([], ["--fresh"]):
        refused = run("--data", photos, "--model", checkpoint, *FEW, *flags, "--output_dir", tmp_path, expect=2)
        assert "is not empty and not a run folder" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_crash_on_one_rank_ends_all_within_seconds(tmp_path: Path, checkpoint: Path) -> None:
    data = write_photos(tmp_path / "photos", {"train": 37, "validation": 5})
    broken = sorted((data / "train" / "cat").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    begun = time.monotonic()
    failed = run(
        "--data", data, "--model", checkpoint, *FEW, "--max_steps", 50, "--verify_images", "false",
        "--output_dir", tmp_path / "run", launcher="torchrun", processes=2, expect=1,
    )  # fmt: skip
    assert time.monotonic() - begun < 60
    assert failed.stderr.count("Traceback (most recent call last)\n") <= 1 or "failed\nTraceback" in failed.stderr
    shown = [line for line in failed.stderr.splitlines() if line.startswith("rank ") and line.endswith(" failed")]
    assert len(shown) == 1, failed.stderr
    assert f"cat/{broken.name}" in failed.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and broken.name in status["reason"]
    assert shown == [f"rank {status['rank']} failed"]


def test_a_bad_image_stops_the_run_before_training_by_default(tmp_path: Path, checkpoint: Path) -> None:
    data = write_photos(tmp_path / "photos", {"train": 37, "validation": 5})
    broken = sorted((data / "train" / "cat").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    args = ["--data", data, "--model", checkpoint, *FEW, "--output_dir", tmp_path / "run"]
    failed = run(*args, launcher="torchrun", processes=2, expect=1)
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--on_bad_image skip" in errors[0] and broken.name in failed.stderr
    assert not (tmp_path / "run").exists()
    run(*args, "--on_bad_image", "skip", "--max_bad_fraction", 0.1)
    found = results(tmp_path / "run")
    assert (found["skipped_images"], found["train_samples"]) == (1, 36)


def test_a_diverging_loss_stops_the_run_and_names_the_images(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    failed = run(
        "--data", photos, "--model", checkpoint, *FEW, "--learning_rate", "1e30", "--max_grad_norm", 0,
        "--output_dir", tmp_path / "run", expect=2,
    )  # fmt: skip
    assert "NaN or infinite at step" in failed.stderr and "rank 0: images" in failed.stderr and ".png" in failed.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_failure_ends_at_once_though_data_loading_processes_are_left(
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
    from vit_dist.distributed import Channel
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
        config, args, data, model, ClassificationMetrics(data.classes), CheckpointWriter(config, Channel(), rank)
    )
    trainer.train_dataset = Poisoned(data.train.table, data.train.transform, data.train.rules)
    message = ""
    try:
        trainer.train()
    except UserError as error:
        message = str(error)
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    Path(out, f"{rank}.json").write_text(json.dumps([message, finite, trainer.state.global_step]))


def test_one_bad_image_on_one_rank_stops_every_rank_before_the_step(
    tmp_path: Path, photos: Path, checkpoint: Path
) -> None:
    fork_ranks(one_nan_image, 2, str(checkpoint), str(photos), str(tmp_path))
    (one, finite, step), other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [one, finite, step] == other
    assert finite, "the optimizer step was not taken"
    assert f"at step {step + 1}" in one and one.count("images 5 (") == 1 and one.count("rank ") == 1


def test_accelerate_that_starts_one_process_instead_of_two_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    launch = ["launch", "--num_processes", 2, "-m", "vit_dist.train"]  # without our configuration file
    refused = run(*launch, "--output_dir", tmp_path / "run", module="accelerate.commands.accelerate_cli", expect=1)
    assert "asked for several processes but started one" in refused.stderr and "--multi_gpu" in refused.stderr
    assert not (tmp_path / "run").exists()


def args(**kwargs: object) -> SimpleNamespace:
    return SimpleNamespace(**{"world_size": 1, "n_gpu": 1, "deepspeed": None, "fsdp": None, **kwargs})


def test_a_world_size_that_the_arguments_do_not_see_is_refused() -> None:
    with pytest.raises(UserError, match="started 2 processes but the training arguments see 1"):
        check_launch(args(), {"RANK": "0", "WORLD_SIZE": "2"})  # type: ignore[arg-type]
    check_launch(args(world_size=2), {"RANK": "0", "WORLD_SIZE": "2"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="DataParallel"):
        check_launch(args(n_gpu=4), {})  # type: ignore[arg-type]


def test_plain_python_uses_one_gpu_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environ = {"CUDA_VISIBLE_DEVICES": "2,3,5,7"}
    assert use_one_device(environ) == 3
    assert environ["CUDA_VISIBLE_DEVICES"] == "2"
    launched = {"WORLD_SIZE": "4"}
    assert use_one_device(launched) == 0 and "CUDA_VISIBLE_DEVICES" not in launched


def test_half_a_checkpoint_is_passed_over(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    many = [
        "--data",
        photos,
        "--model",
        checkpoint,
        *FEW,
        "--max_steps",
        40,
        "--save_steps",
        5,
        "--save_total_limit",
        9,
    ]
    run_until_step(17, tmp_path / "run", *many)
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    weights = newest / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    again = run(*many, "--output_dir", tmp_path / "run")
    assert f"{newest.name} is passed over: model.safetensors has" in again.stdout
    assert f"from checkpoint-{int(newest.name.rpartition('-')[2]) - 5}" in again.stdout
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"


def test_another_global_batch_is_refused_on_resume(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    many = ["--data", photos, "--model", checkpoint, *FEW, "--max_steps", 60, "--save_steps", 5]
    run_until_step(12, tmp_path / "run", *many)
    refused = run(*many, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "run", expect=2)
    assert "global batch of 4 images, this launch makes 8" in refused.stderr
    same = run(
        *many, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "run"
    )
    assert "4 = 2 per device x 1 device x 2 accumulation" in same.stdout
