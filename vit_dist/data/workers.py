"""How many processes load data for a device: as many as it can take the images of."""

from __future__ import annotations

import math
import time

import numpy as np

from vit_dist.data.dataset import ImageDataset

SAMPLE = 64  # images that are timed; a tenth of a second of photos
OF_PEAK = 0.6  # of the matrix products' peak: nothing is faster


def choose_workers(dataset: ImageDataset, flop: float, peak: float, most: int) -> tuple[int, str]:
    """Processes, at most `most`, and what to say of them.

    `flop`: operations that an image takes in an evaluation, which takes three times the images of training; `peak`: of
    the device in matrix products, FLOP/s.
    """
    seconds, taken = seconds_per_image(dataset), OF_PEAK * peak / flop
    workers = workers_needed(seconds, taken, most)
    return (
        workers,
        f"{workers} data loading processes: {seconds * 1e3:.1f} ms an image, the GPU may take {taken:,.0f}/s",
    )


def workers_needed(seconds: float, images_per_second: float, most: int) -> int:
    """Processes that hand over `images_per_second` if one takes `seconds` for an image; 1 to `most`, 0 if that is 0."""
    return min(most, max(1, math.ceil(seconds * images_per_second)))


def seconds_per_image(dataset: ImageDataset) -> float:
    """That one process takes for an image of a batch, read from the disk; of all classes, which may differ in size."""
    count = min(SAMPLE, len(dataset))
    dataset.__getitems__([0])  # imports
    begin = time.perf_counter()
    dataset.__getitems__(np.linspace(0, len(dataset) - 1, count).astype(int).tolist())
    return (time.perf_counter() - begin) / count
