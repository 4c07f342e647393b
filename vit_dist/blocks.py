"""How the model computes: repeated blocks compiled in place, kernels that suit the device. It stays the same model."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._triton import has_triton  # no public name; Inductor itself asks it
from transformers import PreTrainedModel

from vit_dist.data.pixels import Pixels
from vit_dist.errors import UserError

IN_PLACE = ("single", "ddp")  # strategies that leave the blocks as they are


@dataclass(frozen=True)
class Compilation:
    """Whether the blocks are compiled, how (arguments of `torch.compile`), and what to say of it."""

    on: bool
    note: str
    how: dict[str, Any] = field(default_factory=dict)


def choose_compilation(training: dict[str, Any], strategy: str, device: torch.device) -> Compilation:
    """`--torch_compile`, `--torch_compile_backend` and `--torch_compile_mode`; by default on GPUs where it can be.

    With ZeRO and FSDP upstream compiles, if it is asked to.
    """
    backend, mode = training["torch_compile_backend"], training["torch_compile_mode"]
    asked = True if backend or mode else training["torch_compile"]
    if strategy not in IN_PLACE:
        return Compilation(False, "compiled by Accelerate" if asked else f"not compiled: {strategy} shards its blocks")
    if asked is False:
        return Compilation(False, "not compiled (--torch_compile false)")
    if asked is None and device.type != "cuda":
        return Compilation(False, "")
    if asked is None and (missing := _missing()):
        return Compilation(False, f"not compiled: {missing}; steps are slower for it")
    how = {name: value for name, value in (("backend", backend), ("mode", mode)) if value}
    return Compilation(True, "blocks compiled at the first step", how)


def _missing() -> str:
    """What Inductor lacks for kernels on this GPU; empty if nothing."""
    if not has_triton():
        return "this GPU or this build of PyTorch has no Triton"
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return "" if any(name and shutil.which(name) for name in compilers) else "there is no C compiler (gcc) for Triton"


def repeated_blocks(model: PreTrainedModel) -> list[list[nn.Module]]:
    """The lists of blocks of one kind each, whatever the family calls them; empty for a model without any."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [
        blocks
        for blocks in lists
        if len(blocks) > 1
        and len({type(block) for block in blocks}) == 1
        and not type(blocks[0]).__module__.startswith("torch.")
    ]


def speed_up(
    model: PreTrainedModel, pixels: Pixels | None, compilation: Compilation, narrow_residual: bool, device: torch.device
) -> None:
    """All of it, on the model that is about to be trained on `device`."""
    if narrow_residual:
        bf16_residual(model)
    if device.type == "cuda":
        patches_by_matmul(model, compilation.how if compilation.on else None)
    if compilation.on:
        compile_blocks(model, compilation.how)
        if pixels is not None:
            pixels.compile(**compilation.how)


def compile_blocks(model: PreTrainedModel, how: dict[str, Any]) -> int:
    """Compile each block by itself, before the model is wrapped; returns how many, 0 if the model has none.

    Blocks of one kind share their kernels, so that it takes seconds, and gradients are ready block by block, which DDP
    needs to send them early. Cost: nothing is fused across blocks, 2 % of a step (docs/speed.md).
    """
    blocks = [block for group in repeated_blocks(model) for block in group]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, **how)
    return len(blocks)


def patches_by_matmul(model: PreTrainedModel, how: dict[str, Any] | None = None) -> bool:
    """Compute the patch embedding, a convolution whose stride is its kernel, as the matrix product that it is.

    cuDNN's works in another memory layout and converts to it; a step is 5 % shorter without (docs/speed.md). Returns
    whether the model has such a layer. `how` compiles it, if it is not None.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_patching(module):
            module.__class__ = _PatchConv2d
            if how is not None:
                module.compile(fullgraph=True, dynamic=False, **how)
            return True
    return False


def _is_patching(conv: nn.Conv2d) -> bool:
    return (
        conv.in_channels == 3
        and conv.kernel_size == conv.stride
        and conv.kernel_size[0] > 1
        and conv.padding in (0, (0, 0), "valid")
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


class _PatchConv2d(nn.Conv2d):
    """A class and not a function of the instance: Dynamo would compile each instance's anew. The same below."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = input.shape
        tall, wide = self.kernel_size
        rows, columns = height // tall, width // wide
        patches = input[:, :, : rows * tall, : columns * wide].reshape(n, channels, rows, tall, columns, wide)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, channels * tall * wide)
        made = F.linear(patches, self.weight.flatten(1), self.bias)
        return made.transpose(1, 2).unflatten(2, (rows, columns))


def bf16_residual(model: PreTrainedModel) -> None:
    """Under bf16 autocast, keep the sum that runs through the blocks in bfloat16 too; norms still compute in float32.

    Half the bytes of what is not a matrix product. Raises UserError for what is not built like a ViT.
    """
    embeddings = getattr(model.base_model, "embeddings", None)
    norms = [module for module in model.modules() if type(module) is nn.LayerNorm]
    if not isinstance(embeddings, nn.Module) or not norms or not hasattr(embeddings, "position_embeddings"):
        raise UserError(f"bf16_residual: not known for {type(model).__name__}; leave it out")
    embeddings.register_forward_hook(lambda module, args, output: _narrow(output))
    for norm in norms:
        norm.__class__ = _NarrowLayerNorm


def _narrow(output: Any) -> Any:
    if isinstance(output, torch.Tensor) and torch.is_autocast_enabled(output.device.type):
        return output.to(torch.bfloat16)
    return output


class _NarrowLayerNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        with torch.autocast(kind, enabled=False):
            made = F.layer_norm(input.float(), self.normalized_shape, self.weight, self.bias, self.eps)
        return made.to(torch.bfloat16) if torch.is_autocast_enabled(kind) else made
