"""Share of samples whose true class is among the k classes with the largest logits."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

ROWS = 1024  # samples at a time: the temporary arrays stay small beside the logits


class TopKAccuracy(evaluate.Metric):
    """`compute(references=ids, logits=logits, k=5)`: (N,) class ids and (N, C) logits.

    Returns `top{k}_accuracy`, in [0, 1]; with fewer than k classes all of them count, and it is 1. Of equal
    logits the lower class id comes first and NaN is the largest, as in `numpy.argmax`.
    """

    def _info(self) -> evaluate.MetricInfo:
        # The logits are a keyword, not a feature: features go through Arrow and Python lists, which takes
        # seconds for ten million numbers.
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features({"references": datasets.Value("int64")}),
            format="numpy",
        )

    def _compute(self, references: np.ndarray, logits: np.ndarray, k: int = 5) -> dict[str, float]:
        places = np.empty(len(references), dtype=np.int64)
        for start in range(0, len(references), ROWS):
            rows = slice(start, start + ROWS)
            places[rows] = _places(logits[rows], references[rows])
        return {f"top{k}_accuracy": float(np.mean(places < k))}


def _places(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the true one in each row. Counting is linear, sorting is not."""
    logits = np.where(np.isnan(logits), np.inf, logits)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    tied_before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    return np.count_nonzero(logits > own, axis=1) + np.count_nonzero(tied_before, axis=1)
