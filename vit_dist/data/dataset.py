"""Rows of a split as the model takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from vit_dist.data.decode import BadImage, DecodeRules, decode_downscaled
from vit_dist.data.transforms import Transform


class ImageDataset(torch.utils.data.Dataset):
    """A split (columns `id`, `image`, `label`), decoded and transformed.

    Item `key` is row `key % len(self)` as seen in epoch `key // len(self)` (see `GlobalBatchSampler`). PyTorch's loader
    asks for all items of a batch together, and gets a batch: `pixel_values` (n, 3, side, side) float32, `labels` and
    `index` int64 (n,).
    """

    def __init__(self, table: datasets.Dataset, transform: Transform, rules: DecodeRules) -> None:
        self.table, self.transform, self.rules = table, transform, rules

    def __len__(self) -> int:
        return len(self.table)

    @property
    def ids(self) -> Sequence[str]:
        """A name for each row: its path within the data, or file and row number."""
        return self.table["id"]

    @property
    def paths(self) -> pa.ChunkedArray:
        """The file of each row, an absolute path; null for an image in a table."""
        images = self.table.select_columns(["image"]).with_format("arrow")[:]["image"]
        return pc.if_else(pc.is_null(pc.struct_field(images, "bytes")), pc.struct_field(images, "path"), None)

    def __getitem__(self, key: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[int]) -> dict[str, torch.Tensor]:
        places = [divmod(key, len(self)) for key in keys]
        rows = self.table[[index for _, index in places]]
        return {
            "pixel_values": self._pixels(rows, places),
            "labels": torch.tensor(rows["label"]),
            "index": torch.tensor([index for _, index in places]),
        }

    def decoded(self, index: int) -> Image.Image:
        """Row `index` before crops and resizing."""
        return self.reduced(index, lambda width, height: 1)[0]

    def reduced(self, index: int, spare: Callable[[int, int], float]) -> tuple[Image.Image, tuple[int, int]]:
        """The same as `decode_downscaled` has it."""
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
            return decode_downscaled(image, self.rules, spare)
        except BadImage as error:
            raise RuntimeError(f"image {row_id} (row {index}) does not decode: {error}") from error


class ByteDataset(ImageDataset):
    """The same with `pixel_values` as uint8, not yet rescaled and normalised. Images are decoded no larger than what is
    seen of them needs: they differ a little from those of the image processor.
    """

    def decoded(self, index: int) -> Image.Image:
        return self.reduced(index, lambda width, height: min(width, height) / self.transform.side)[0]

    def _pixels(self, rows: dict[str, Any], places: list[tuple[int, int]]) -> torch.Tensor:
        pixels = np.empty((len(places), 3, self.transform.side, self.transform.side), np.uint8)
        for number, (image, size) in enumerate(self._found(rows, places)):
            # Each at once, while it is in the core's cache; NumPy copies such views twice as fast as PyTorch.
            pixels[number] = self.transform.square(image, size, *places[number]).numpy()
        return torch.from_numpy(pixels)

    def _found(
        self, rows: dict[str, Any], places: list[tuple[int, int]]
    ) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
        """Images, which may be reduced, and their sizes before."""
        for image, row_id, place in zip(rows["image"], rows["id"], places, strict=True):
            yield self._decode(image, row_id, place[1], partial(self.transform.spare, *place))


def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For loaders, which want a function that makes a batch of items: a data set gives batches already."""
    return batch
