"""Runs whose images lie on the device as bytes, and compiled ones: the same curve, on one process and on two."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import losses, results, run
from lab import Lab

COMPILE = ["--torch_compile_backend", "aot_eager"]
INDUCTOR = ["--torch_compile_backend", "inductor"]
SETTINGS: dict[str, tuple[int, list[Any]]] = {  # processes, flags
    "processor": (1, []),
    "stream": (1, ["--image_source", "stream"]),
    "cache": (1, ["--image_source", "cache"]),
    "resident": (1, ["--image_source", "resident"]),
    "resident on two": (2, ["--image_source", "resident"]),
    "resident, compiled": (1, ["--image_source", "resident", *COMPILE]),
    "stream on two, compiled": (2, ["--image_source", "stream", *COMPILE]),
    "resident, Inductor": (1, ["--image_source", "resident", *INDUCTOR]),
    "stream on two, Inductor": (2, ["--image_source", "stream", *INDUCTOR]),
}
Folders = Callable[[str], Path]


def cases(*names: str) -> list[Any]:
    """Those of Inductor take minutes of compiling."""
    return [pytest.param(n, marks=[pytest.mark.slow, pytest.mark.launch] if "Inductor" in n else []) for n in names]


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("sources")
    base = [
        "digits", "--model", checkpoint, "--max_train_samples", 203, "--max_eval_samples", 50, "--max_steps", 40,
        "--max_predict_samples", 50, "--learning_rate", "3e-3", "--logging_steps", 1, "--eval_strategy", "epoch",
        "--save_strategy", "epoch", "--report_to", "none", "--dataloader_num_workers", 0, "--num_train_epochs", 2,
        "--global_batch_size", 8,
    ]  # fmt: skip
    lab = Lab(root, base)

    @cache
    def folder(name: str) -> Path:
        processes, flags = SETTINGS[name]
        if "Inductor" not in name:
            lab.run(root / name, *flags, processes=processes)
        else:  # not forked: what compiled in the test process is no state to begin with
            launcher, share = ("torchrun" if processes > 1 else "python"), 8 // processes
            more = ["--output_dir", root / name, "--per_device_train_batch_size", share]
            done = run(*base, *flags, *more, launcher=launcher, processes=processes)
            (root / f"{name}.log").write_text(done.stdout)
        return root / name

    return folder


@pytest.mark.parametrize("name", cases(*(name for name in SETTINGS if name != "processor")))
def test_image_source_keeps_the_curve_of_the_processor(folders: Folders, name: str) -> None:
    """Bytes differ from it by a grey level here and there."""
    expected, other = losses(folders("processor")), losses(folders(name))
    assert list(expected) == list(other) == list(range(1, 41))
    assert max(expected.values()) - min(expected.values()) > 0.3, "a curve that does not move proves nothing"
    assert other == pytest.approx(expected, abs=0.02)
    for key in ("eval_loss", "test_loss"):
        assert results(folders(name))[key] == pytest.approx(results(folders("processor"))[key], abs=0.02)


@pytest.mark.parametrize("name", cases("resident on two", "resident, compiled", "resident, Inductor"))
def test_processes_and_compilation_keep_the_curve_of_resident_images(folders: Folders, name: str) -> None:
    assert losses(folders(name)) == pytest.approx(losses(folders("resident")), abs=1e-4)
    assert results(folders(name))["test_loss"] == pytest.approx(results(folders("resident"))["test_loss"], abs=1e-4)


def test_run_prints_its_image_source_and_compilation(folders: Folders) -> None:
    def printed(name: str) -> str:
        return folders(name).with_suffix(".log").read_text()

    assert "images resident on cpu, 0 MB of bytes: no data loading" in printed("resident")
    assert "images streamed as bytes, normalised on the device" in printed("stream")
    assert "blocks compiled at the first step" in printed("stream on two, compiled")
    assert "compiled" not in printed("processor")
