"""Processes of one job that do not have the same in mind: all are refused, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import write_photos
from lab import ARGS, Lab

from vit_dist import train
from vit_dist.run import run_folder


def refusal(lab: Lab, folder: Path, *args: Any, **options: Any) -> str:
    """The one error of two processes, of which none trains and none writes."""
    job = lab.start(folder, *args, processes=2, **options)
    codes = job.wait()
    assert 2 in codes and 0 not in codes, job.output
    (line,) = {line for line in job.output.splitlines() if line.startswith("error: ")}
    assert not folder.exists(), job.output
    return line


@pytest.fixture
def lab(checkpoint: Path, tmp_path: Path) -> Lab:
    return Lab(tmp_path, ["--model", checkpoint, *ARGS])


def test_ranks_with_different_settings_are_refused(lab: Lab, photos: Path) -> None:
    line = refusal(lab, lab.root / "run", "--data", photos, alone={1: ["--learning_rate", "1e-4"]})
    assert "do not have the same learning_rate: 0.003 on rank 0, 0.0001 on rank 1; start all of them with one" in line


def test_ranks_with_different_versions_are_refused(lab: Lab, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = run_folder.version
    of_rank_1 = {"torch": "2.10.0"}
    monkeypatch.setattr(
        run_folder, "version",
        lambda name: of_rank_1[name] if os.environ.get("RANK") == "1" and name in of_rank_1 else version(name),
    )  # fmt: skip
    line = refusal(lab, lab.root / "run", "--data", photos)
    assert f"the same torch: {version('torch')} on rank 0, 2.10.0 on rank 1" in line


def test_ranks_with_different_images_are_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One path, and what lies there differs from node to node."""
    for rank, count in (("0", 37), ("1", 38)):
        write_photos(lab.root / rank / "photos", {"train": count, "validation": 5})
    load_config = train.load_config

    def elsewhere(argv: Any) -> Any:
        os.chdir(lab.root / os.environ["RANK"])
        return load_config(argv)

    monkeypatch.setattr(train, "load_config", elsewhere)
    line = refusal(lab, lab.root / "run", "--data", "photos")
    assert "do not have the same data: " in line and "do all nodes see the same files?" in line
