"""The model computes the same, faster: what is replaced within it, and that compiling happens once."""

from __future__ import annotations

import copy
import shutil
import sys
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from vit_dist.blocks import (
    Compilation,
    bf16_residual,
    choose_compilation,
    compile_blocks,
    patches_by_matmul,
    repeated_blocks,
    speed_up,
)
from vit_dist.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HOW = {"backend": "inductor" if shutil.which("g++") else "aot_eager"}
DEFAULT = {"torch_compile": None, "torch_compile_backend": None, "torch_compile_mode": None}


@pytest.fixture
def model() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    return ViTForImageClassification(config)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def gradients(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(pixel_values=images).logits.float(), torch.tensor([0, 1, 0, 1])).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_patch_embedding_is_the_same_as_a_matrix_product(
    model: ViTForImageClassification, images: torch.Tensor, compiled: bool
) -> None:
    names, expected, logits = list(model.state_dict()), gradients(model, images), model(images).logits
    assert patches_by_matmul(model, HOW if compiled else None)
    assert list(model.state_dict()) == names
    assert torch.allclose(model(images).logits, logits, atol=1e-6)
    got = gradients(model, images)
    assert all(torch.allclose(got[name], expected[name], atol=1e-6) for name in expected)


def test_convolutions_that_are_none_of_patches_are_left_alone() -> None:
    model = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert patches_by_matmul(model)
    assert [type(m) is torch.nn.Conv2d for m in convolutions] == [False] + [True] * (len(convolutions) - 1)
    with pytest.raises(UserError, match="bf16_residual"):
        bf16_residual(model)


def test_a_bf16_residual_is_narrow_between_blocks_and_nowhere_else(
    model: ViTForImageClassification, images: torch.Tensor
) -> None:
    original, seen = copy.deepcopy(model), []
    bf16_residual(model)
    for block in repeated_blocks(model)[0]:
        block.register_forward_hook(lambda module, args, output: seen.extend([args[0].dtype, output.dtype]))
    assert torch.equal(model(images).logits, original(images).logits), "without autocast nothing changes"
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        narrow, wide = model(images).logits, original(images).logits
    assert set(seen) == {torch.bfloat16}
    assert not torch.equal(narrow, wide) and torch.allclose(narrow.float(), wide.float(), atol=0.03)
    assert {name: value.dtype for name, value in model.state_dict().items()} == {
        name: torch.float32 for name in original.state_dict()
    }


def test_steps_and_evaluations_are_compiled_once_each(model: ViTForImageClassification, images: torch.Tensor) -> None:
    """A guard that measures no time: graphs, breaks and recompilations are counted."""
    torch._dynamo.reset()
    counters.clear()
    bf16_residual(model)
    assert compile_blocks(model, {"backend": "aot_eager"}) == 3
    assert patches_by_matmul(model, {"backend": "aot_eager"})

    def train_and_evaluate() -> None:
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            gradients(model, images)
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(pixel_values=images)

    train_and_evaluate()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 4, "a block and the patches, with and without gradients"
    for _ in range(3):
        train_and_evaluate()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_compiled_blocks_compute_the_same(model: ViTForImageClassification, images: torch.Tensor) -> None:
    expected = gradients(model, images)
    speed_up(model, None, Compilation(True, "", HOW), False, CPU)
    got = gradients(model, images)
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
def test_when_blocks_are_compiled(given: dict[str, Any], strategy: str, device: torch.device, on: bool) -> None:
    assert choose_compilation(DEFAULT | given, strategy, device).on == on


def test_a_gpu_without_what_compiling_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_dist.blocks.has_triton", lambda: True)
    monkeypatch.setenv("CC", sys.executable)  # some program
    assert choose_compilation(DEFAULT, "single", GPU).on
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    choice = choose_compilation(DEFAULT, "single", GPU)
    assert not choice.on and "no C compiler" in choice.note
    monkeypatch.setattr("vit_dist.blocks.has_triton", lambda: False)
    assert "no Triton" in choose_compilation(DEFAULT, "single", GPU).note
