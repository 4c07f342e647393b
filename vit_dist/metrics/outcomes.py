"""What becomes of each evaluated image: a few numbers, made on the device, instead of its logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class SampleMetrics:
    """One entry for each image, in order."""

    labels: np.ndarray  # int64: the true class
    predicted: np.ndarray  # int64: the class with the largest logit; of equal ones the first, as in `numpy.argmax`
    places: np.ndarray  # int64: how many classes come before the true one; 0 if it is predicted
    losses: np.ndarray  # float64: cross-entropy in nats; NaN where a logit is not finite

    @classmethod
    def of(cls, rows: np.ndarray, images: int) -> SampleMetrics:
        """Out of `sample_rows` rows from all ranks, in any order, images that fill up a batch more than once.

        RuntimeError unless there are exactly `images` of them.
        """
        index, first = np.unique(rows[:, 0].astype(np.int64), return_index=True)
        if len(index) != images or index[-1] != images - 1:
            raise RuntimeError(f"evaluation did not see every image once: {len(index)} of {images}")
        rows = rows[first]
        labels, predicted, places = (rows[:, column].astype(np.int64) for column in (1, 2, 3))
        return cls(labels, predicted, places, rows[:, 4])


def sample_metrics(logits: np.ndarray | torch.Tensor, labels: np.ndarray | torch.Tensor) -> SampleMetrics:
    """The outcomes of images whose logits (n, classes) are at hand."""
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    return SampleMetrics.of(sample_rows(logits, labels, torch.arange(len(labels))).numpy(), len(labels))


def sample_rows(logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """float64 (n, 5) for logits (n, classes): index, label, predicted class, place, loss. No host sync."""
    logits = logits.double()
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    places = ((logits > own) | ((logits == own) & earlier)).sum(1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    losses = torch.where(torch.isfinite(logits).all(1), losses, torch.nan)
    columns = (index, labels, logits.argmax(1), places, losses)
    return torch.stack([column.double() for column in columns], 1)
