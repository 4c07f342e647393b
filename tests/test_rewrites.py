"""The model computes the same in another way: what is replaced within it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    ViTConfig,
    ViTForImageClassification,
)

from vit_dist.blocks import repeated_blocks
from vit_dist.errors import UserError
from vit_dist.rewrites import bf16_residual, class_token_only, patches_by_matmul

HOW = {"backend": "inductor" if shutil.which("g++") else "aot_eager"}


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_last_block_computes_the_class_token_alone(
    model: ViTForImageClassification, images: torch.Tensor, attention: str, checkpointed: bool, tmp_path: Path
) -> None:
    """In float64, so that another function would show; a change of upstream's block would too."""
    model, images = model.double(), images.double()
    model.set_attn_implementation(attention)
    expected, logits, names = gradients(model, images), model(images).logits, list(model.state_dict())
    read, shapes = copy.deepcopy(model), []
    assert class_token_only(read)
    if checkpointed:
        read.gradient_checkpointing_enable()
        read.train()
    read.vit.layers[-1].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    got = gradients(read, images)
    assert all(torch.allclose(got[name], expected[name], rtol=0, atol=1e-13) for name in expected)
    assert torch.allclose(read(images).logits, logits, rtol=0, atol=1e-13)
    assert set(shapes) == {(len(images), 1, 32)}
    assert list(read.state_dict()) == names
    read.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    again.set_attn_implementation(attention)
    assert torch.equal(again(images).logits, logits)


def test_models_that_read_other_tokens_are_left_alone() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for config in (Dinov2Config(image_size=28, **sizes), BeitConfig(image_size=32, **sizes)):
        model = AutoModelForImageClassification.from_config(config)
        kinds = [type(module) for module in model.modules()]
        assert not class_token_only(model)
        assert [type(module) for module in model.modules()] == kinds


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
