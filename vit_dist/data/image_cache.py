"""Images decoded and shrunk once, kept as bytes in a file that all processes of a node and all later runs read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from vit_dist.data.cache import cache_folder, locked
from vit_dist.data.dataset import ByteDataset, ImageDataset
from vit_dist.data.decode import stored_size
from vit_dist.data.verify import decoding_key
from vit_dist.environment import job_cores
from vit_dist.errors import UserError
from vit_dist.files import remove, sha256, sync_folder, sync_tree

FORMAT = 2  # part of the key: count up when what is kept changes
MARGIN = 1.15  # how much longer than the model's input the shorter side is at most
GAIN = 2.0  # pixels before / pixels kept, from where on a cache is worth its building and its bytes
SAMPLE = 64  # images by which the others are judged
_CHUNK = 16  # images that a thread makes at once
# In the folder of a cache, which is there whole or not at all:
PIXELS, INDEX, ABOUT = "pixels", "index.npy", "about.json"  # bytes; (offset, width, height) of each image; About


@dataclass(frozen=True)
class About:
    """What a cache holds; `side` and `shortest` in pixels."""

    data: str
    images: int
    side: int  # of the model's input
    shortest: int  # at most, of an image's sides
    bytes: int
    index_sha256: str  # of the file that says where each image lies


@dataclass(frozen=True)
class Estimate:
    """What the images of a split have and would have, judged by a sample; per image."""

    pixels: float
    pixels_kept: float
    images: int

    @property
    def bytes(self) -> int:
        """Of all images."""
        return round(3 * self.pixels_kept * self.images)


class CachedDataset(ByteDataset):
    """A split whose rows come from a cache: crops and mirroring are of the shrunk images, and drawn for their size."""

    def __init__(self, dataset: ImageDataset, folder: Path) -> None:
        table = dataset.table.remove_columns("image") if "image" in dataset.table.column_names else dataset.table
        super().__init__(table, dataset.transform, dataset.rules)
        self._source = dataset
        self.folder, self._index = folder, np.load(folder / INDEX)
        self._pixels_on_disk: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A map would be sent to a worker as all of its bytes; workers need no paths.
        return {**self.__dict__, "_pixels_on_disk": None, "_source": None}

    @property
    def paths(self) -> pa.ChunkedArray:
        return self._source.paths

    def decoded(self, index: int) -> Image.Image:
        if self._pixels_on_disk is None:
            self._pixels_on_disk = np.memmap(self.folder / PIXELS, np.uint8, "r")
        offset, width, height = map(int, self._index[index])
        pixels = self._pixels_on_disk[offset : offset + 3 * width * height]
        return Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)

    def _found(
        self, rows: dict[str, Any], places: list[tuple[int, int]]
    ) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
        for _, index in places:
            image = self.decoded(index)
            yield image, image.size


def cache_of(dataset: ImageDataset, cache_dir: str | None) -> Path:
    """The folder of a split's cache, whether it is there or not.

    Changes with the images (for files: size and change time), the rules, the decoder and the model's input.
    """
    key = decoding_key(dataset.table, dataset.rules, FORMAT, shortest(dataset))
    return cache_folder(cache_dir) / f"images-{key}"


def shortest(dataset: ImageDataset) -> int:
    """How long the shorter side of a kept image is at most, in pixels."""
    return int(MARGIN * dataset.transform.side)


def about(folder: Path) -> About | None:
    """What a cache holds; None if there is none, or none that is whole."""
    try:
        found = About(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
        whole = (folder / PIXELS).stat().st_size == found.bytes and _digest(folder / INDEX) == found.index_sha256
    except (OSError, ValueError, TypeError):
        return None
    return found if whole else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return sha256(file)


def cached(
    dataset: ImageDataset, folder: Path, data: str, progress: Callable[[int, int], None] | None = None
) -> CachedDataset:
    """The split out of its cache, which is built if it is not there, by one process while others wait for it.

    `data` describes the images for `vit-dist cache --list`; `progress(done, total)` is called in the process that
    builds. A kill at any moment leaves nothing that passes for a cache. Raises UserError if the disk has no room,
    RuntimeError for an image that does not decode.
    """
    if about(folder) is None:
        with locked(folder):
            if about(folder) is None:
                _build(dataset, folder, data, progress)
    with contextlib.suppress(OSError):  # somebody else's
        os.utime(folder / ABOUT)  # last used
    return CachedDataset(dataset, folder)


def estimate(dataset: ImageDataset) -> Estimate:
    """By the headers of a few images, spread evenly."""
    chosen = dataset.table[np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).astype(int).tolist()]
    sizes = [size for image in chosen["image"] if (size := stored_size(image)) is not None]
    kept = [_kept_size(size, shortest(dataset)) for size in sizes]
    before, after = (np.mean([w * h for w, h in some] or [0]).item() for some in (sizes, kept))
    return Estimate(before, after, len(dataset))


def reason_against(estimates: Sequence[Estimate], epochs: float, free: int, missing: int) -> str:
    """Why a cache does not pay, empty if it does. `estimates`: of the splits, train first; `free` bytes on the disk,
    `missing` bytes that are to be built.
    """
    train = estimates[0]
    if epochs <= 1:
        return "no more than one epoch is trained"
    if train.pixels < GAIN * train.pixels_kept:
        return f"images have {train.pixels / max(train.pixels_kept, 1):.1f} x the pixels that a cache keeps of them"
    if free < 2 * missing:
        return f"a cache takes {missing / 1e9:,.1f} GB, {free / 1e9:,.1f} are free, twice as many are wanted"
    return ""


def room(folder: Path) -> int:
    """Free bytes on the disk of the caches."""
    return shutil.disk_usage(folder.parent).free


def caches(cache_dir: str | None) -> dict[str, tuple[Path, About, float]]:
    """All that are whole, by key: folder, contents, when it was last used (seconds since 1970); the latest first."""
    found = {}
    for folder in cache_folder(cache_dir).glob("images-*/"):
        if (contents := about(folder)) is not None:
            found[folder.name.removeprefix("images-")] = (folder, contents, (folder / ABOUT).stat().st_mtime)
    return dict(sorted(found.items(), key=lambda item: -item[1][2]))


def remove_cache(folder: Path) -> None:
    """Not while it is being built. Processes that have it open keep it until they end."""
    with locked(folder):
        remove(folder)


def _kept_size(size: tuple[int, int], most: int) -> tuple[int, int]:
    by = max(1.0, min(size) / most)
    return max(1, round(size[0] / by)), max(1, round(size[1] / by))


def _shrunk(dataset: ImageDataset, index: int, most: int) -> Image.Image:
    image, before = dataset.reduced(index, lambda width, height: min(width, height) / most)
    size = _kept_size(before, most)
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def _build(dataset: ImageDataset, folder: Path, data: str, progress: Callable[[int, int], None] | None) -> None:
    """The lock is held."""
    partial = folder.with_name(f".{folder.name}.partial")
    remove(partial)  # of a builder that was killed
    remove(folder)  # damaged
    needed = estimate(dataset).bytes
    problem = f"the image cache of {len(dataset):,} images in {folder.parent} takes about {needed:,} bytes"
    cure = "free some, or choose another --cache_dir or --image_source stream"
    if room(folder) < needed:
        raise UserError(f"{problem}, and {room(folder):,} are free: {cure}")
    try:
        partial.mkdir()
        index, begin = np.empty((len(dataset), 3), np.int64), 0
        with (partial / PIXELS).open("wb") as file:
            for number, image in enumerate(_all_shrunk(dataset, shortest(dataset))):
                index[number] = begin, *image.size
                begin += file.write(image.tobytes())
                if progress is not None and (number + 1) % _CHUNK == 0:
                    progress(number + 1, len(dataset))
        np.save(partial / INDEX, index)
        digest = _digest(partial / INDEX)
        contents = About(data, len(dataset), dataset.transform.side, shortest(dataset), begin, digest)
        (partial / ABOUT).write_text(json.dumps(asdict(contents)), encoding="utf-8")
        sync_tree(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"{problem} and cannot be written ({error.strerror or error}): {cure}") from error
    finally:
        remove(partial)


def _all_shrunk(dataset: ImageDataset, most: int) -> Iterator[Image.Image]:
    """In order, made by a thread for each core; a few chunks ahead of who takes them."""

    def make(begin: int) -> list[Image.Image]:
        return [_shrunk(dataset, index, most) for index in range(begin, min(begin + _CHUNK, len(dataset)))]

    workers = job_cores()
    ahead: deque[Future[list[Image.Image]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for begin in range(0, len(dataset), _CHUNK):
            ahead.append(pool.submit(make, begin))
            if len(ahead) > 2 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
