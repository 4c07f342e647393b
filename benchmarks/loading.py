"""How many images a second one process makes ready, by where they come from: what a data loading process does.

    python benchmarks/loading.py PHOTOS OUT.json [--side 224]

PHOTOS is a class folder. Batches of 32 with crops and mirroring, seconds of the CPU and not of the clock, turn by turn.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import record
from transformers import ViTImageProcessorPil

from vit_dist.data.pipeline import build_data
from vit_dist.data.resident import place_images
from vit_dist.options import DataOptions, ModelOptions

SOURCES, BATCH, TURNS, SECONDS = ("processor", "stream", "cache"), 32, 6, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out")
    parser.add_argument("--side", type=int, default=224)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {source: [] for source in SOURCES}
    with tempfile.TemporaryDirectory() as root:
        ViTImageProcessorPil(size={"height": given.side, "width": given.side}).save_pretrained(root)
        options = DataOptions(data=str(given.photos.resolve()), verify_images=False, cache_dir=f"{root}/cache")
        model = ModelOptions(model="tiny", image_size=given.side)
        data = build_data(options, model, 0, lambda title: lambda done, total: None)
        sizes = [data.train.decoded(index).size for index in range(min(50, len(data.train)))]
        sets = {
            source: place_images(data, source, torch.device("cpu"), 0, cache_dir=options.cache_dir)[0].train
            for source in SOURCES
        }
        keys = {source: itertools.count(0, BATCH) for source in SOURCES}
        for _ in range(TURNS):
            for source, dataset in sets.items():
                begin, seen = time.process_time(), 0
                while time.process_time() - begin < SECONDS:
                    first = next(keys[source])
                    dataset.__getitems__(list(range(first, first + BATCH)))
                    seen += BATCH
                rates[source].append(seen / (time.process_time() - begin))
    medians = {source: statistics.median(values) for source, values in rates.items()}
    record(
        __file__, given.out, ("torch", "transformers", "pillow", "datasets"), side=given.side,
        photos={"data": given.photos.name, "median_size": np.median(sizes, axis=0).tolist()},
        images_per_cpu_second=rates, medians=medians,
    )  # fmt: skip


if __name__ == "__main__":
    main()
