"""What a finished run leaves, read back as a user would. The runs are those of the topologies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import CLASSES, STEPS, TOPOLOGIES, results, rows
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vit_dist.config import load_config
from vit_dist.run import run_folder

pytestmark = pytest.mark.launch


@pytest.fixture(params=["one", "torchrun"])
def folder(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Path:
    return runs[request.param]


def test_finished_run_leaves_these_files_and_no_other(folder: Path) -> None:
    left = {path.name for path in folder.iterdir()}
    assert left == {
        "config.yaml", "classes.json", "run.json", "metrics.jsonl", "all_results.json", "predictions.parquet",
        "status.json", "best", "logs", "wandb",
    }  # fmt: skip
    assert {path.name for path in (folder / "best").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
    }  # fmt: skip
    assert (folder / "best/model.safetensors").stat().st_mode & 0o777 == (folder / "run.json").stat().st_mode & 0o777
    assert list((folder / "logs").glob("events.out.tfevents*"))


def test_best_model_loads_with_transformers_and_gives_the_predictions(folder: Path, photos: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder / "best").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "best", backend="pil")
    table = pq.read_table(folder / "predictions.parquet").to_pylist()
    assert len(table) == 11 and {row["split"] for row in table} == {"test"}
    for row in table:
        path = next(photos.glob(f"**/{row['id']}"))
        assert row["path"] == str(path)
        with torch.no_grad():
            logits = model(**processor(Image.open(path).convert("RGB"), return_tensors="pt")).logits[0]
        assert row["probabilities"] == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)
        assert row["predicted"] == model.config.id2label[int(logits.argmax())]
        assert row["label"] == path.parent.name and row["correct"] == (row["label"] == row["predicted"])
    assert np.mean([row["correct"] for row in table]) == pytest.approx(results(folder)["test_accuracy"])


def test_class_list_is_the_same_in_every_file(folder: Path) -> None:
    saved = json.loads((folder / "classes.json").read_text())
    assert saved["classes"] == list(CLASSES)
    config = AutoModelForImageClassification.from_pretrained(folder / "best").config
    assert config.id2label == dict(enumerate(CLASSES))
    assert json.loads((folder / "run.json").read_text())["data"]["classes"] == saved["sha256"]


def test_results_have_the_names_of_transformers(folder: Path) -> None:
    found = results(folder)
    assert {
        "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_accuracy",
        "eval_loss",
        "eval_f1_macro", "eval_balanced_accuracy", "eval_samples", "test_accuracy", "test_loss",
        "test_samples", "world_size", "global_batch_size", "skipped_images", "best_step", "eval_per_class",
        "duplicates_across_splits", "duplicates_across_labels", "duplicates_within_splits",
    } <= found.keys()  # fmt: skip
    assert set(found["test_per_class"]) == set(CLASSES)
    assert sum(row["support"] for row in found["test_per_class"].values()) == found["test_samples"] == 11


def test_results_are_those_of_the_best_step(folder: Path) -> None:
    found = results(folder)
    curve = {row["step"]: row["eval_accuracy"] for row in rows(folder) if "eval_accuracy" in row}
    assert found["eval_accuracy"] == max(curve.values()) == curve[found["best_step"]]


def test_metrics_have_one_json_object_a_line_in_order(folder: Path) -> None:
    found = rows(folder)
    steps = [row["step"] for row in found if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} <= found[0].keys()
    assert [row["step"] for row in found if "eval_loss" in row] == [10, 20, STEPS]
    assert [row["step"] for row in found if "test_accuracy" in row] == [STEPS]


def test_saved_settings_ask_for_the_same_run(folder: Path) -> None:
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert load_config([str(folder / "config.yaml")]).resolved() == saved
    assert saved["max_steps"] == STEPS and saved["random_resized_crop"] is True


def test_status_of_a_finished_run_is_complete(folder: Path) -> None:
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("complete", STEPS)


def test_model_card_has_data_recipe_results_and_usage(folder: Path) -> None:
    card = ModelCard.load(folder / "best" / "README.md")
    found = results(folder)
    accuracies = {result.dataset_split: result.metric_value for result in card.data.eval_results}
    assert accuracies == {"test": found["test_accuracy"], "validation": found["eval_accuracy"]}
    for text in (
        "pipeline(",
        f"{found['test_accuracy']:.4f}",
        "learning_rate",
        "`cat`, `dog`, `emu`",
        "transformers 5",
    ):
        assert text in card.text, text


def test_plan_is_printed_by_rank_0_only(runs: dict[str, Path]) -> None:
    for name, (_, processes, per_device, accumulation) in TOPOLOGIES.items():
        said = (runs[name].parent / f"{name}.log").read_text()
        devices = f"{processes} device{'s' if processes > 1 else ''}"
        assert said.count(f"8 = {per_device} per device x {devices} x {accumulation} accumulation") == 1
        for part in (
            "5 per epoch, 25 in all",
            "learning rate",
            "classifier.weight",
            "3 classes",
            str(runs[name]),
            "W&B",
        ):
            assert part in said, part
        assert said.count("evaluation: accuracy") == 3


def test_status_of_a_job_is_written_for_shells_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_DIST_JOB_ID", "4711")
    run_folder.write_status(tmp_path, "running", step=0)
    assert not (tmp_path / "jobs").exists(), "the batch script makes the folder"
    (tmp_path / "jobs" / "4711").mkdir(parents=True)
    run_folder.write_status(tmp_path, "failed", step=5, reason="a = b\nc", rank=None)
    lines = (tmp_path / "jobs" / "4711" / "status").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines)
    assert (found["state"], found["step"], found["reason"], found["job"]) == ("failed", "5", "a = b\\nc", "4711")
    assert "rank" not in found
