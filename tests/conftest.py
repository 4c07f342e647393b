"""What many tests share: isolated caches, a small checkpoint, a folder of pictures, and a way to start real runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from lab import ARGS, CONFIGS, Lab, fingerprint, fork
from PIL import Image
from tiers import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_report_header,
    pytest_runtestloop,
)

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_report_header", "pytest_runtestloop"]

# Before anything imports the libraries that read them.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes, which a fork of this one would inherit
for name in ("WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN", "WORLD_SIZE", "RANK"):
    os.environ.pop(name, None)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background of a script

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="session", autouse=True)
def isolated_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or leaves anything in the user's caches or credential files."""
    home = tmp_path_factory.mktemp("home")
    changed = {"HOME": str(home), "HF_HOME": str(home / "hf"), "NETRC": str(home / "netrc")}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    yield home
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """Undo what a verb did to this process: an ignored signal would be ignored by all that is started later."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    logger = logging.getLogger("vit_dist")
    told = logger.handlers, logger.propagate, logger.level
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logger.handlers, logger.propagate = told[:2]
    logger.setLevel(told[2])


def write_photos(root: Path, splits: dict[str, int], seed: int = 0) -> Path:
    """Pictures of noise in class folders; the class is a channel that is darker. Sizes do not divide by anything."""
    random = np.random.default_rng(seed)
    for split, count in splits.items():
        for i in range(count):
            label = i % len(CLASSES)
            pixels = random.integers(0, 255, (40 + i % 5, 48, 3), dtype=np.uint8)
            pixels[..., label] //= 2
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all pytest processes of this test run (see tiers.py). What `once` made there, no test may change."""
    given: Path | None = request.config.getoption("shared")
    return given or tmp_path_factory.mktemp("shared")


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, made by the first process that asks for it; others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(f"{folder.name}.done")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def photos(shared: Path) -> Path:
    """37 images to train on, 13 to validate, 11 to test."""
    return once(shared / "photos", lambda folder: write_photos(folder, {"train": 37, "validation": 13, "test": 11}))


def write_checkpoint(folder: Path, dropout: float = 0.0, num_labels: int = 5) -> Path:
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=num_labels,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Path:
    """A small ViT in a folder, loaded by the same code as one from the hub."""
    return once(shared / "vit", write_checkpoint)


@pytest.fixture(scope="session")
def dropout_checkpoint(shared: Path) -> Path:
    return once(shared / "vit_dropout", lambda folder: write_checkpoint(folder, dropout=0.1))


LAUNCHERS = ("python", "torchrun", "accelerate")


def command(
    launcher: str,
    processes: int,
    *args: object,
    module: str = "vit_dist.train",
    config: Path = CONFIGS / "ddp.yaml",
    launch: Sequence[object] = (),
) -> list[str]:
    """`config` and `launch` (further flags) are for accelerate."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"]
    accelerate = ["accelerate.commands.launch", "--config_file", config, "--num_processes", processes,
                  "--main_process_port", 0, *launch, "-m"]  # fmt: skip
    before = {"python": [], "torchrun": torchrun, "accelerate": accelerate}[launcher]
    return list(map(str, [sys.executable, "-m", *before, module, *args]))


def run(
    *args: object,
    launcher: str = "python",
    processes: int = 1,
    module: str = "vit_dist.train",
    expect: int | None = 0,
    config: Path = CONFIGS / "ddp.yaml",
    launch: Sequence[object] = (),
    timeout: int = 300,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Start `vit_dist.train` as a user would and wait for it; fails unless it exits with `expect` (None: any)."""
    result = subprocess.run(
        command(launcher, processes, *args, module=module, config=config, launch=launch),
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert expect is None or result.returncode == expect, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without a line that is being written."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


Reference = Callable[..., Path]


@pytest.fixture(scope="session")
def reference(shared: Path) -> Reference:
    """The folder of a run that nothing happens to, trained once for all tests: (arguments, processes=, strategy=)."""

    def reference(args: Sequence[Any], processes: int = 1, strategy: str = "ddp", **env: str) -> Path:
        asked = json.dumps([[str(arg) for arg in args], processes, strategy, sorted(env.items())])
        folder = shared / "references" / hashlib.sha256(asked.encode()).hexdigest()[:16]
        lab = Lab(folder.parent, list(args))
        return once(folder, lambda new: lab.run(new, processes=processes, strategy=strategy, **env))

    return reference


@pytest.fixture(scope="module")
def lab(
    request: pytest.FixtureRequest, photos: Path, dropout_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Lab:
    """A `Lab` of the module's own, for runs that something happens to."""
    root = tmp_path_factory.mktemp(request.module.__name__.removeprefix("test_"))
    return Lab(root, ["--data", photos, "--model", dropout_checkpoint, *ARGS])


@pytest.fixture(scope="module")
def whole(lab: Lab, reference: Reference) -> dict[int, Any]:
    """What must be equal to the bit, of a run on one process and on two that nothing happened to."""
    return {processes: fingerprint(reference(lab.args, processes)) for processes in (1, 2)}


STEPS = 25  # of 8 images; 5 to an epoch of 37 images, the last filled up
TOPOLOGIES = {  # launcher, processes, per-device batch, accumulation
    "one": ("python", 1, 8, 1),
    "accumulated": ("fork", 1, 4, 2),
    "torchrun": ("torchrun", 2, 4, 1),
    "accelerate": ("accelerate", 2, 4, 1),
}


@pytest.fixture(scope="session")
def runs(photos: Path, checkpoint: Path, shared: Path) -> dict[str, Path]:
    """One run on each topology, once for all tests; random crops and flips are on (the default)."""

    def train(root: Path) -> None:
        root.mkdir()
        for name, (launcher, processes, per_device, accumulation) in TOPOLOGIES.items():
            start = fork if launcher == "fork" else partial(run, launcher=launcher, processes=processes)
            done = start(
                "--data", photos, "--model", checkpoint, "--output_dir", root / name, "--max_steps", STEPS,
                "--learning_rate", "3e-3", "--logging_steps", 1, "--eval_steps", 10, "--dataloader_num_workers", 1,
                "--report_to", "wandb", "tensorboard", "--per_device_train_batch_size", per_device,
                "--gradient_accumulation_steps", accumulation, WANDB_MODE="offline",
            )  # fmt: skip
            (root / f"{name}.log").write_text(done.stdout + done.stderr)

    root = once(shared / "topologies", train)
    return {name: root / name for name in TOPOLOGIES}


@pytest.fixture
def vit() -> Any:
    """A ViT of three blocks for images of 16 pixels, random weights."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    return ViTForImageClassification(config)


@pytest.fixture
def images() -> Any:
    """Four of them, as that model takes them."""
    import torch

    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def gradients(model: Any, images: Any) -> dict[str, Any]:
    """Of every parameter of a model of two classes, for four images."""
    import torch

    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(pixel_values=images).logits.float(), torch.tensor([0, 1, 0, 1]))
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
