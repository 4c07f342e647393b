"""A small model with random weights for each class that transformers has for image classification."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, ViTImageProcessorPil
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
VIT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 99,
    "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOWERS: dict[str, Any] = {"vision_config": VIT, "text_config": TEXT}
NAFLEX = {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16}
STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
HEADS: dict[str, Any] = {**STAGES, "num_attention_heads": [1, 1, 2, 2]}

SETTINGS: dict[str, dict[str, Any]] = {
    "beit": {**VIT, "use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "bit": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4},
    "clip": TOWERS,
    "convnext": STAGES,
    "convnextv2": STAGES,
    "cvt": {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]},
    "data2vec-vision": {**VIT, "use_relative_position_bias": True},
    "deit": VIT,
    "dinov2": VIT,
    "dinov2_with_registers": {**VIT, "num_register_tokens": 2},
    "donut-swin": SWIN,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "focalnet": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3],
                 "hidden_sizes": [8, 16]},
    "hgnet_v2": {"stem_channels": [3, 8, 8], "embedding_size": 8, "stage_in_channels": [8, 16, 16, 16],
                 "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 16, 16, 16],
                 "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
                 "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "hiera": {"image_size": [32, 32], "patch_size": [7, 7], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1],
              "query_stride": [2, 2], "masked_unit_size": [4, 4], "num_query_pool": 1},
    "ijepa": VIT,
    "imagegpt": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 17},
    "levit": {"image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8]},
    "metaclip_2": TOWERS,
    "mobilenet_v1": {"depth_multiplier": 0.125, "min_depth": 4},
    "mobilenet_v2": {"depth_multiplier": 0.125, "min_depth": 4},
    "mobilevit": {"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
                  "num_attention_heads": 2},
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
    "perceiver": {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1,
                  "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 32},
    "poolformer": STAGES,
    "pp_lcnet": {"block_configs": [[[3, 16, 16, 2, stage > 2]] for stage in range(5)], "class_expand": 16},
    "pvt": {"image_size": 32, **HEADS},
    "pvt_v2": {"image_size": 32, **HEADS},
    "regnet": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "segformer": {**HEADS, "decoder_hidden_size": 8},
    "siglip": TOWERS,
    "siglip2": {"vision_config": NAFLEX, "text_config": TEXT},
    "swiftformer": {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]},
    "swin": SWIN,
    "swinv2": SWIN,
    "textnet": {"image_size": 32, "stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 8, 16],
                "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 3]], [[3, 3]]],
                "conv_layer_strides": [[1], [2], [2], [2]]},
    "vit": VIT,
    "vit_msn": VIT,
}  # fmt: skip
NOT_BUILT = {
    "dinat": "needs natten, which is not installed",
    "shieldgemma2": "a language model, refused",
    "timm_wrapper": "needs timm, which is not installed",
}


def classifiers(family: str) -> list[type[PreTrainedModel]]:
    """The classes that transformers has for a family; more than one where a teacher is distilled."""
    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[family]
    return [getattr(transformers, name) for name in ([names] if isinstance(names, str) else names)]


def tiny_config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**SETTINGS[family], **changes})


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Give every weight and running statistic another value than its initialisation; statistics stay positive."""
    random = torch.Generator().manual_seed(3)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(0.05 * torch.rand(value.shape, generator=random) + 0.01)
    return model


def square_processor(config: Any) -> Any:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 32
    side = min(size if isinstance(size, int) else size[0], 64)
    return ViTImageProcessorPil(size={"height": side, "width": side})
