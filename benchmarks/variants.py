"""What each choice in the train step is worth: one process, ViT-B/16 at 224 pixels, 256 images that stay on the GPU.

    python benchmarks/variants.py OUT.json [blocks blocks-res-patch whole-fused timm ...]

A name is `eager`, `timm`, `timm_cl` (channels last), or `blocks` or `whole` (what is compiled) with any of: `fused`
(one product for query, key and value), `res` (bf16 residual), `patch` (the patch embedding as a matrix product).
Forward in bf16 autocast, cross-entropy, backward, clipping, fused AdamW; medians of three times 20 steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from record import record
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTAttention

from vit_dist.blocks import bf16_residual, compile_blocks, patches_by_matmul

ALL = ("blocks", "timm", "blocks-fused-res", "whole-fused-res", "whole-fused", "blocks-fused", "timm_cl",
       "blocks-res-patch", "eager")  # fmt: skip
BATCH, DEVICE = 256, "cuda"


class FusedAttention(ViTAttention):
    """Query, key and value by one matrix product; their weights stay apart."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        n, tokens, width = hidden_states.shape
        heads = F.linear(hidden_states, weight, bias).view(n, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0))
        return self.o_proj(mixed.transpose(1, 2).reshape(n, tokens, width)), None


def make(name: str) -> tuple[nn.Module, Any, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    what, *options = name.split("-")
    if what.startswith("timm"):
        import timm

        model = timm.create_model("vit_base_patch16_224", num_classes=10).to(DEVICE).train()
        if what == "timm_cl":
            model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        return model, torch.compile(model), images
    model = ViTForImageClassification(ViTConfig(num_labels=10)).to(DEVICE).train()
    if "fused" in options:
        for module in model.modules():
            if type(module) is ViTAttention:
                module.__class__ = FusedAttention
    if "res" in options:
        bf16_residual(model)
    if "patch" in options:
        patches_by_matmul(model, {})
    if what == "blocks":
        compile_blocks(model, {})
    call = torch.compile(model, dynamic=False) if what == "whole" else model
    return model, lambda pixels: call(pixel_values=pixels).logits, images


def measure(name: str) -> dict[str, Any]:
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, call, images = make(name)
    parameters, labels = list(model.parameters()), torch.randint(0, 10, (BATCH,), device=DEVICE)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def steps(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = call(images)
            F.cross_entropy(logits.float(), labels).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    first = steps(5)
    median = statistics.median(steps(20) / 20 for _ in range(3))
    return {
        "milliseconds": median * 1e3,
        "images_per_second": BATCH / median,
        "first_five_steps_seconds": first,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    out, *names = sys.argv[1:]
    versions = ("torch", "transformers", "timm")
    found: dict[str, Any] = {}
    for name in names or ALL:
        found[name] = measure(name)
        record(__file__, out, versions, torch.cuda.get_device_name(), batch=BATCH, steps=found)


if __name__ == "__main__":
    main()
