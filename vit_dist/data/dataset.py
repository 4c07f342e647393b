"""Rows of a split as the model takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from vit_dist.data.decode import BadImage, DecodeRules, decode_reduced
from vit_dist.data.transforms import Transform


class ImageDataset(torch.utils.data.Dataset):
    """A split (columns `id`, `image`, `label`), decoded and transformed.

    Item `key` is row `key % len(self)` as seen in epoch `key // len(self)` (see `GlobalBatchSampler`):
    `pixel_values` (3, side, side) float32, `labels` int, `index` int.
    """

    def __init__(self, table: datasets.Dataset, transform: Transform, rules: DecodeRules) -> None:
        self.table, self.transform, self.rules = table, transform, rules

    def __len__(self) -> int:
        return len(self.table)

    @property
    def ids(self) -> Sequence[str]:
        """A name for each row: its path within the data, or file and row number."""
        return self.table["id"]

    def __getitem__(self, key: int) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        """The items of a batch; PyTorch's loader asks for them together, and upstream's processor is slow per call."""
        places = [divmod(key, len(self)) for key in keys]
        rows = self.table[[index for _, index in places]]
        pixels = self._pixels(rows, places)
        return [
            {"pixel_values": values, "labels": label, "index": index}
            for values, label, (_, index) in zip(pixels, rows["label"], places, strict=True)
        ]

    def decoded(self, index: int) -> Image.Image:
        """Row `index` before crops and resizing."""
        return self.reduced(index, lambda width, height: 1)[0]

    def reduced(self, index: int, spare: Callable[[int, int], float]) -> tuple[Image.Image, tuple[int, int]]:
        """The same as `decode_reduced` has it."""
        row = self.table[index]
        return self._decode(row["image"], row["id"], index, spare)

    def _pixels(self, rows: dict[str, Any], places: list[tuple[int, int]]) -> torch.Tensor:
        """(n, 3, side, side) of columns `id` and `image`, seen at these (epoch, index)."""
        images = [
            self._decode(image, row_id, index, lambda width, height: 1)[0]
            for image, row_id, (_, index) in zip(rows["image"], rows["id"], places, strict=True)
        ]
        return self.transform(images, places)

    def _decode(
        self, image: Any, row_id: str, index: int, spare: Callable[[int, int], float]
    ) -> tuple[Image.Image, tuple[int, int]]:
        try:
            return decode_reduced(image, self.rules, spare)
        except BadImage as error:
            raise RuntimeError(f"image {row_id} (row {index}) does not decode: {error}") from error


class ByteDataset(ImageDataset):
    """The same with `pixel_values` as uint8, not yet rescaled and normalised. Images are decoded no larger than what is
    seen of them needs: they differ a little from those of the image processor.

    `__getitems__` is a batch already.
    """

    def __getitem__(self, key: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[int]) -> Any:
        places = [divmod(key, len(self)) for key in keys]
        rows = self.table[[index for _, index in places]]
        pixels = np.empty((len(keys), 3, self.transform.side, self.transform.side), np.uint8)
        for number, (image, size) in enumerate(self._found(rows, places)):
            # Each at once, while it is in the core's cache; NumPy copies such views twice as fast as PyTorch.
            pixels[number] = self.transform.square(image, size, *places[number]).numpy()
        return {
            "pixel_values": torch.from_numpy(pixels),
            "labels": torch.tensor(rows["label"]),
            "index": torch.tensor([index for _, index in places]),
        }

    def decoded(self, index: int) -> Image.Image:
        return self.reduced(index, lambda width, height: min(width, height) / self.transform.side)[0]

    def _found(
        self, rows: dict[str, Any], places: list[tuple[int, int]]
    ) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
        """Images, which may be reduced, and their sizes before."""
        for image, row_id, place in zip(rows["image"], rows["id"], places, strict=True):
            yield self._decode(image, row_id, place[1], partial(self.transform.spare, *place))


def collate(items: list[dict[str, Any]] | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Items to a batch: `pixel_values` (n, 3, side, side), `labels` and `index` int64 (n,). A batch stays one."""
    if isinstance(items, dict):
        return items
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
        "index": torch.tensor([item["index"] for item in items]),
    }
