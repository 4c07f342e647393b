"""Where a batch's pixels are made: by the image processor on the CPU, or out of bytes on the device that trains, which
lie there, in a cache on the disk, or in the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from vit_dist import stop
from vit_dist.data import image_cache
from vit_dist.data.dataset import ByteDataset, ImageDataset
from vit_dist.data.image_cache import CachedDataset
from vit_dist.data.pipeline import ImageData, Progress
from vit_dist.data.pixels import Pixels, to_tensor
from vit_dist.distributed import on_main
from vit_dist.errors import UserError

MOST_BYTES = 8 * 2**30  # of all splits together; CIFAR-10 has 184 MB
MOST_SHARE = 0.25  # of the device's memory
SEVERAL = "images of several sizes"
UNUSUAL = "the model's image processor does more than resize to a square, rescale and normalise"
_BY_WORKERS = 4096  # images from which on decoding is worth its own processes


def place_images(
    data: ImageData,
    source: str,
    device: torch.device,
    workers: int,
    *,
    cache_dir: str | None = None,
    epochs: float = 1.0,
    progress: Progress = lambda title: lambda done, total: None,
) -> tuple[ImageData, Pixels | None, str]:
    """The same data for `--image_source`, what makes the model's input of its batches, and the source that was chosen.

    No Pixels: batches have the model's input already. Raises UserError if what was asked for cannot be. All ranks take
    part. `workers` are processes that may decode; `epochs` of training are what a cache has to pay in.
    """
    on_gpu = device.type == "cuda"
    pixels = pixels_of(data.processor, source, on_gpu)
    if pixels is None:
        note = "images made by the model's image processor"
        if source == "auto" and on_gpu:
            note = f"images made by the processor on the CPU: {UNUSUAL}"
        return _with(data, _splits(data), note), None, "processor"
    pixels.to(device)
    against = []
    if source in ("auto", "resident"):
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
        refused = _kept(data, memory)[1]
        sets = _resident(data, device, workers) if not refused else None
        if sets is not None:
            size = sum(dataset.images.numel() for dataset in sets.values())
            note = f"images resident on {device}, {size / 1e6:,.0f} MB of bytes: no data loading"
            return _with(data, sets, note), pixels, "resident"
        if source == "resident":
            raise _refused(source, refused or SEVERAL)
        against.append(f"not resident: {refused or SEVERAL}")
    if source == "cache":
        kept, note = _cached(data, cache_dir, progress)
        return _with(data, kept, note), pixels, "cache"
    if source == "auto":
        # Not chosen by itself: its crops are others, and a recipe should not have two curves (docs/decisions.md).
        refused = on_main(lambda: _against_cache(data, cache_dir, epochs))
        against.append(f"not cached: {refused}" if refused else "--image_source cache would decode them only once")
    note = "images streamed as bytes, normalised on the device" + (f" ({'; '.join(against)})" if against else "")
    streamed = {
        split: ByteDataset(dataset.table, dataset.transform, dataset.rules) for split, dataset in _splits(data).items()
    }
    return _with(data, streamed, note), pixels, "stream"


def pixels_of(processor: Any, source: str, on_gpu: bool) -> Pixels | None:
    """What makes the model's input of bytes with that `--image_source`; None if the processor makes it, in float32.

    Raises UserError if bytes were asked for and the processor does more than can be done with them.
    """
    if source == "processor" or (source == "auto" and not on_gpu):
        return None
    pixels = Pixels.of(processor)
    if pixels is None and source != "auto":
        raise _refused(source, UNUSUAL)
    return pixels


class ResidentDataset(ImageDataset):
    """A split whose images lie on the device as bytes: uint8 (images, 3, height, width), all of one size.

    Of a batch `pixel_values` are uint8 as they lie there; it also has `boxes` and `mirrored` (see `Pixels`). Nothing in
    it waits for the device.
    """

    def __init__(self, dataset: ImageDataset, images: torch.Tensor) -> None:
        super().__init__(dataset.table, dataset.transform, dataset.rules)
        self.images = images
        self._labels = torch.tensor(self.table["label"], device=images.device)

    def __getitems__(self, keys: list[int]) -> dict[str, torch.Tensor]:
        places = [divmod(key, len(self)) for key in keys]
        height, width = self.images.shape[2:]
        chosen = [self.transform.choose(epoch, index, width, height) for epoch, index in places]
        rows = torch.tensor(
            [[index, mirrored, *box] for (_, index), (box, mirrored) in zip(places, chosen, strict=True)],
            dtype=torch.float64,
        )
        if self.images.device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(self.images.device, non_blocking=True)
        index = rows[:, 0].long()
        return {
            "pixel_values": self.images[index],
            "boxes": rows[:, 2:].float(),
            "mirrored": rows[:, 1] > 0,
            "labels": self._labels[index],
            "index": index,
        }


def _splits(data: ImageData) -> dict[str, ImageDataset]:
    sets = {"train": data.train, "validation": data.validation, "test": data.test}
    return {split: dataset for split, dataset in sets.items() if dataset is not None}


def _with(data: ImageData, sets: Mapping[str, ImageDataset], note: str) -> ImageData:
    description = [*data.description, note]
    return dataclasses.replace(
        data, train=sets["train"], validation=sets["validation"], test=sets.get("test"), description=description
    )


def resident_bytes(data: ImageData, source: str, memory: float | None) -> int:
    """What a GPU with so many bytes of memory (None: not known) keeps of the images with that `--image_source`.

    Raises UserError where `place_images` would.
    """
    if pixels_of(data.processor, source, on_gpu=True) is None or source not in ("auto", "resident"):
        return 0
    try:
        kept, reason = _kept(data, memory)
    except RuntimeError:  # one that does not decode, which training finds and names
        return 0
    if reason and source == "resident":
        raise _refused(source, reason)
    return kept


def _refused(source: str, reason: str) -> UserError:
    others = "auto or processor" if reason == UNUSUAL else "stream or cache"
    return UserError(f"image_source={source}: {reason}; use {others}")


def _kept(data: ImageData, memory: float | None) -> tuple[int, str]:
    """Bytes of all images, or 0 and why they cannot be resident, as far as their number and the first ones say."""
    sizes, needed = set(), 0
    for dataset in _splits(data).values():
        first = [dataset.decoded(index).size for index in range(min(4, len(dataset)))]
        sizes |= set(first)
        needed += 3 * len(dataset) * first[0][0] * first[0][1]
    if len(sizes) > 1:
        return 0, SEVERAL
    most = MOST_BYTES if memory is None else min(MOST_SHARE * memory, MOST_BYTES)
    if needed > most:
        return 0, f"{needed / 2**30:,.1f} GiB of bytes, at most {most / 2**30:,.1f} are kept"
    return needed, ""


def _cached(data: ImageData, cache_dir: str | None, progress: Progress) -> tuple[dict[str, CachedDataset], str]:
    """Every split out of its cache, which is built where it is not there; what there is to say of them."""
    sets = {
        split: image_cache.cached(
            dataset,
            image_cache.cache_of(dataset, cache_dir),
            f"{split}: {data.description[0].partition(';')[0]}",
            progress(split),
        )
        for split, dataset in _splits(data).items()
    }
    kept = [contents for dataset in sets.values() if (contents := image_cache.about(dataset.folder)) is not None]
    return sets, (
        f"images decoded and shrunk to {image_cache.shortest(data.train)} pixels once, "
        f"{sum(contents.bytes for contents in kept) / 1e6:,.0f} MB in {sets['train'].folder.parent}; streamed from "
        "there, normalised on the device"
    )


def _against_cache(data: ImageData, cache_dir: str | None, epochs: float) -> str:
    """Why a cache would not pay; empty if it would."""
    estimates = {split: image_cache.estimate(dataset) for split, dataset in _splits(data).items()}
    folders = {split: image_cache.cache_of(dataset, cache_dir) for split, dataset in _splits(data).items()}
    missing = sum(estimates[split].bytes for split, folder in folders.items() if image_cache.about(folder) is None)
    return image_cache.reason_against(list(estimates.values()), epochs, image_cache.room(folders["train"]), missing)


class _Decoded(torch.utils.data.Dataset):
    """Rows as bytes (3, height, width)."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_tensor(self.dataset.decoded(index))


def _resident(data: ImageData, device: torch.device, workers: int) -> dict[str, ResidentDataset] | None:
    """Every split on the device, or None if its images are not of one size."""
    held = {split: _decoded(dataset, workers) for split, dataset in _splits(data).items()}
    sets = {
        split: ResidentDataset(dataset, images.to(device))
        for split, dataset in _splits(data).items()
        if (images := held[split]) is not None
    }
    return sets if len(sets) == len(held) else None


def _stacked(images: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(images) if len({image.shape for image in images}) == 1 else None


def _decoded(dataset: ImageDataset, workers: int) -> torch.Tensor | None:
    """All images of a split, or None if they are not of one size."""
    many = len(dataset) >= _BY_WORKERS
    loader = DataLoader(
        _Decoded(dataset),
        256,
        collate_fn=_stacked,
        num_workers=workers if many else 0,
        worker_init_fn=stop.ignore_signals,
    )
    held, begin = torch.empty(0), 0
    for images in loader:
        if images is None or (begin and images.shape[1:] != held.shape[1:]):
            return None
        if not begin:
            held = torch.empty((len(dataset), *images.shape[1:]), dtype=torch.uint8)
        held[begin : begin + len(images)] = images
        begin += len(images)
    return held
