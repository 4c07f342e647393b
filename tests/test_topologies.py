"""One run on several topologies: equal curves and results, one report. Each topology is trained once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import LAUNCHERS, STEPS, TOPOLOGIES, losses, results, rows
from safetensors.torch import load_file
from wandb_reader import read_run

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("name", [name for name in TOPOLOGIES if name != "one"])
def test_topologies_have_the_same_loss_curve(runs: dict[str, Path], name: str) -> None:
    one, other = losses(runs["one"]), losses(runs[name])
    assert list(one) == list(other) == list(range(1, STEPS + 1))
    assert max(one.values()) - min(one.values()) > 0.05, "a curve that does not move proves nothing"
    assert other == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("name", [name for name in TOPOLOGIES if name != "one"])
def test_topologies_have_the_same_results(runs: dict[str, Path], name: str) -> None:
    one, other = results(runs["one"]), results(runs[name])
    for key in ("eval_accuracy", "eval_loss", "eval_f1_macro", "test_accuracy", "test_loss"):
        assert other[key] == pytest.approx(one[key], abs=1e-4), key
    assert (other["eval_samples"], other["test_samples"]) == (13, 11)
    assert other["global_batch_size"] == 8
    assert other["world_size"] == TOPOLOGIES[name][1]


def test_topologies_have_the_same_weights_up_to_rounding(runs: dict[str, Path]) -> None:
    one = load_file(runs["one"] / "best" / "model.safetensors")
    for name in ("accumulated", "torchrun", "accelerate"):
        other = load_file(runs[name] / "best" / "model.safetensors")
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-4, name


def test_torchrun_and_accelerate_give_the_same_bits(runs: dict[str, Path]) -> None:
    files = [(runs[name] / "best" / "model.safetensors").read_bytes() for name in ("torchrun", "accelerate")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_topology_logs_one_wandb_run_with_accuracy_on_the_axis_of_the_loss(runs: dict[str, Path], name: str) -> None:
    files = list((runs[name] / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1, "one run, opened by rank 0 alone"
    recorded = read_run(files[0])
    accuracy = {r["train/global_step"]: r["eval/accuracy"] for r in recorded.rows if "eval/accuracy" in r}
    assert sum("eval/accuracy" in row for row in recorded.rows) == len(accuracy) == 3
    assert accuracy == {row["step"]: row["eval_accuracy"] for row in rows(runs[name]) if "eval_accuracy" in row}
    assert {r["train/global_step"]: r["train/loss"] for r in recorded.rows if "train/loss" in r} == losses(runs[name])
    assert recorded.summary["test/accuracy"] == results(runs[name])["test_accuracy"]
    assert recorded.config["world_size"] == TOPOLOGIES[name][1]
    assert recorded.config["global_batch_size"] == 8
    record = json.loads((runs[name] / "run.json").read_text())
    assert recorded.config["data"]["classes"] == record["data"]["classes"]


def test_run_record_names_data_and_strategy(runs: dict[str, Path]) -> None:
    records = {name: json.loads((folder / "run.json").read_text()) for name, folder in runs.items()}
    assert len({json.dumps(record["data"]) for record in records.values()}) == 1
    assert [records[name]["strategy"] for name in TOPOLOGIES] == ["single", "single", "ddp", "ddp"]


def test_topologies_cover_all_launchers() -> None:
    assert {launcher for launcher, *_ in TOPOLOGIES.values()} == {*LAUNCHERS, "fork"}
