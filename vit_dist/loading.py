"""How many processes load data for a device: as many as it can take the images of."""

from __future__ import annotations

import math
import time

import numpy as np

from vit_dist.data.dataset import ImageDataset

SAMPLE = 64  # images that are timed; a tenth of a second of photos
OF_PEAK = 0.6  # of the matrix products' peak: nothing is faster


def workers_needed(seconds: float, images_per_second: float, most: int) -> int:
    """Processes that hand over `images_per_second` if one takes `seconds` for an image; 1 to `most`."""
    return max(1, min(most, math.ceil(seconds * images_per_second)))


def seconds_per_image(dataset: ImageDataset) -> float:
    """That one process takes for an image of a batch, read from the disk; of all classes, which may differ in size."""
    count = min(SAMPLE, len(dataset))
    dataset.__getitems__([0])  # imports
    begin = time.perf_counter()
    dataset.__getitems__(np.linspace(0, len(dataset) - 1, count).astype(int).tolist())
    return (time.perf_counter() - begin) / count


def images_per_second(flop: float, peak: float) -> float:
    """More than a device takes, with `peak` FLOP/s in matrix products, of images that need `flop` operations."""
    return OF_PEAK * peak / flop
