"""Killed with SIGKILL and started again by the same command: the same bits as a run that nobody disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import results, rows, run, run_until_step, write_photos

from vit_dist.callbacks.speed import KEYS

ARGS = [
    "--max_steps", 60, "--learning_rate", "3e-3", "--logging_steps", 1, "--save_steps", 7, "--save_total_limit", 20,
    "--per_device_train_batch_size", 8, "--report_to", "none", "--lr_scheduler_type", "cosine",
]  # fmt: skip
# Checkpoint 14 lies within the third epoch: 5 steps for one process, 3 for two and with accumulation.
CASES = {
    "one": ("python", 1, []),
    "bf16": ("python", 1, ["--bf16", "--gradient_accumulation_steps", 2]),
    "two": ("torchrun", 2, []),
}


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest, photos: Path, dropout_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(undisturbed, killed and resumed): augmentation and dropout on."""
    launcher, processes, more = CASES[request.param]
    root = tmp_path_factory.mktemp(f"resume_{request.param}")
    args = ["--data", photos, "--model", dropout_checkpoint, *ARGS, *more]
    run(*args, "--output_dir", root / "whole", launcher=launcher, processes=processes)
    run_until_step(17, root / "killed", *args, launcher=launcher, processes=processes)
    assert json.loads((root / "killed" / "status.json").read_text())["state"] == "running"
    again = run(*args, "--output_dir", root / "killed", launcher=launcher, processes=processes)
    assert "from checkpoint-" in again.stdout
    return root / "whole", root / "killed"


def test_the_weights_are_bit_identical(pair: tuple[Path, Path]) -> None:
    whole, killed = pair
    for name in ("best/model.safetensors", "checkpoint-60/model.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_the_optimizer_is_bit_identical(pair: tuple[Path, Path]) -> None:
    one, other = (torch.load(folder / "checkpoint-60/optimizer.pt", weights_only=True)["state"] for folder in pair)
    assert one.keys() == other.keys()
    for key in one:
        assert all(torch.equal(one[key][name], other[key][name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_metrics_have_every_row_once_and_equal(pair: tuple[Path, Path]) -> None:
    timing = ("runtime", "per_second", *KEYS)
    whole, killed = ([{k: v for k, v in row.items() if not k.endswith(timing)} for row in rows(f)] for f in pair)
    assert [row["step"] for row in killed if "loss" in row] == list(range(1, 61))
    assert whole == killed


def test_results_are_the_same(pair: tuple[Path, Path]) -> None:
    one, other = map(results, pair)
    for key in ("train_loss", "eval_accuracy", "eval_loss", "test_accuracy", "test_loss", "best_step", "train_steps"):
        assert one[key] == pytest.approx(other[key], rel=1e-12), key


def test_a_finished_run_says_so_and_exits_0(pair: tuple[Path, Path]) -> None:
    folder = pair[0]
    before = (folder / "all_results.json").stat().st_mtime_ns
    again = run(folder / "config.yaml", "--output_dir", folder)  # its settings as a recipe, on one process
    assert "complete" in again.stdout and "Nothing to do" in again.stdout
    assert f"{results(folder)['test_accuracy']:.4f}" in again.stdout
    assert (folder / "all_results.json").stat().st_mtime_ns == before


def test_killed_after_the_last_step_and_moved(tmp_path: Path, checkpoint: Path) -> None:
    """The run ends within an epoch; what follows training is done again, elsewhere, and no step is added."""
    photos = write_photos(tmp_path / "photos", {"train": 37, "validation": 13})
    args = [
        "--data", photos, "--model", checkpoint, "--max_steps", 7, "--per_device_train_batch_size", 8,
        "--logging_steps", 1,
        "--save_steps", 2, "--lr_scheduler_type", "constant", "--learning_rate", "1e-2", "--report_to", "none",
        "--metric_for_best_model", "loss", "--greater_is_better", "true", "--save_total_limit", 9,
    ]  # fmt: skip
    run(*args, "--output_dir", tmp_path / "whole")
    assert results(tmp_path / "whole")["best_step"] < 7, "else the best model is the last one and nothing is shown"
    (tmp_path / "whole").rename(tmp_path / "moved")
    kept = {name: (tmp_path / "moved" / name).read_bytes() for name in ("best/model.safetensors", "metrics.jsonl")}
    before = results(tmp_path / "moved")
    (tmp_path / "moved/all_results.json").unlink()
    (tmp_path / "moved/best/model.safetensors").unlink()
    (tmp_path / "moved/status.json").write_text(json.dumps({"state": "running"}))
    run(*args, "--output_dir", tmp_path / "moved")
    after = results(tmp_path / "moved")
    assert {name: (tmp_path / "moved" / name).read_bytes() for name in kept} == kept
    for key in ("train_steps", "best_step", "eval_loss", "train_loss"):
        assert after[key] == before[key], key
    assert not (tmp_path / "moved/checkpoint-8").exists()
