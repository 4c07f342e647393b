"""Pixels made on the device are the image processor's, whatever holds the images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from vit_dist.data.pipeline import build_data
from vit_dist.data.pixels import LEVELS, Pixels, to_tensor
from vit_dist.data.resident import ResidentDataset, place_images
from vit_dist.data.transforms import Transform
from vit_dist.errors import UserError
from vit_dist.options import DataOptions, ModelOptions

CPU = torch.device("cpu")


def processor(side: int, resample: int = 2) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": side, "width": side}, resample=resample)


def pictures(count: int, width: int, height: int) -> list[Image.Image]:
    random = np.random.default_rng(1)
    small = [Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((width, height), Image.Resampling.BICUBIC) for image in small]


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (90, 61), (300, 500)])
@pytest.mark.parametrize(("side", "resample"), [(32, 2), (224, 2), (48, 3)])
def test_crops_and_mirroring_on_the_device_are_those_of_pillow(side: int, resample: int, size: tuple[int, int]) -> None:
    transform = Transform(processor(side, resample), DataOptions(), seed=3)
    pixels = Pixels.of(transform.processor)
    assert pixels is not None
    images, places = pictures(16, *size), [(2, index) for index in range(16)]
    boxes, mirrored = zip(*[transform.choose(*place, *size) for place in places], strict=True)
    assert 0 < sum(mirrored) < 16
    batch = torch.stack([to_tensor(image) for image in images])
    made = pixels(batch, torch.tensor(boxes, dtype=torch.float32), torch.tensor(mirrored))
    difference = ((made - transform(images, places)) / pixels._scale).abs()
    assert difference.max() < LEVELS and (difference > 0.5).float().mean() < 0.1


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (61, 90), (300, 500), (1000, 10), (1500, 1200)])
@pytest.mark.parametrize(("side", "resample"), [(32, 2), (224, 2), (48, 3)])
def test_streamed_bytes_are_pillows_to_a_level(side: int, resample: int, size: tuple[int, int]) -> None:
    """Nothing of what was cropped away is in them, as in torchvision's RandomResizedCrop."""
    transform = Transform(processor(side, resample), DataOptions(), seed=3)
    noise = np.random.default_rng(2).integers(0, 2, (*size[::-1], 3), dtype=np.uint8) * 255
    for index, image in enumerate([*pictures(15, *size), Image.fromarray(noise)]):
        box, mirrored = transform.choose(2, index, *size)
        expected = np.array(image.crop(box).resize((side, side), Image.Resampling(resample)))
        made = transform.square(image, size, 2, index)
        assert made.shape == (3, side, side) and made.dtype == torch.uint8
        made = made.permute(1, 2, 0).numpy()[:, :: -1 if mirrored else 1]
        assert np.abs(made.astype(int) - expected).max() <= (resample == Image.Resampling.BILINEAR)


def test_processor_with_unknown_steps_is_not_imitated() -> None:
    assert Pixels.of(ViTImageProcessorPil(size={"height": 32, "width": 24})) is None
    assert Pixels.of(ViTImageProcessorPil(size={"shortest_edge": 32})) is None
    lies = processor(32)
    lies.do_normalize = False
    assert Pixels.of(lies) is None, "it names a mean and does not subtract it"


@pytest.fixture(scope="module")
def digits():
    options = DataOptions(max_train_samples=60, max_eval_samples=20, max_predict_samples=20)
    return build_data(options, ModelOptions(model="tiny"), 0, lambda title: lambda done, total: None)


def test_image_sources_make_the_same_batches(digits) -> None:
    """Whatever else is in the batch; bytes go through the loader as they are."""
    keys = [60 * 3 + 7, 60 * 3 + 1, 60 * 3 + 59]
    expected = digits.train.__getitems__(keys)
    for source in ("resident", "stream"):
        placed, pixels, chosen = place_images(digits, source, CPU, 0)
        assert chosen == source and isinstance(placed.train, ResidentDataset) == (source == "resident")
        assert source in " ".join(placed.description)
        batch = placed.train.__getitems__(keys)
        assert batch["pixel_values"].dtype == torch.uint8
        made = pixels(batch["pixel_values"], batch.get("boxes"), batch.get("mirrored"))
        assert ((made - expected["pixel_values"]) / pixels._scale).abs().max() < LEVELS
        for name in ("labels", "index"):
            assert torch.equal(batch[name], expected[name])
        alone = placed.train[keys[1]]
        assert torch.equal(alone["pixel_values"], batch["pixel_values"][1])


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """Photos much larger than the model's input of 32 pixels, some upright only by their EXIF data."""
    root = tmp_path_factory.mktemp("camera")
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, image in enumerate(pictures(24, 403, 301)):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        turned = {"exif": exif} if number % 3 == 0 else {}
        image.save(root / "ab"[number % 2] / f"{number}.jpg", quality=95, **turned)
    return build_data(
        DataOptions(data=str(root)), ModelOptions(model="tiny"), 0, lambda title: lambda done, total: None
    )


def test_streamed_photos_are_decoded_no_larger_than_their_crops_need(camera, monkeypatch) -> None:
    sizes, square = [], Transform.square

    def noted(self, image, size, *place):
        sizes.append((image.size, size, self.choose(*place, *size)[0]))
        return square(self, image, size, *place)

    monkeypatch.setattr(Transform, "square", noted)
    placed, pixels, _ = place_images(camera, "stream", CPU, 0)
    for whole, streamed in ((camera.train, placed.train), (camera.validation, placed.validation)):
        keys = [epoch * len(whole) + index for epoch in range(4) for index in range(len(whole))]
        expected = whole.__getitems__(keys)
        batch = streamed.__getitems__(keys)
        made = pixels(batch["pixel_values"], None, None)
        difference = ((made - expected["pixel_values"]) / pixels._scale).abs().mean()
        assert difference < 6, "the same crops: others differ by 50"
        assert torch.equal(streamed[keys[5]]["pixel_values"], batch["pixel_values"][5])
    for reduced, size, (left, top, right, bottom) in sizes:
        by = size[0] / reduced[0]
        assert min(right - left, bottom - top) / by >= min(32, right - left, bottom - top) * 0.99
        assert by >= 7.5 or min(right - left, bottom - top) / (2 * round(by)) < 32
    assert len({round(size[0] / reduced[0]) for reduced, size, _ in sizes}) > 2
    assert placed.validation.decoded(0).size in ((51, 38), (38, 51))


def test_image_source_on_cpu_is_the_processor(digits) -> None:
    placed, pixels, chosen = place_images(digits, "auto", CPU, 0)
    assert pixels is None and chosen == "processor" and placed.train is digits.train
    assert placed.description == [*digits.description, "images made by the model's image processor"]


def test_images_that_cannot_be_resident_are_refused(photos: Path, digits) -> None:
    options = DataOptions(data=str(photos))
    data = build_data(options, ModelOptions(model="tiny"), 0, lambda title: lambda done, total: None)
    with pytest.raises(UserError, match="image_source=resident: images of several sizes; use stream or cache"):
        place_images(data, "resident", CPU, 0)
    odd = dataclasses.replace(digits, processor=ViTImageProcessorPil(size={"shortest_edge": 32}))
    with pytest.raises(UserError, match="image_source=stream: the model's image processor does more"):
        place_images(odd, "stream", CPU, 0)
