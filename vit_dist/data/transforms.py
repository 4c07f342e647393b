"""From a decoded image to the model's input: the model's own image processor, and augmentation in front of it."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers import AutoImageProcessor, SiglipImageProcessorPil, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vit_dist.errors import UserError, first_line
from vit_dist.families import check_image_size, load_family, location
from vit_dist.options import DataOptions, ModelOptions

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
TINY_IMAGE_SIZE = 32  # pixels; the input side of `--model tiny`
TINY_GRID = 4  # its patches to a side
_FAST = 2**20  # pixels up to which PyTorch's resize is faster than Pillow's; three times at 400 x 533


def load_processor(options: ModelOptions, cache_dir: str | None = None) -> Any:
    """The model's image processor, set to `--image_size` where that is given.

    The PIL backend is used everywhere: the torchvision one differs by up to one grey level, and a run must not
    depend on which packages happen to be installed.
    """
    size = options.image_size
    if size is not None and size < 1:
        raise UserError(f"image_size={size}: give a number of pixels, such as 224")
    try:
        load = AutoImageProcessor.from_pretrained
    except ImportError:  # a placeholder that raises when it is touched; seen in 5.10 and 5.17, gone in 5.23
        raise UserError(
            f"transformers {transformers.__version__} has no image processors without torchvision: pip install "
            "torchvision, or transformers>=5.23"
        ) from None
    if options.model == "tiny":
        return _tiny_processor(size or TINY_IMAGE_SIZE)
    reachable = find_model(options)
    try:
        family = load_family(options, cache_dir)
        if size is not None:
            check_image_size(family.config, size)
        processor = _pil_processor(load, options, cache_dir)
    except (UserError, OSError, ValueError) as error:
        missing = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        if missing and not reachable:
            raise UserError(
                f"model {options.model}: no such folder, the Hugging Face hub cannot be reached, and no copy is in the "
                "cache; give a folder, or download it where there is a network"
            ) from None
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model {options.model}: no image processor (preprocessor_config.json) could be loaded: {first_line(error)}"
        ) from None
    return processor if size is None else _resized(processor, size, options.model)


def _tiny_processor(side: int) -> Any:
    if side > TINY_GRID and side % TINY_GRID:
        below = side // TINY_GRID * TINY_GRID
        raise UserError(
            f"image_size={side}: `tiny` cuts images into {TINY_GRID} x {TINY_GRID} patches; use {below} or "
            f"{below + TINY_GRID}"
        )
    return ViTImageProcessorPil(size={"height": side, "width": side})


def _pil_processor(load: Callable[..., Any], options: ModelOptions, cache_dir: str | None) -> Any:
    """`load` is `AutoImageProcessor.from_pretrained`. Two families need another one:

    DINOv3's needs torchvision. It resizes in float where Pillow rounds to whole grey levels.
    SigLIP 2's (NaFlex) keeps the aspect ratio and makes patches; square images have as many of them.
    """
    where = location(options, cache_dir)
    stated, _ = ViTImageProcessorPil.get_image_processor_dict(options.model, **where)
    kind = str(stated.get("image_processor_type")).removesuffix("Fast")
    common = {key: stated[key] for key in ("image_mean", "image_std", "rescale_factor", "resample") if key in stated}
    if kind == "DINOv3ViTImageProcessor":
        common.setdefault("image_mean", list(IMAGENET_DEFAULT_MEAN))
        common.setdefault("image_std", list(IMAGENET_DEFAULT_STD))
        return ViTImageProcessorPil(**common, size=stated.get("size", {"height": 224, "width": 224}))
    if kind == "Siglip2ImageProcessor":
        side = math.isqrt(stated.get("max_num_patches", 256)) * stated.get("patch_size", 16)
        return SiglipImageProcessorPil(**{"resample": 2, **common}, size={"height": side, "width": side})
    return load(options.model, backend="pil", **where)


def find_model(options: ModelOptions) -> bool:
    """Whether the model is a folder or the hub answers; if it does not, only the cache is looked into from here on.

    One request without retries: loading would try for minutes before it says that there is no network.
    """
    name = options.model
    if Path(name).is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model {name}: there is no such folder")
    try:
        HfApi().model_info(name, revision=options.model_revision, timeout=10)
    except RevisionNotFoundError:
        raise UserError(f"model_revision {options.model_revision}: {name} has no such revision") from None
    except (RepositoryNotFoundError, HFValidationError):
        hint = " (did you mean tiny?)" if difflib.get_close_matches(name, ["tiny"]) else "; log in if it is private"
        raise UserError(f"model {name}: no such folder, and no such model on the Hugging Face hub{hint}") from None
    except Exception:  # no network, no name server, a proxy's error page, offline mode
        hub_constants.HF_HUB_OFFLINE = True
        return False
    return True


def input_size(processor: Any) -> int:
    """Side in pixels of what the processor makes of an image."""
    pixels = processor(Image.new("RGB", (640, 480)), return_tensors="np")["pixel_values"][0]
    channels, height, width = pixels.shape
    if channels != 3 or height != width:
        raise UserError(f"the image processor yields {channels} x {height} x {width}; square RGB input is needed")
    return height


def _resized(processor: Any, side: int, name: str) -> Any:
    """Set a processor to another input side, keeping the ratio of its resize to its crop."""
    old = input_size(processor)
    for attribute in ("size", "crop_size"):
        value = getattr(processor, attribute, None)
        if value is not None:
            setattr(processor, attribute, {key: round(pixels * side / old) for key, pixels in dict(value).items()})
    if input_size(processor) != side:
        raise UserError(f"image_size={side}: the image processor of {name} cannot be set to this size")
    return processor


class Transform:
    """PIL images -> float32 tensor (n, 3, side, side), as the model's image processor makes it.

    With `augment`, random crops and flips come first, drawn from `(seed, epoch, index)` alone: the same picture at any
    world size, with any number of workers, and after any restart.
    """

    def __init__(self, processor: Any, augment: DataOptions | None = None, seed: int = 0) -> None:
        self.processor, self.seed = processor, seed
        self.side = input_size(processor)
        self.crop = augment is not None and augment.random_resized_crop
        self.flip = augment is not None and augment.horizontal_flip
        self.min_scale = augment.crop_min_scale if augment is not None else 1.0

    def __call__(self, images: list[Image.Image], places: list[tuple[int, int]]) -> torch.Tensor:
        """`places` are the images' (epoch, index)."""
        if self.crop or self.flip:
            images = [self._augmented(image, *place) for image, place in zip(images, places, strict=True)]
        cropped = {"do_resize": False, "do_center_crop": False} if self.crop else {}
        return torch.from_numpy(np.stack(self.processor(images, return_tensors="np", **cropped)["pixel_values"]))

    def spare(self, epoch: int, index: int, width: int, height: int) -> float:
        """How many times the sides of what is seen there of an image of this size (pixels) exceed the input's."""
        (left, top, right, bottom), _ = self.choose(epoch, index, width, height)
        return min(right - left, bottom - top) / self.side

    def square(self, image: Image.Image, size: tuple[int, int], epoch: int, index: int) -> torch.Tensor:
        """What the processor would rescale and normalise, if it is one that resizes to a square (see `Pixels.of`):
        uint8 (3, side, side).

        The image may have been reduced from `size`; the choice is the same, made for that size, and off by less than
        one pixel of the reduced image.
        """
        box, mirrored = self.choose(epoch, index, *size)
        if image.size != size:
            (left, top, right, bottom), across, down = box, image.width / size[0], image.height / size[1]
            left, top = int(left * across), int(top * down)
            box = left, top, max(left + 1, round(right * across)), max(top + 1, round(bottom * down))
        return _resized_bytes(_cropped(image, box), self.side, self.processor.resample, mirrored)

    def choose(self, epoch: int, index: int, width: int, height: int) -> tuple[Box, bool]:
        """Which part of an image of this size (pixels) is seen there, and whether it is mirrored."""
        if not self.crop and not self.flip:
            return (0, 0, width, height), False
        return _drawn((self.seed, epoch, index), width, height, self.min_scale if self.crop else None, self.flip)

    def _augmented(self, image: Image.Image, epoch: int, index: int) -> Image.Image:
        box, mirrored = self.choose(epoch, index, *image.size)
        if self.crop:
            image = _cropped(image, box).resize((self.side, self.side), Image.Resampling(self.processor.resample))
        return ImageOps.mirror(image) if mirrored else image


@functools.lru_cache(maxsize=1)  # asked twice for a JPEG: for the size that it is decoded at, and to crop it
def _drawn(
    place: tuple[int, int, int], width: int, height: int, min_scale: float | None, flip: bool
) -> tuple[Box, bool]:
    """For (seed, epoch, index); no crop without `min_scale`."""
    random, box = np.random.default_rng(place), (0, 0, width, height)
    if min_scale is not None:
        box = _random_box(random, width, height, min_scale)
    return box, flip and random.random() < 0.5


def _cropped(image: Image.Image, box: Box) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)


def _resized_bytes(image: Image.Image, side: int, resample: int, mirrored: bool) -> torch.Tensor:
    """As Pillow resizes it: uint8 (3, side, side). Bilinear ones that are not large by PyTorch, to one level of 255.

    PyTorch's kernel for bytes takes four of them at once, and so many are a pixel in Pillow's memory too: as three they
    would have to be packed and unpacked. Bicubic overshoots are cut off after the direction that comes first, which is
    not the same for both.
    """
    fast = resample == Image.Resampling.BILINEAR and image.width * image.height <= _FAST
    if not fast:
        image = image.resize((side, side), Image.Resampling(resample))
    pixels = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    made = pixels.view(image.height, image.width, 4)
    if fast:
        made = F.interpolate(made.permute(2, 0, 1)[None], (side, side), mode="bilinear", antialias=True)
        made = made[0].permute(1, 2, 0)
    if mirrored:
        made = made.contiguous().view(torch.int32).flip(1).view(torch.uint8)  # bytes are flipped one by one
    return made.permute(2, 0, 1)[:3]


def _random_box(random: np.random.Generator, width: int, height: int, min_scale: float) -> Box:
    """A crop (left, top, right, bottom) of `min_scale` to all of the area, aspect ratio 3:4 to 4:3, in whole pixels.

    Inception's random resized crop (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, section 6), with
    torchvision's fall-back to the largest centred crop whose aspect ratio is allowed.
    """
    for _ in range(10):
        area = width * height * random.uniform(min_scale, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
