"""Augmentation is a function of the place; without it, pixels are the image processor's to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig

from vit_dist.data.transforms import Transform, _random_box, load_processor
from vit_dist.errors import UserError
from vit_dist.options import DataOptions, ModelOptions

AUGMENT = DataOptions(random_resized_crop=True, horizontal_flip=True)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)) for i in range(5)]


def processor(checkpoint: Path, image_size: int | None = None):
    return load_processor(ModelOptions(model=str(checkpoint), image_size=image_size))


def test_without_augmentation_it_is_the_image_processor(checkpoint: Path, images: list[Image.Image]) -> None:
    upstream = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    pixels = Transform(processor(checkpoint))(images, [(0, i) for i in range(5)])
    assert pixels.shape == (5, 3, 32, 32) and pixels.dtype == torch.float32
    for i, image in enumerate(images):
        assert torch.equal(pixels[i], upstream(image, return_tensors="pt")["pixel_values"][0])


def test_augmentation_depends_on_seed_epoch_and_index_alone(checkpoint: Path, images: list[Image.Image]) -> None:
    def crop(seed: int, epoch: int, index: int) -> torch.Tensor:
        return Transform(processor(checkpoint), AUGMENT, seed)([images[0]], [(epoch, index)])[0]

    torch.manual_seed(1)
    first = crop(3, 2, 7)
    torch.manual_seed(2)
    assert torch.equal(first, crop(3, 2, 7))
    assert all(not torch.equal(first, crop(*place)) for place in ((4, 2, 7), (3, 1, 7), (3, 2, 8)))
    batch = Transform(processor(checkpoint), AUGMENT, 3)(images, [(2, i) for i in (5, 6, 7, 8, 9)])
    alone = Transform(processor(checkpoint), AUGMENT, 3)([images[2]], [(2, 7)])
    assert torch.equal(batch[2], alone[0]), "the rest of the batch does not matter"


def test_flips_mirror_half_of_the_images(checkpoint: Path, images: list[Image.Image]) -> None:
    flip = DataOptions(random_resized_crop=False, horizontal_flip=True)
    plain = Transform(processor(checkpoint))(images[:1], [(0, 0)])[0]
    seen = [Transform(processor(checkpoint), flip)(images[:1], [(0, i)])[0] for i in range(200)]
    mirrored = sum(not torch.equal(one, plain) for one in seen)
    assert 70 < mirrored < 130
    assert all(torch.equal(one, plain) or torch.equal(one, plain.flip(-1)) for one in seen)


def test_crops_lie_in_the_image_with_the_area_and_shape_asked_for() -> None:
    areas = []
    for i in range(500):
        left, top, right, bottom = _random_box(np.random.default_rng(i), 64, 48, 0.25)
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 48
        areas.append((right - left) * (bottom - top) / (64 * 48))
        assert 0.7 < (right - left) / (bottom - top) < 1.45
    assert min(areas) > 0.23 and max(areas) <= 1 and 0.5 < np.mean(areas) < 0.75


def test_random_crop_of_a_panorama_takes_the_middle() -> None:
    assert _random_box(np.random.default_rng(0), 1000, 10, 0.9) == (493, 0, 506, 10)


def test_a_folder_without_a_config_or_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"model {tmp_path}: .*no config\.json there"):
        load_processor(ModelOptions(model=str(tmp_path)))
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"model {tmp_path}: no image processor"):
        load_processor(ModelOptions(model=str(tmp_path)))
