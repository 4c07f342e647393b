"""Blocks are found, and compiled once."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conftest import gradients
from torch._dynamo.utils import counters
from transformers import ViTForImageClassification

from vit_dist.blocks import (
    Compilation,
    choose_compilation,
    compile_blocks,
    optimize_model,
)
from vit_dist.errors import UserError
from vit_dist.rewrites import bf16_residual, class_token_only, patches_by_matmul

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEFAULT = {"torch_compile": None, "torch_compile_backend": None, "torch_compile_mode": None}


def test_compiled_blocks_are_compiled_once_for_steps_and_once_for_evaluations(
    vit: ViTForImageClassification, images: torch.Tensor
) -> None:
    """A guard that measures no time: graphs, breaks and recompilations are counted."""
    torch._dynamo.reset()
    counters.clear()
    bf16_residual(vit)
    assert class_token_only(vit)
    assert compile_blocks(vit, {"backend": "aot_eager"}) == 3
    assert patches_by_matmul(vit, {"backend": "aot_eager"})

    def train_and_evaluate() -> None:
        vit.train()
        with torch.autocast("cpu", torch.bfloat16):
            gradients(vit, images)
        vit.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            vit(pixel_values=images)

    train_and_evaluate()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 6, "a block, the last block and the patches, with and without gradients"
    for _ in range(3):
        train_and_evaluate()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_compute_the_same_gradients(
    vit: ViTForImageClassification, images: torch.Tensor, backend: str
) -> None:
    torch._dynamo.reset()
    expected = gradients(vit, images)
    optimize_model(vit, None, Compilation(True, "", {"backend": backend}), False, CPU)
    got = gradients(vit, images)
    assert all(torch.allclose(got[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize(
    ("given", "strategy", "device", "on"),
    [
        ({}, "single", CPU, False),
        ({"torch_compile": True}, "single", CPU, True),
        ({"torch_compile_backend": "eager"}, "ddp", CPU, True),
        ({"torch_compile_mode": "max-autotune-no-cudagraphs"}, "ddp", GPU, True),
        ({"torch_compile": False}, "ddp", GPU, False),
        ({"torch_compile": True}, "fsdp2", GPU, False),
        ({}, "zero2", GPU, False),
    ],
)
def test_compilation_follows_from_settings_strategy_and_device(
    given: dict[str, Any], strategy: str, device: torch.device, on: bool
) -> None:
    assert choose_compilation(DEFAULT | given, strategy, device).on == on


@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_unknown_compilation_backend_or_mode_is_refused(strategy: str) -> None:
    with pytest.raises(UserError, match=r"^torch_compile_backend=inductr: there are .*inductor"):
        choose_compilation(DEFAULT | {"torch_compile_backend": "inductr"}, strategy, CPU)
    with pytest.raises(UserError, match=r"^torch_compile_mode=fast: there are default, .*max-autotune"):
        choose_compilation(DEFAULT | {"torch_compile_mode": "fast"}, strategy, CPU)


def test_gpu_without_compiler_or_triton_is_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_dist.blocks.has_triton", lambda: True)
    monkeypatch.setenv("CC", sys.executable)  # some program
    assert choose_compilation(DEFAULT, "single", GPU).on
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    choice = choose_compilation(DEFAULT, "single", GPU)
    assert not choice.on and "no C compiler" in choice.note
    monkeypatch.setattr("vit_dist.blocks.has_triton", lambda: False)
    assert "no Triton" in choose_compilation(DEFAULT, "single", GPU).note
