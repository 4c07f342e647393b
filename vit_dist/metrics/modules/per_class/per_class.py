"""Precision, recall, F1 and number of samples of every class."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import sklearn.metrics


class PerClass(evaluate.Metric):
    """`compute(predictions=ids, references=ids, classes=names)`: (N,) class ids each, names in id order.

    Returns `{"per_class": {name: {"precision", "recall", "f1", "support"}}}` with an entry for every class.
    A ratio over nothing (the class never occurs, or is never predicted) is 0; `support` tells which.
    """

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features({"predictions": ids, "references": ids}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray, classes: list[str]) -> dict[str, Any]:
        columns = sklearn.metrics.precision_recall_fscore_support(
            references, predictions, labels=range(len(classes)), zero_division=0
        )
        return {
            "per_class": {
                name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
                for name, p, r, f, n in zip(classes, *columns, strict=True)
            }
        }
