"""Mean over classes of the share of a class that is found: every class counts alike, however rare."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class BalancedAccuracy(evaluate.Metric):
    """`compute(predictions=ids, references=ids)`: (N,) class ids each; `balanced_accuracy` is in [0, 1].

    The mean runs over the classes that occur in `references`; a class without samples has no recall.
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
        support = np.bincount(references)
        found = np.bincount(references[predictions == references], minlength=len(support))
        present = support > 0
        return {"balanced_accuracy": float(np.mean(found[present] / support[present]))}
