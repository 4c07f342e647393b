"""How many processes load data for a device: as many as it can take the images of."""

from __future__ import annotations

import math
import time

import torch

from vit_dist.data.dataset import ImageDataset

SAMPLE = 64  # images that are timed; a tenth of a second of photos
OF_PEAK = 0.6  # of the matrix products' peak: no step is faster
SPARE = 2.0  # times as much, because two cores that share a unit are not twice as fast as one


def workers_needed(seconds: float, images_per_second: float, most: int) -> int:
    """Processes that hand over `images_per_second` if one takes `seconds` for an image; 1 to `most`."""
    return max(1, min(most, math.ceil(SPARE * seconds * images_per_second)))


def seconds_per_image(dataset: ImageDataset) -> float:
    """That one process takes for an image of a batch, the first ones read from the disk included."""
    threads, count = torch.get_num_threads(), min(SAMPLE, len(dataset))
    torch.set_num_threads(1)  # as in a data loading process
    try:
        dataset.__getitems__([0])  # imports
        begin = time.perf_counter()
        dataset.__getitems__(list(range(count)))
        return (time.perf_counter() - begin) / count
    finally:
        torch.set_num_threads(threads)


def images_per_second(flop: float, peak: float) -> float:
    """More than a device trains on, with `peak` FLOP/s in matrix products, of images that take `flop` operations."""
    return OF_PEAK * peak / flop
