"""Every image classifier of transformers, small: all weights but the head survive loading, saving and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from test_reload import exact_trainer, overwrite, save
from tiny_models import (
    FAMILIES,
    NAFLEX,
    NOT_BUILT,
    SETTINGS,
    TOWERS,
    VIT,
    classifiers,
    randomise,
    square_processor,
    tiny_config,
)
from transformers import AutoModelForImageClassification

from vit_dist.data.transforms import input_size, load_processor
from vit_dist.errors import UserError
from vit_dist.model import BuiltModel, build_model, meta_model, reload_strictly, sized_by_classes
from vit_dist.options import ModelOptions

NAMES = ["ant", "bee"]
REFUSED = {"imagegpt", "shieldgemma2"}
BUILT = [
    pytest.param(family, number, id=cls.__name__)
    for family in SETTINGS
    if family not in REFUSED
    for number, cls in enumerate(classifiers(family))
]


def test_every_family_of_transformers_is_in_the_table() -> None:
    assert {*SETTINGS, *NOT_BUILT} == set(FAMILIES)
    assert not SETTINGS.keys() & NOT_BUILT.keys()


def written(folder: Path, model: Any, processor: Any = None) -> ModelOptions:
    model.save_pretrained(folder)
    (processor or square_processor(model.config)).save_pretrained(folder)
    return ModelOptions(model=str(folder))


def built(options: ModelOptions, names: list[str] = NAMES, seed: int = 0) -> BuiltModel:
    return build_model(options, names, input_size(load_processor(options)), seed=seed)


def differing(one: Any, other: Any) -> set[str]:
    """Names of the parameters and persistent buffers that are not equal to the bit."""
    before, after = one.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def checkpoint(family: str, number: int = 0, **changes: Any) -> Any:
    return randomise(classifiers(family)[number](tiny_config(family, **changes)))


@pytest.mark.parametrize(("family", "number"), BUILT)
def test_all_weights_but_the_head_survive_loading_resuming_and_export(family: str, number: int, tmp_path: Path) -> None:
    original = checkpoint(family, number, num_labels=3)
    options = written(tmp_path / "checkpoint", original)
    model = built(options).model
    head = sized_by_classes(model)
    assert head and differing(original, model) == head
    assert model.config.id2label == dict(enumerate(NAMES))

    trainer = exact_trainer(randomise(model), tmp_path / "run")
    saved = save(trainer, model, 20)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    overwrite(model)
    trainer._load_from_checkpoint(str(saved))
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])} == set()

    trainer.processing_class = square_processor(original.config)
    trainer.export(tmp_path / "best")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "best")
    assert differing(model, again) == set()


@pytest.mark.parametrize("family", [family for family in SETTINGS if family not in REFUSED])
def test_a_head_for_as_many_other_classes_is_drawn_anew_and_nothing_else(family: str, tmp_path: Path) -> None:
    original = checkpoint(family, num_labels=2)
    options = written(tmp_path, original)
    model = built(options).model
    assert differing(original, model) == sized_by_classes(model)
    assert differing(model, built(options).model) == set(), "the seed decides"
    same = built(options, ["LABEL_0", "LABEL_1"]).model
    assert differing(original, same) == (set() if original.config.id2label else sized_by_classes(same))


WITHOUT_HEAD: dict[str, Any] = {
    "clip": lambda: t.CLIPModel(t.CLIPConfig(**TOWERS)),
    "siglip": lambda: t.SiglipModel(t.SiglipConfig(**TOWERS)),
    "siglip2": lambda: t.Siglip2Model(t.Siglip2Config(**SETTINGS["siglip2"])),
    "metaclip_2": lambda: t.MetaClip2Model(t.MetaClip2Config(**TOWERS)),
    "clip tower": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VIT)),
    "clip tower with projection": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**VIT)),
    "siglip tower": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VIT)),
    "siglip2 tower": lambda: t.Siglip2VisionModel(t.Siglip2VisionConfig(**NAFLEX)),
    "metaclip_2 tower": lambda: t.MetaClip2VisionModel(t.MetaClip2VisionConfig(**VIT)),
    "vit_mae": lambda: t.ViTMAEForPreTraining(
        t.ViTMAEConfig(**VIT, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    ),
    "vit_mae encoder": lambda: t.ViTMAEModel(t.ViTMAEConfig(**VIT)),
    "vit": lambda: t.ViTModel(t.ViTConfig(**VIT)),
    "deit": lambda: t.DeiTForMaskedImageModeling(t.DeiTConfig(**VIT)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**VIT)),
    "dinov3_vit": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**VIT, num_register_tokens=2)),
    "dinov3_convnext": lambda: t.DINOv3ConvNextModel(t.DINOv3ConvNextConfig(**SETTINGS["convnext"])),
    "beit": lambda: t.BeitModel(t.BeitConfig(**SETTINGS["beit"])),
    "swin": lambda: t.SwinModel(t.SwinConfig(**SETTINGS["swin"])),
    "levit": lambda: t.LevitModel(t.LevitConfig(**SETTINGS["levit"])),
    "swiftformer": lambda: t.SwiftFormerModel(t.SwiftFormerConfig(**SETTINGS["swiftformer"])),
    "poolformer": lambda: t.PoolFormerModel(t.PoolFormerConfig(**SETTINGS["poolformer"])),
    "resnet": lambda: t.ResNetModel(t.ResNetConfig(**SETTINGS["resnet"])),
    "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(**SETTINGS["convnext"])),
}


@pytest.mark.parametrize("kind", WITHOUT_HEAD)
def test_a_checkpoint_without_a_head_keeps_every_weight_of_its_images(kind: str, tmp_path: Path) -> None:
    original = randomise(WITHOUT_HEAD[kind]())
    model = built(written(tmp_path, original)).model
    before = {(*value.shape, value.double().sum().item()) for value in original.state_dict().values()}
    new = {
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and (*value.shape, value.double().sum().item()) not in before
    }
    heads = ("classifier", "norm.", "head.", "dist_head.")  # LeViT's has a batch norm, SwiftFormer's a norm before it
    assert new and all(name.startswith(heads) for name in new)


def test_a_pooler_norm_that_the_checkpoint_lacks_starts_as_the_identity(tmp_path: Path) -> None:
    original = randomise(t.BeitForMaskedImageModeling(t.BeitConfig(**SETTINGS["beit"])))
    made = built(written(tmp_path, original))
    norm = made.model.beit.pooler.layernorm
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
    assert "new weights: beit.pooler.layernorm.bias" in made.description


@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "resnet", "levit", "hgnet_v2", "pp_lcnet", "dinov2"])
def test_a_checkpoint_without_one_backbone_tensor_is_refused_by_its_name(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    options = written(tmp_path, checkpoint(family, num_labels=3))
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(".weight") and ".encoder." in f".{name}")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of \d+ weights besides the classifier are not in the checkpoint") as error:
        built(options)
    assert str(tmp_path) in str(error.value) and "--from_scratch" in str(error.value)
    assert len(str(error.value)) < 500


def test_a_backbone_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    options = written(tmp_path, checkpoint("vit", num_labels=3))
    tiny_config("vit", intermediate_size=40).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"of another shape in the checkpoint and would be random: .*mlp"):
        built(options)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", t.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
        ("llama", t.LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
        ("imagegpt", tiny_config("imagegpt")),
        ("detr", t.DetrConfig()),
    ],
)
def test_a_family_without_a_usable_classifier_is_named(family: str, config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"of the family {family}.*give a checkpoint of another family, such as") as e:
        load_processor(ModelOptions(model=str(tmp_path)))
    assert len(str(e.value)) < 500 and "dinov2" in str(e.value)


def test_a_timm_folder_is_named_with_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architecture": "vit_tiny_patch16_224", "num_classes": 1000, "num_features": 192, "pretrained_cfg": {}}'
    )
    with pytest.raises(UserError, match=r"is a timm model \(vit_tiny_patch16_224\): .*pip install timm.*families vit"):
        load_processor(ModelOptions(model=str(tmp_path)))


def test_a_family_whose_package_is_missing_is_one_line(tmp_path: Path) -> None:
    t.DinatConfig(embed_dim=8, depths=[1], num_heads=[1], dilations=[[1]]).save_pretrained(tmp_path)
    square_processor(t.ViTConfig(**VIT)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(UserError, match="requires the natten library"):
        built(ModelOptions(model=str(tmp_path)))


PATCHED = ["vit", "clip", "siglip", "siglip2", "dinov2", "ijepa", "metaclip_2"]


@pytest.mark.parametrize("family", PATCHED)
def test_an_image_size_that_patches_do_not_divide_is_refused_with_the_nearest(family: str, tmp_path: Path) -> None:
    options = written(tmp_path, checkpoint(family))
    options.image_size = 60
    with pytest.raises(UserError, match="image_size=60: patches of 8 pixels do not divide it; use 56 or 64"):
        load_processor(options)
    options.image_size = 5
    with pytest.raises(UserError, match=r"use 8$"):
        load_processor(options)


def test_an_image_size_of_tiny_keeps_all_pixels() -> None:
    with pytest.raises(UserError, match=r"image_size=30: .*use 28 or 32"):
        load_processor(ModelOptions(model="tiny", image_size=30))
    assert input_size(load_processor(ModelOptions(model="tiny", image_size=28))) == 28


@pytest.mark.parametrize("family", ["swin", "swinv2", "convnext", "resnet", "mobilevit", "pvt", "levit"])
def test_an_image_size_that_needs_no_division_is_not_refused(family: str, tmp_path: Path) -> None:
    options = written(tmp_path, checkpoint(family))
    options.image_size = 70
    assert input_size(load_processor(options)) == 70


@pytest.mark.parametrize("family", [*PATCHED, "dinov2_with_registers", "beit", "vit_msn", "deit"])
def test_another_image_size_trains_plans_and_reloads(family: str, tmp_path: Path) -> None:
    options = written(tmp_path / "checkpoint", checkpoint(family))
    options.image_size = 64
    model = built(options).model
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in meta_model(options, NAMES, 64).state_dict().items()} == shapes
    model.save_pretrained(tmp_path / "best")
    other = built(options, seed=1).model
    reload_strictly(other, tmp_path / "best")
    assert differing(model, other) == set()
