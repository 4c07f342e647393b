"""Floating-point operations of a model, counted by running it on no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vit_dist.rewrites import class_token_only


@dataclass(frozen=True)
class Flops:
    """Of one image; a multiply-add counts as 2. Matrix products, convolutions and attention, nothing else."""

    forward: float
    training: float  # forward and backward, recomputation not counted


def count_flops(model: PreTrainedModel, side: int) -> Flops:
    """For square inputs of `side` pixels, as it is trained here: what `rewrites.class_token_only` leaves out is not
    counted. For ViT-B/16 at 224: 32.7 and 97.9 GFLOP, of the 35.1 and 105.1 of all tokens in all blocks.

    Upstream's `floating_point_ops` takes each pixel for a token, 737 times as many for that model.
    """
    with torch.device("meta"):
        model_copy, images = type(model)(model.config).eval(), torch.empty(1, 3, side, side)
    class_token_only(model_copy)
    with FlopCounterMode(display=False) as counter:
        logits = model_copy(pixel_values=images).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    # PyTorch counts the backward pass of grouped convolutions (ConvNeXt) as if they had one group.
    return Flops(forward, min(counter.get_total_flops(), 3 * forward))
