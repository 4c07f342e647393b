"""Which images form each step: global batches that do not depend on how many processes share them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from vit_dist.errors import UserError


class GlobalBatchSampler(Sampler[list[int]]):
    """The micro-batches of one process, cut out of global batches.

    Epoch `e` is a permutation of the images that depends on `(seed, e)` only. It is cut into steps of
    `global_batch = gradient_accumulation * world_size * per_device_batch` images, so that step `s` trains on the same
    images whatever the topology. The last step of an epoch is filled up from the epoch's first images (or dropped):
    every step is full, its loss is the plain mean over the global batch, and shapes never change.

    Yields keys `epoch * num_images + index`: augmentation needs the epoch, and a key reaches any worker process with
    no shared state. The position is the number of micro-batches, so skipping to it decodes nothing.
    """

    def __init__(
        self,
        num_images: int,
        *,
        per_device_batch: int,
        gradient_accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.num_images, self.seed, self.shuffle = num_images, seed, shuffle
        self.rank, self.epoch = rank, 0
        self._shape = (gradient_accumulation, world_size, per_device_batch)
        self.global_batch = gradient_accumulation * world_size * per_device_batch
        self.steps_per_epoch = num_images // self.global_batch if drop_last else -(-num_images // self.global_batch)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"dataloader_drop_last: {num_images} training images do not fill one global batch of "
                f"{self.global_batch}; leave the flag off, or lower --per_device_train_batch_size"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of this process in an epoch."""
        return self.steps_per_epoch * self._shape[0]

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.num_images)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        order = np.resize(order, self.steps_per_epoch * self.global_batch) + self.epoch * self.num_images
        mine = order.reshape(self.steps_per_epoch, *self._shape)[:, :, self.rank]
        yield from mine.reshape(len(self), -1).tolist()
