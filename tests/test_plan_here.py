"""`vit-dist plan` for the machine it runs on, and beside runs that are finished."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from test_run_folder import FACTS

from vit_dist.commands import plan
from vit_dist.config import load_config
from vit_dist.run import attempts, run_folder

HERE = ["--data", "digits", "--model", "tiny", "--report_to", "none"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert plan.main(["--json", *map(str, args)]) == 0
    return json.loads(capsys.readouterr().out)


def finished(folder: str, *flags: str, rate: float, device: str = "cpu", processes: int = 1, host: str = "") -> None:
    config = load_config([*HERE, "--output_dir", folder, *flags])
    facts = {**FACTS, "device": device, "world_size": processes}
    attempts.open_attempt(config, attempts.inspect(config, "single", 1), ["a"], facts)
    measured = {"train_samples_per_second": rate, "world_size": processes}
    run_folder.write_json(Path(folder) / run_folder.RESULTS, measured)
    status = {"state": "complete", "host": host or socket.gethostname()}
    run_folder.write_json(Path(folder) / run_folder.STATUS, status)


def test_without_gpus_the_plan_is_for_this_machines_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(HERE) == 0
    text = capsys.readouterr().out
    cores = len(os.sched_getaffinity(0))
    assert f"devices  the CPU of this machine, {cores} core" in text and "memory   of the process, in GB" in text
    assert "time     not known; give --images_per_second, or finish a run of this model on this machine" in text
    assert "GPU" not in text.replace("per_device", "")
    assert planned(capsys, *HERE, "--gpus", 2)["machines"]["processes"] == 2, "GPUs that are named are planned for"
    assert not planned(capsys, *HERE, "--gpu", "h100")["machines"]["cpu"]


def test_time_is_that_of_an_earlier_run_of_the_same_model_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    finished("runs/other_model", "--image_size", "64", rate=10)
    finished("runs/other_precision", "--bf16", rate=20)
    finished("runs/elsewhere", rate=30, host="another")
    finished("runs/two", rate=40, processes=2)
    assert planned(capsys, *HERE)["time"]["seconds"] is None
    finished("runs/same", "--seed", "7", rate=50)
    found = planned(capsys, *HERE)
    images = found["steps"]["all"] * found["batch"]["global"]
    assert found["time"]["images_per_second"] == 50 and found["time"]["seconds"] == pytest.approx(images / 50)
    assert found["time"]["source"] == "measured in runs/same on this machine"
    finished("runs/newer", "--seed", "8", rate=60)
    os.utime("runs/same/all_results.json", (1, 1))
    assert planned(capsys, *HERE)["time"]["images_per_second"] == 60
    assert planned(capsys, *HERE, "--output_dir", "runs/same")["time"]["images_per_second"] == 50, "its own first"


def test_rate_of_gpus_is_scaled_and_only_from_the_gpu_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    finished("runs/gpus", rate=400, device="NVIDIA H100 80GB HBM3", processes=4)
    assert planned(capsys, *HERE, "--gpus", 8, "--gpu", "h100")["time"]["images_per_second"] == 800
    assert planned(capsys, *HERE, "--gpus", 8, "--gpu", "a100")["time"]["seconds"] is None
    assert planned(capsys, *HERE)["time"]["seconds"] is None, "a GPU's speed says nothing of this CPU"


def test_run_folder_is_planned_with_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    finished("runs/same", "--lr", "0.125", "--epochs", "7", rate=50)
    Path("runs/same").rename("moved")
    found = planned(capsys, "moved")
    assert found["learning_rate"]["recipe"] == 0.125 and found["config"]["num_train_epochs"] == 7
    assert found["config"]["output_dir"] == "moved" and found["time"]["images_per_second"] == 50
    assert planned(capsys, "moved", "--epochs", "1")["config"]["num_train_epochs"] == 1
    assert plan.main(["runs"]) == 2 and "runs is no recipe" in capsys.readouterr().err
