"""The model computes the same in another way: what is replaced within it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import gradients
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    ViTForImageClassification,
)

from vit_dist.blocks import repeated_blocks
from vit_dist.errors import UserError
from vit_dist.rewrites import bf16_residual, class_token_only, patches_by_matmul

HOW = {"backend": "inductor" if shutil.which("g++") else "aot_eager"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_last_block_computes_the_class_token_only(
    vit: ViTForImageClassification, images: torch.Tensor, attention: str, checkpointed: bool, tmp_path: Path
) -> None:
    """In float64, so that another function would show; a change of upstream's block would too."""
    vit, images = vit.double(), images.double()
    vit.set_attn_implementation(attention)
    expected, logits, names = gradients(vit, images), vit(images).logits, list(vit.state_dict())
    read, shapes = copy.deepcopy(vit), []
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
def test_patch_embedding_equals_a_matrix_product(
    vit: ViTForImageClassification, images: torch.Tensor, compiled: bool
) -> None:
    names, expected, logits = list(vit.state_dict()), gradients(vit, images), vit(images).logits
    assert patches_by_matmul(vit, HOW if compiled else None)
    assert list(vit.state_dict()) == names
    assert torch.allclose(vit(images).logits, logits, atol=1e-6)
    got = gradients(vit, images)
    assert all(torch.allclose(got[name], expected[name], atol=1e-6) for name in expected)


def test_convolutions_that_are_none_of_patches_are_left_alone() -> None:
    model = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert patches_by_matmul(model)
    assert [type(m) is torch.nn.Conv2d for m in convolutions] == [False] + [True] * (len(convolutions) - 1)
    with pytest.raises(UserError, match="bf16_residual"):
        bf16_residual(model)


def test_bf16_residual_is_bf16_between_blocks_only(vit: ViTForImageClassification, images: torch.Tensor) -> None:
    original, seen = copy.deepcopy(vit), []
    bf16_residual(vit)
    for block in repeated_blocks(vit)[0]:
        block.register_forward_hook(lambda module, args, output: seen.extend([args[0].dtype, output.dtype]))
    assert torch.equal(vit(images).logits, original(images).logits), "without autocast nothing changes"
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        narrow, wide = vit(images).logits, original(images).logits
    assert set(seen) == {torch.bfloat16}
    assert not torch.equal(narrow, wide) and torch.allclose(narrow.float(), wide.float(), atol=0.03)
    assert {name: value.dtype for name, value in vit.state_dict().items()} == {
        name: torch.float32 for name in original.state_dict()
    }
