"""How the model computes: its repeated blocks, and how they are compiled in place."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton  # no public name; Inductor itself asks it
from transformers import PreTrainedModel

from vit_dist.data.pixels import Pixels
from vit_dist.errors import UserError
from vit_dist.rewrites import bf16_residual, class_token_only, patches_by_matmul

IN_PLACE = ("single", "ddp")  # strategies that leave the blocks as they are


@dataclass(frozen=True)
class Compilation:
    """Whether the blocks are compiled, how (arguments of `torch.compile`), and what to say of it."""

    on: bool
    note: str
    how: dict[str, Any] = field(default_factory=dict)


def choose_compilation(training: dict[str, Any], strategy: str, device: torch.device) -> Compilation:
    """`--torch_compile`, `--torch_compile_backend` and `--torch_compile_mode`; by default on GPUs where it can be.

    With ZeRO and FSDP upstream compiles, if it is asked to. Raises UserError for a backend or a mode that there is not.
    """
    backend, mode = training["torch_compile_backend"], training["torch_compile_mode"]
    if backend and backend not in torch.compiler.list_backends(()):  # those for debugging too
        raise UserError(f"torch_compile_backend={backend}: there are {', '.join(torch.compiler.list_backends())}")
    if mode and mode not in (modes := torch._inductor.list_mode_options()):  # as torch.compile's docstring has it
        raise UserError(f"torch_compile_mode={mode}: there are {', '.join(modes)}")
    asked = True if backend or mode else training["torch_compile"]
    if strategy not in IN_PLACE:
        return Compilation(False, "compiled by Accelerate" if asked else f"not compiled, as always with {strategy}")
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
        and all(isinstance(block, type(blocks[0])) for block in blocks)
        and not type(blocks[0]).__module__.startswith("torch.")
    ]


def optimize_model(
    model: PreTrainedModel,
    pixels: Pixels | None,
    compilation: Compilation,
    use_bf16_residual: bool,
    device: torch.device,
) -> None:
    """All of it, on the model that is about to be trained on `device`: rewritten, then compiled."""
    class_token_only(model)
    if use_bf16_residual:
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
