"""How many processes load data."""

from __future__ import annotations

import pytest
import torch

from vit_dist.data.pipeline import build_data
from vit_dist.data.resident import place_images
from vit_dist.data.workers import OF_PEAK, choose_workers, seconds_per_image, workers_needed
from vit_dist.options import DataOptions, ModelOptions


@pytest.mark.parametrize(
    ("milliseconds", "flop", "most", "workers"),
    [
        (2.0, 33e9, 64, 30),  # ViT-B/16 at 224 pixels on an H100: 14,545 a second at most are evaluated
        (2.0, 33e9, 15, 15),
        (2.0, 400e9, 32, 3),  # a large model
        (0.01, 400e9, 32, 1),
        (2.0, 1e6, 16, 16),  # a tiny one
    ],
)
def test_workers_follow_from_the_images_and_the_device(
    milliseconds: float, flop: float, most: int, workers: int
) -> None:
    assert workers_needed(milliseconds / 1e3, OF_PEAK * 800e12 / flop, most) == workers


@pytest.mark.parametrize("source", ["processor", "stream"])
def test_images_of_the_whole_split_are_timed(source: str) -> None:
    options = DataOptions(max_train_samples=80, max_eval_samples=20, max_predict_samples=20)
    data = build_data(options, ModelOptions(model="tiny"), 0, lambda title: lambda done, total: None)
    placed, _, _ = place_images(data, source, torch.device("cpu"), 0)
    asked, seen = [], type(placed.train).__getitems__

    class Noting(type(placed.train)):
        def __getitems__(self, keys):
            asked.append((len(keys), keys[-1]))
            return seen(self, keys)

    placed.train.__class__ = Noting
    assert 0 < seconds_per_image(placed.train) < 1
    assert asked == [(1, 0), (64, 79)]
    workers, note = choose_workers(placed.train, 1e6, 800e12, 3)
    assert (
        workers == 3
        and note.startswith("3 data loading processes: ")
        and note.endswith("the GPU may take 480,000,000/s")
    )
    assert choose_workers(placed.train, 1e6, 800e12, 0)[0] == 0
