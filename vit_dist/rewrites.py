"""The same model, computed in another way: parameters keep their names, and results are the same to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, eager_attention_forward

from vit_dist.errors import UserError

# What is replaced gets another class, and not a function of its own: Dynamo would compile each instance's anew.


def class_token_only(model: PreTrainedModel) -> bool:
    """Compute in the last block what is read after it, the class token; keys and values of it are all tokens'.

    A ViT's head reads nothing else, so logits and gradients are the same: of ViT-B/16 at 224 pixels 7 % of the
    operations are left out. (Its last hidden state then is that of one token.) Returns whether the model is one that
    this is known for.
    """
    if type(model) is not ViTForImageClassification or not model.vit.layers:
        return False
    last = model.vit.layers[-1]
    if type(last) is not ViTLayer or type(last.attention) is not ViTAttention:
        return False
    last.__class__, last.attention.__class__ = _LastLayer, _LastAttention
    return True


class _LastLayer(ViTLayer):
    """`ViTLayer` of (n, tokens, width), for the first token: (n, 1, width)."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        mixed, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        token = self.dropout(mixed) + hidden_states[:, :1]
        return self.dropout(self.mlp(self.layernorm_after(token))) + token


class _LastAttention(ViTAttention):
    """`ViTAttention` whose only query is the first token."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = attention_mask[:, :, :1]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(
            self,
            heads(self.q_proj(hidden_states[:, :1])),
            heads(self.k_proj(hidden_states)),
            heads(self.v_proj(hidden_states)),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(mixed.flatten(2)), weights


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
