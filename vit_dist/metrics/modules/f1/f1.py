"""Macro F1: the mean over classes of the harmonic mean of precision and recall."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
import sklearn.metrics


class F1(evaluate.Metric):
    """`compute(predictions=ids, references=ids)`: (N,) class ids each; `f1_macro` is in [0, 1].

    As in scikit-learn, the mean runs over the classes that occur in `references` or in `predictions`.
    """

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features({"predictions": ids, "references": ids}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        f1 = sklearn.metrics.f1_score(references, predictions, average="macro", zero_division=0)
        return {"f1_macro": float(f1)}
