"""Image classifiers for checkpoints that transformers cannot classify images with, registered on import.

After `import vit_dist.classifiers`, `AutoModelForImageClassification`, `pipeline` and `from_pretrained` know them.

dinov3_vit, dinov3_convnext  transformers has the backbones only: a linear head on top
siglip2                      (NaFlex) transformers takes patches and their positions: square images as well
pp_lcnet                     transformers returns the logits under another name
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ConvNextPreTrainedModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DINOv3ViTPreTrainedModel,
    PPLCNetConfig,
    Siglip2Config,
)
from transformers.modeling_outputs import ImageClassifierOutput, ImageClassifierOutputWithNoAttention
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTRopePositionEmbedding,
    get_patches_center_coordinates,
)
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

# Classes are named as transformers would name them: a saved model's config.json says which class it needs.


class DINOv3ViTForImageClassification(DINOv3ViTPreTrainedModel):
    """DINOv3 with a linear layer on the class token and the mean of the patch tokens; register tokens are left out.

    This is the linear head of Oquab et al. 2023, https://arxiv.org/abs/2304.07193, appendix B.3, on the last block.
    """

    base_model_prefix = "dinov3"  # upstream's, `model`, is also the name of the backbone's encoder

    def __init__(self, config: Any) -> None:  # a DINOv3ViTConfig, whose fields upstream types as optional
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinov3 = DINOv3ViTModel(config)
        self.dinov3.rope_embeddings.__class__ = _FixedPositions
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        outputs = self.dinov3(pixel_values, **kwargs)
        tokens = outputs.last_hidden_state
        patches = tokens[:, 1 + self.config.num_register_tokens :]
        logits = self.classifier(torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class _FixedPositions(DINOv3ViTRopePositionEmbedding):
    """The same in training as in evaluation.

    Upstream rescales the positions at random in training, by one draw for a whole batch: each process would draw its
    own. And it caches tensors by the size of the image, which may be those of a fake or a meta device.
    """

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tall, wide = _pair(self.config.patch_size)
        rows, columns = pixel_values.shape[2] // tall, pixel_values.shape[3] // wide
        places = get_patches_center_coordinates.__wrapped__(
            rows, columns, dtype=torch.float32, device=pixel_values.device
        )
        angles = (2 * math.pi * places[:, :, None] * self.inv_freq[None, None, :]).flatten(1, 2).tile(2)
        return torch.cos(angles).to(pixel_values.dtype), torch.sin(angles).to(pixel_values.dtype)


class DINOv3ConvNextForImageClassification(DINOv3ConvNextPreTrainedModel):
    """DINOv3's ConvNeXt with a linear layer on the normalised mean of the last feature map."""

    base_model_prefix = "dinov3"

    def __init__(self, config: Any) -> None:  # a DINOv3ConvNextConfig
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinov3 = DINOv3ConvNextModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        outputs = self.dinov3(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutputWithNoAttention(loss, logits, outputs.hidden_states)


class Siglip2ForImageClassification(transformers.Siglip2ForImageClassification):
    """Upstream's model, which takes images (n, 3, height, width) as well as NaFlex patches."""

    def __init__(self, config: Siglip2Config) -> None:
        super().__init__(config)
        self.vision_model.embeddings.__class__ = _ImageEmbeddings


class _ImageEmbeddings(Siglip2VisionEmbeddings):
    def forward(self, pixel_values: torch.Tensor, spatial_shapes: Any) -> torch.Tensor:
        if pixel_values.dim() != 4 or spatial_shapes is not None:
            return super().forward(pixel_values, spatial_shapes)
        n, channels, height, width = pixel_values.shape
        side, _ = _pair(self.patch_size)
        rows, columns = height // side, width // side
        if (rows * side, columns * side) != (height, width):
            raise ValueError(f"patches of {side} pixels do not divide images of {height} x {width}")
        patches = pixel_values.reshape(n, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        made = self.patch_embedding(patches.reshape(n, rows * columns, side * side * channels))
        table, grid = self.position_embedding.weight, self.position_embedding_size
        if (rows, columns) != (grid, grid):  # as upstream resizes it
            whole = table.T.reshape(1, -1, grid, grid)
            whole = F.interpolate(whole, (rows, columns), mode="bilinear", align_corners=False, antialias=True)
            table = whole.flatten(2)[0].T
        return made + table


class PPLCNetForImageClassification(transformers.PPLCNetForImageClassification):
    """Upstream's model with its logits under the usual name."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> ImageClassifierOutputWithNoAttention:
        outputs = super().forward(pixel_values, **kwargs)
        return ImageClassifierOutputWithNoAttention(
            logits=outputs.last_hidden_state, hidden_states=outputs.hidden_states
        )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


for config_class, model_class in (
    (DINOv3ViTConfig, DINOv3ViTForImageClassification),
    (DINOv3ConvNextConfig, DINOv3ConvNextForImageClassification),
    (Siglip2Config, Siglip2ForImageClassification),
    (PPLCNetConfig, PPLCNetForImageClassification),
):
    AutoModelForImageClassification.register(config_class, model_class, exist_ok=True)
