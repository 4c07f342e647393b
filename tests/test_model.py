"""Every supported family with tiny random weights: head, names, image size, and saving without losing a tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vit_dist.data.transforms import input_size, load_processor
from vit_dist.errors import UserError
from vit_dist.model import build_model, reload_strictly
from vit_dist.options import ModelOptions

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "vit": lambda: (
        transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, intermediate_size=64, num_labels=7)),
        transformers.ViTImageProcessorPil(size=square(32)),
    ),
    "deit": lambda: (
        transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL, intermediate_size=64, num_labels=7)),
        transformers.DeiTImageProcessorPil(size=square(36), crop_size=square(32)),
    ),
    "dinov2": lambda: (
        transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL, num_labels=7)),
        transformers.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=square(32)),
    ),
    "beit": lambda: (
        transformers.BeitForImageClassification(
            transformers.BeitConfig(
                **SMALL, intermediate_size=64, num_labels=7, use_relative_position_bias=True,
                use_absolute_position_embeddings=True,
            )
        ),
        transformers.BeitImageProcessorPil(size=square(32), crop_size=square(32), do_center_crop=False),
    ),
    "swin": lambda: (
        transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=7
            )
        ),
        transformers.ViTImageProcessorPil(size=square(32)),
    ),
    "convnext": lambda: (
        transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], image_size=32, num_labels=7)
        ),
        transformers.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
    ),
}  # fmt: skip
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder of each family, every parameter random so that a lost tensor shows."""
    folders = {}
    for name, make in FAMILIES.items():
        torch.manual_seed(1)
        model, processor = make()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        folders[name] = tmp_path_factory.mktemp("families") / name
        model.save_pretrained(folders[name])
        processor.save_pretrained(folders[name])
    return folders


def build(folder: Path, classes: list[str], seed: int = 0, image_size: int | None = None) -> Any:
    options = ModelOptions(model=str(folder), image_size=image_size)
    return build_model(options, classes, input_size(load_processor(options)), seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_model_has_a_new_head_and_the_checkpoints_backbone(saved: dict[str, Path], family: str) -> None:
    built = build(saved[family], CLASSES)
    original = AutoModelForImageClassification.from_pretrained(saved[family]).state_dict()
    state = built.model.state_dict()
    changed = {name for name in state if not torch.equal(state[name], original[name][: len(state[name])])}
    head = {name for name in state if name.startswith("classifier")}
    assert changed <= head and head
    assert all(name in built.description for name in head), built.description
    assert built.model.config.id2label == dict(enumerate(CLASSES))
    assert built.model.config.label2id == {name: i for i, name in enumerate(CLASSES)}
    assert built.model.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_reloading_keeps_every_bit(saved: dict[str, Path], family: str, tmp_path: Path) -> None:
    model = build(saved[family], CLASSES).model
    model.save_pretrained(tmp_path)
    other = build(saved[family], CLASSES, seed=5).model
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    reload_strictly(other, tmp_path)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_size_is_saved_with_the_model(saved: dict[str, Path], family: str, tmp_path: Path) -> None:
    options = ModelOptions(model=str(saved[family]), image_size=64)
    processor = load_processor(options)
    built = build(saved[family], CLASSES, image_size=64)
    built.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixels = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(
        Image.new("RGB", (90, 70), "teal"), return_tensors="pt"
    )["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert again.config.image_size == 64
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, built.model.eval()(pixels).logits)


def test_interpolated_positions_are_the_bicubic_resize_of_the_grid(saved: dict[str, Path]) -> None:
    before = build(saved["vit"], CLASSES).model.vit.embeddings.position_embeddings
    after = build(saved["vit"], CLASSES, image_size=64).model.vit.embeddings.position_embeddings
    assert after.shape == (1, 1 + 8 * 8, 32)
    assert torch.equal(after[:, 0], before[:, 0]), "the class token has no place to move to"
    grid = before[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 64, 32)
    assert torch.allclose(after[:, 1:], wanted)


def test_head_is_kept_for_the_same_classes_only(saved: dict[str, Path]) -> None:
    original = AutoModelForImageClassification.from_pretrained(saved["vit"])
    same = build(saved["vit"], [f"LABEL_{i}" for i in range(7)])
    assert torch.equal(same.model.classifier.weight, original.classifier.weight)
    assert "no new weights" in same.description
    other = build(saved["vit"], [f"class {i}" for i in range(7)])
    assert not torch.equal(other.model.classifier.weight, original.classifier.weight)
    assert "new weights: classifier.bias, classifier.weight" in other.description
    assert not other.model.classifier.bias.any()


def test_new_weights_depend_on_the_seed_alone(saved: dict[str, Path]) -> None:
    one, again, other = (build(saved["vit"], CLASSES, seed=seed).model.classifier.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_reloading_another_model_is_fatal(saved: dict[str, Path], tmp_path: Path) -> None:
    smaller = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**SMALL, "num_hidden_layers": 1}, intermediate_size=64, num_labels=3)
    )
    smaller.save_pretrained(tmp_path)
    model = build(saved["vit"], CLASSES).model
    with pytest.raises(RuntimeError):
        reload_strictly(model, tmp_path)


def test_checkpoint_without_some_tensors_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = build(saved["vit"], CLASSES).model
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in tensors if "query.weight" in name)
    del tensors[dropped]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="does not hold this model's weights"):
        reload_strictly(model, tmp_path)


def test_model_that_cannot_be_loaded_is_one_line(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model \S+nowhere: there is no such folder"):
        build(tmp_path / "nowhere", CLASSES)
    options = ModelOptions(model=str(saved["vit"]))
    with pytest.raises(UserError, match=r"does not take 40 x 40 images: .*--image_size"):
        build_model(options, CLASSES, 40, seed=0)
    (tmp_path / "pickled").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "pickled" / name).write_bytes((saved["vit"] / name).read_bytes())
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        build(tmp_path / "pickled", CLASSES)
    with pytest.raises(UserError, match="image_size=0"):
        build(saved["vit"], CLASSES, image_size=0)


def test_checkpoint_of_another_architecture_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((saved["vit"] / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((saved["convnext"] / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="weights besides the classifier are not in the checkpoint"):
        build(tmp_path, CLASSES)


def test_tiny_needs_no_download() -> None:
    options = ModelOptions(model="tiny")
    built = build_model(options, CLASSES, input_size(load_processor(options)), seed=0)
    assert built.model.num_labels == 3
    assert "random weights" in built.description


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_parameters_all_get_a_gradient(saved: dict[str, Path], family: str) -> None:
    """DistributedDataParallel does not search for unused ones, and would wait for them."""
    built = build(saved[family], CLASSES)
    built.model.train()(torch.ones(2, 3, 32, 32)).logits.sum().backward()
    trained = {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert {name for name, p in built.model.named_parameters() if p.grad is not None} == trained
    frozen = {name for name, _ in built.model.named_parameters()} - trained
    assert all(name in built.description for name in frozen)
    assert ("mask_token" in built.description) == (family == "dinov2")
