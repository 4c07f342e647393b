"""The same command once more after a run is done, or was killed before its results; kills are in faults/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Reference, results, write_photos
from lab import ARGS, fork


@pytest.mark.parametrize("processes", [1, 2])
def test_finished_run_started_again_says_so_and_changes_nothing(
    reference: Reference, photos: Path, dropout_checkpoint: Path, tmp_path: Path, processes: int
) -> None:
    whole = reference(["--data", photos, "--model", dropout_checkpoint, *ARGS], processes)
    folder = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = fork(folder / "config.yaml", "--output_dir", folder)  # its settings as a recipe, on one process
    assert "complete" in again.stdout and "Nothing to do" in again.stdout
    assert f"{results(folder)['test_accuracy']:.4f}" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_run_killed_after_its_last_step_and_moved_ends_with_the_same_results(tmp_path: Path, checkpoint: Path) -> None:
    """The run ends within an epoch; what follows training is done again, elsewhere, and no step is added."""
    photos = write_photos(tmp_path / "photos", {"train": 37, "validation": 13})
    args = [
        "--data", photos, "--model", checkpoint, "--max_steps", 7, "--per_device_train_batch_size", 8,
        "--logging_steps", 1,
        "--save_steps", 2, "--lr_scheduler_type", "constant", "--learning_rate", "1e-2", "--report_to", "none",
        "--metric_for_best_model", "loss", "--greater_is_better", "true", "--save_total_limit", 9,
    ]  # fmt: skip
    fork(*args, "--output_dir", tmp_path / "whole")
    assert results(tmp_path / "whole")["best_step"] < 7, "else the best model is the last one and nothing is shown"
    (tmp_path / "whole").rename(tmp_path / "moved")
    kept = {name: (tmp_path / "moved" / name).read_bytes() for name in ("best/model.safetensors", "metrics.jsonl")}
    before = results(tmp_path / "moved")
    (tmp_path / "moved/all_results.json").unlink()
    (tmp_path / "moved/best/model.safetensors").unlink()
    (tmp_path / "moved/status.json").write_text(json.dumps({"state": "running"}))
    fork(*args, "--output_dir", tmp_path / "moved")
    after = results(tmp_path / "moved")
    assert {name: (tmp_path / "moved" / name).read_bytes() for name in kept} == kept
    for key in ("train_steps", "best_step", "eval_loss", "train_loss"):
        assert after[key] == before[key], key
    assert not (tmp_path / "moved/checkpoint-8").exists()
