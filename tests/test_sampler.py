from __future__ import annotations

import numpy as np
import pytest

from vit_dist.data.sampler import GlobalBatchSampler
from vit_dist.errors import UserError


def steps(
    num_images: int, epoch: int, per_device: int, world: int, accumulation: int, **kwargs: bool
) -> list[list[int]]:
    """The images of each step of an epoch, over all ranks, in order."""
    ranks = [
        GlobalBatchSampler(
            num_images, per_device_batch=per_device, gradient_accumulation=accumulation, world_size=world, rank=rank,
            seed=3, **kwargs,
        )
        for rank in range(world)
    ]  # fmt: skip
    for sampler in ranks:
        sampler.set_epoch(epoch)
    micro = [list(sampler) for sampler in ranks]
    assert all(len(batches) == len(ranks[0]) and len(b) == per_device for batches in micro for b in batches)
    flat = [[key for rank in micro for key in rank[i]] for i in range(len(ranks[0]))]
    return [[key for part in flat[i : i + accumulation] for key in part] for i in range(0, len(flat), accumulation)]


@pytest.mark.parametrize("topology", [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (2, 4, 1), (1, 8, 1)])
def test_topologies_train_on_the_same_images_in_the_same_order(topology: tuple[int, int, int]) -> None:
    assert steps(37, 2, *topology) == steps(37, 2, 8, 1, 1)


def test_epoch_has_every_image_and_full_batches() -> None:
    epoch = steps(37, 1, 4, 2, 1)
    keys = np.concatenate(epoch)
    assert [len(step) for step in epoch] == [8] * 5
    assert set(keys) == set(range(37, 74)), "keys carry the epoch: epoch * 37 + index"
    assert list(keys[37:]) == list(keys[:3]), "filled up from the epoch's first images"


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first, second = (np.concatenate(steps(37, epoch, 8, 1, 1)) % 37 for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, np.concatenate(steps(37, 0, 8, 1, 1)) % 37)


def test_drop_last_and_sequential() -> None:
    assert steps(37, 0, 8, 1, 1, drop_last=True, shuffle=False) == np.arange(32).reshape(4, 8).tolist()


def test_fewer_images_than_a_global_batch() -> None:
    assert sorted(steps(3, 0, 4, 2, 1)[0]) == [0, 0, 0, 1, 1, 1, 2, 2] or len(steps(3, 0, 4, 2, 1)[0]) == 8
    with pytest.raises(UserError, match="3 training images do not fill one global batch of 8"):
        steps(3, 0, 4, 2, 1, drop_last=True)
