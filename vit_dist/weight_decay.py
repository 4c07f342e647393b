"""Which parameters weight decay applies to: the matrices of layers, as in the published recipes of every family."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

_WEIGHTS = ("weight", "in_proj_weight")  # nn.MultiheadAttention names its matrix like the latter
_POSITIONS = re.compile(r"position_bias_mlp")  # Swin v2 computes its position biases from these layers


def decayed_names(model: nn.Module) -> list[str]:
    """Names of the decayed parameters, in the model's order.

    Left out are biases, norms, class, register, mask and distillation tokens, position embeddings and biases, layer
    scales, probes and latents: all that is no `weight` of a layer, or has one dimension.
    """
    names = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or _POSITIONS.search(path):
            continue
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if name.rpartition(".")[2] in _WEIGHTS and not _is_vector(parameter):
                names.append(name)
    return names


def _is_vector(parameter: torch.Tensor) -> bool:
    """Whether at most one dimension is larger than 1. ZeRO-3 keeps the shape of a parameter that it has taken apart."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return max(shape, default=1) == math.prod(shape)
