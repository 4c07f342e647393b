"""Which families of models can be trained, and the config of an image classifier for a checkpoint of one.

A checkpoint that is no image classifier is made one where all of its image weights can be kept: bare vision towers
(CLIP, SigLIP) get their family's classifier, ViT-MAE's encoder is a ViT, DINOv3 gets a head of ours.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig, PreTrainedConfig, ViTConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from vit_dist.errors import UserError, first_line
from vit_dist.options import ModelOptions

# Their classifiers are in `classifiers`, which registers them on import.
OURS = frozenset({"dinov3_vit", "dinov3_convnext", "siglip2", "pp_lcnet"})
REFUSED = {
    "imagegpt": "reads images as sequences of colour clusters, not as pixels",
    "shieldgemma2": "is a language model that answers yes or no to a policy",
}
# Images are cut into patches of `patch_size`, once, and what is left over at the edges would be dropped.
PATCHED = frozenset({
    "beit", "clip", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "metaclip_2",
    "siglip", "siglip2", "vit", "vit_msn",
})  # fmt: skip
USUAL = ("vit", "deit", "dinov2", "dinov3_vit", "clip", "siglip", "convnext", "swin")


@dataclass(frozen=True)
class Family:
    """A checkpoint as an image classifier."""

    config: Any  # of the classifier
    is_tower: bool = False  # the checkpoint holds the classifier's `vision_model` alone
    note: str = ""  # what the checkpoint was, if it is no image classifier


def load_family(options: ModelOptions, cache_dir: str | None = None) -> Family:
    """Read the checkpoint's config, which is all that is loaded.

    Raises UserError if there is none, or if no image classifier can be made of the checkpoint.
    """
    where = location(options, cache_dir)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(options.model, **where)
        if not raw:
            raise OSError("no config.json there")
        model_type = str(raw.get("model_type", ""))
        _refuse(options.model, model_type, raw)
        if model_type in OURS:
            importlib.import_module("vit_dist.classifiers")
        config = AutoConfig.from_pretrained(options.model, **where)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(not_loaded(options.model, error)) from error
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return Family(config)
    if model_type == "vit_mae":
        kept = {key: value for key, value in config.to_dict().items() if hasattr(ViTConfig(), key)}
        kept = {key: value for key, value in kept.items() if key not in ("model_type", "architectures")}
        return Family(ViTConfig(**kept), note="the encoder of a ViT-MAE, as a ViT")
    for whole in _image_configs():
        if whole.sub_configs.get("vision_config") is type(config):
            made = whole(vision_config=config.to_dict())
            if whole.model_type in OURS:
                importlib.import_module("vit_dist.classifiers")
            return Family(made, is_tower=True, note=f"a vision tower, as {whole.model_type}")
    raise UserError(
        f"model {options.model} is of the family {model_type}, for which transformers {transformers.__version__} has "
        f"no image classifier; give a checkpoint of another family, such as {_like(model_type)}"
    )


def location(options: ModelOptions, cache_dir: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    return {"revision": options.model_revision or "main", "cache_dir": cache_dir, "trust_remote_code": False}


def not_loaded(name: str, error: Exception) -> str:
    """One line for a checkpoint that upstream does not load."""
    first = first_line(error)
    if "safetensors" in str(error):
        return f"model {name}: no safetensors weights there; pickled weights are not loaded ({first})"
    return (
        f"model {name}: could not be loaded as an image classifier: {first} "
        "(give a hub id, a folder with config.json and model.safetensors, or `tiny`)"
    )


def image_config(config: Any) -> Any:
    """The part of a config that has `image_size` and `patch_size`."""
    return getattr(config, "vision_config", None) or config


def set_image_size(config: Any, side: int) -> None:
    """Make it the config of a model for square images of `side` pixels, where that is part of the config."""
    part = image_config(config)
    if (before := getattr(part, "image_size", None)) is not None:
        part.image_size = side if isinstance(before, int) else type(before)((side, side))


def image_side(config: Any) -> int | None:
    """Side in pixels of the images that a model is made for; None if it takes any."""
    size = getattr(image_config(config), "image_size", None)
    return size if size is None or isinstance(size, int) else int(next(iter(size)))


def check_image_size(config: Any, side: int) -> None:
    """Raise UserError for a size that would leave pixels at the edges out of all patches."""
    patch = getattr(image_config(config), "patch_size", None)
    if config.model_type not in PATCHED or patch is None:
        return
    patch = patch if isinstance(patch, int) else int(next(iter(patch)))
    if side % patch:
        sizes = [size for size in (side // patch * patch, (side // patch + 1) * patch) if size]
        raise UserError(
            f"image_size={side}: patches of {patch} pixels do not divide it; use {' or '.join(map(str, sizes))}"
        )


def _refuse(name: str, model_type: str, raw: dict[str, Any]) -> None:
    """Raise UserError for a family that cannot be trained."""
    if model_type in REFUSED:
        raise UserError(
            f"model {name} is of the family {model_type}, which {REFUSED[model_type]}; give a checkpoint of another "
            f"family, such as {_like(model_type)}"
        )
    if model_type == "timm_wrapper":
        architecture = raw.get("architecture", "no architecture named")
        raise UserError(
            f"model {name} is a timm model ({architecture}): transformers needs timm (pip install timm) and "
            "torchvision for it, and training it is not supported here; give a transformers checkpoint of the families "
            f"{', '.join(USUAL)}"
        )


def _image_configs() -> Iterable[Any]:
    return (config for config in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if isinstance(config, type))


def _like(model_type: str) -> str:
    known = [*MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *OURS]
    near = [name for name in difflib.get_close_matches(model_type, known, 3, 0.7) if name not in REFUSED]
    return ", ".join(dict.fromkeys([*near, *USUAL]))
