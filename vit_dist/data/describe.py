"""The lines about classes and sizes of images that show at a glance whether the data are what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np

from vit_dist.data.decode import stored_size
from vit_dist.data.split import labels_of
from vit_dist.data.verify import Seen
from vit_dist.listing import listed, shortened

_SAMPLE = 1000  # images whose headers are read
_THREADS = 16  # network file systems answer many questions at once
_LONGEST_NAME = 30


def class_lines(train: datasets.Dataset, classes: Sequence[str]) -> list[str]:
    """The first classes with the numbers of their training images, the smallest and the largest."""
    counts = np.bincount(labels_of(train), minlength=len(classes))
    shown = [f"{shortened(name, _LONGEST_NAME)} {count:,}" for name, count in zip(classes, counts, strict=True)]
    line = f"images by class in train: {listed(shown, room=140)}"
    small, large = int(counts.argmin()), int(counts.argmax())
    extremes = [f"{shortened(classes[place], _LONGEST_NAME)} {counts[place]:,}" for place in (small, large)]
    if counts[small] == counts[large]:
        return [line, f"every class has {counts[small]:,}"]
    return [line, f"smallest class: {extremes[0]}; largest: {extremes[1]}"]


def size_line(seen: Seen, total: int) -> str:
    """The range of the sizes of images, and of how many it is known."""
    if not seen.images:
        return "image sizes: not known, no header could be read"
    if (seen.narrowest, seen.lowest) == (seen.widest, seen.highest):
        sizes = f"all {seen.narrowest} x {seen.lowest}"
    else:
        sizes = f"{seen.narrowest:,} to {seen.widest:,} x {seen.lowest:,} to {seen.highest:,}"
    of = f"all {total:,}" if seen.images >= total else f"{seen.images:,} of {total:,}"
    return f"image sizes (width x height): {sizes} pixels, by {of} images"


def sample_sizes(tables: Sequence[datasets.Dataset]) -> Seen:
    """Sizes by the headers of at most 1,000 images, the same number of each class as far as they go."""
    seen = Seen()
    each = max(1, _SAMPLE // len(tables))
    for table in tables:
        chosen = table[_spread(labels_of(table), each).tolist()]["image"]
        with ThreadPoolExecutor(_THREADS) as pool:
            for size in pool.map(stored_size, chosen):
                if size is not None:
                    seen.add(Seen(1, size[0], size[0], size[1], size[1]))
    return seen


def _spread(labels: np.ndarray, most: int) -> np.ndarray:
    """Rows that take turns among the classes: the first of each, then the second of each, ..."""
    if len(labels) <= most:
        return np.arange(len(labels))
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    turn = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    picked = order[np.argsort(turn, kind="stable")]
    num_first = int((turn == 0).sum())
    if num_first > most:  # more classes than may be looked at: evenly among them
        return np.sort(picked[np.linspace(0, num_first - 1, most).astype(int)])
    return np.sort(picked[:most])
