"""What each choice in the train step is worth: one process, ViT-B/16 at 224 pixels, 256 images that stay on the GPU.

    python benchmarks/variants.py OUT.json [--profile] [blocks blocks-res-patch whole-fused timm ...]

A name is `eager`, `timm`, `timm_cl` (channels last), or `blocks` or `whole` (what is compiled) with any of: `class`
(the last block for the class token alone), `res` (bf16 residual), `patch` (the patch embedding as a matrix product),
`fused` (one product for query, key and value), `tuned` (Inductor chooses among its own matrix products too).
Forward in bf16 autocast, cross-entropy, backward, clipping, fused AdamW; medians of three times 20 steps. Also whether
two backward passes give the same bits, and with --profile the kernels that take longest.
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

from vit_dist.blocks import compile_blocks
from vit_dist.rewrites import bf16_residual, class_token_only, patches_by_matmul

ALL = ("blocks", "timm", "blocks-fused-res", "whole-fused-res", "whole-fused", "blocks-fused", "timm_cl",
       "blocks-res-patch", "blocks-res-patch-class", "eager")  # fmt: skip
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
    if "class" in options:
        class_token_only(model)
    if "res" in options:
        bf16_residual(model)
    if "patch" in options:
        patches_by_matmul(model, {})
    if what == "blocks":
        compile_blocks(model, {"mode": "max-autotune-no-cudagraphs"} if "tuned" in options else {})
    call = torch.compile(model, dynamic=False) if what == "whole" else model
    return model, lambda pixels: call(pixel_values=pixels).logits, images


def measure(name: str, profiled: bool) -> dict[str, Any]:
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

    def gradients() -> list[torch.Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = call(images)
        F.cross_entropy(logits.float(), labels).backward()
        found = [parameter.grad.clone() for parameter in parameters]
        optimizer.zero_grad(set_to_none=True)
        return found

    first = steps(5)
    median = statistics.median(steps(20) / 20 for _ in range(3))
    same = all(torch.equal(*pair) for _ in range(5) for pair in zip(gradients(), gradients(), strict=True))
    if profiled:
        with torch.profiler.profile() as profile:
            steps(3)
        sys.stderr.write(name + "\n" + profile.key_averages().table(sort_by="self_device_time_total", row_limit=40,
                         max_name_column_width=90) + "\n")  # fmt: skip
    return {
        "milliseconds": median * 1e3,
        "images_per_second": BATCH / median,
        "first_five_steps_seconds": first,
        "same_bits": same,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    profiled = "--profile" in sys.argv
    out, *names = (word for word in sys.argv[1:] if word != "--profile")
    versions = ("torch", "transformers", "timm")
    found: dict[str, Any] = {}
    for name in names or ALL:
        found[name] = measure(name, profiled)
        record(__file__, out, versions, torch.cuda.get_device_name(), batch=BATCH, steps=found)


if __name__ == "__main__":
    main()
