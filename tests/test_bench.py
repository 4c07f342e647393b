"""`vit-dist bench`: every part is measured with the pieces that training has, and what it says follows from them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import fork
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from vit_dist.commands.bench import advice
from vit_dist.cost.flops import count_flops

RATES = ("decode", "input", "step", "train", "evaluation")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> tuple[dict[str, Any], str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    done = fork(
        "bench", "digits", "--model", checkpoint, "--steps", 4, "--image_source", "resident", "--max_train_samples", 70,
        "--json", folder / "bench.json", "--chart", folder / "bench.svg", "--output_dir", folder / "never",
        "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2, module="vit_dist.cli",
    )  # fmt: skip
    return json.loads((folder / "bench.json").read_text()), done.stdout, folder


def test_bench_measures_and_prints_every_part(measured: tuple[dict[str, Any], str, Path]) -> None:
    found, said, folder = measured
    for name in RATES:
        rate = found[f"{name}_images_per_second"]
        assert rate > 0 and f"{rate:,.0f} images/s" in said, name
    assert 0 < found["checkpoint_stall_seconds"] <= found["checkpoint_seconds"]
    assert found["mfu"] == pytest.approx(
        found["step_images_per_second"] * found["gflop_per_image"] * 1e9 / found["matmul_flops"]
    )
    assert "images resident on cpu" in said and found["versions"]["torch"] == torch.__version__
    assert said.rstrip().splitlines()[-1] == advice(found)
    assert not (folder / "never").exists(), "nothing is kept of what it trains"


def test_bench_chart_shows_the_rates(measured: tuple[dict[str, Any], str, Path]) -> None:
    found, _, folder = measured
    drawing = ElementTree.parse(folder / "bench.svg").getroot()
    texts = {element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert {f"{found[f'{name}_images_per_second']:,.0f}" for name in RATES[1:]} <= texts


@pytest.mark.parametrize(
    ("step", "given", "got", "said"),
    [
        (100, 300, 98, "nothing holds the step up"),
        (100, 60, 58, "the step waits for batches, which come at 60%"),
        (100, 300, 75, "batches are made between the steps, for 25% of the time"),
        (100, 1000, 70, "training reaches 70% of the step's pace"),
    ],
)
def test_bench_advice_names_the_bottleneck(step: float, given: float, got: float, said: str) -> None:
    rates = {"step_images_per_second": step, "input_images_per_second": given, "train_images_per_second": got}
    assert advice(rates).startswith(said)


def test_bench_with_impossible_flags_is_refused_in_one_line(tmp_path: Path) -> None:
    for flags, said in (
        (["--json", tmp_path / "no" / "bench.json"], f"error: --json {tmp_path}/no/bench.json: there is no folder"),
        (["--steps", 0], "error: --steps 0: give at least 1"),
        (["--steps", "x"], "see vit-dist bench --help"),
    ):
        assert said in fork(*flags, module="vit_dist.commands.bench", expect=2).stderr
    failed = fork(module="vit_dist.commands.bench", expect=2, WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1")
    assert "error: bench measures one process" in failed.stderr


def test_counted_flops_equal_the_formula() -> None:
    """Multiply-adds of the patches, the projections, the attention and the head; two passes more for the gradients,
    but none for those of the images."""
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=10))
        grouped = ConvNextForImageClassification(ConvNextConfig())
    tokens, width, inner = 197, 768, 3072
    patches = 196 * 3 * 16 * 16 * width
    blocks = 11 * (4 * width**2 * tokens + 2 * width * inner * tokens + 2 * tokens**2 * width)
    last = 2 * width**2 * tokens + 2 * width**2 + 2 * width * inner + 2 * tokens * width  # for the class token alone
    forward = 2 * (patches + blocks + last + 10 * width)
    counted = count_flops(model, 224)
    assert (counted.forward, counted.training) == (forward, 3 * forward - 2 * patches)
    assert count_flops(grouped, 224).training <= 3 * count_flops(grouped, 224).forward
