"""Images that a data set has twice, byte for byte, by the digests that verification made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import datasets
import numpy as np

from vit_dist.data.split import labels_of
from vit_dist.listing import shortened

_MOST_EXAMPLES = 3


@dataclass(frozen=True)
class Duplicates:
    """Numbers of images. An image is counted in each of the three kinds that it is one of."""

    across_splits: int = 0  # outside train, that another split has too
    across_labels: int = 0  # that the data have under another label too
    within_splits: int = 0  # further copies in the same split under the same label
    examples: list[str] = field(default_factory=list)

    def results(self) -> dict[str, int]:
        """For the results of a run."""
        return {
            "duplicates_across_splits": self.across_splits,
            "duplicates_across_labels": self.across_labels,
            "duplicates_within_splits": self.within_splits,
        }

    def __str__(self) -> str:
        parts = []
        if self.across_splits:
            parts.append(f"in validation or test and in another split too: {self.across_splits:,}")
        if self.across_labels:
            parts.append(f"under two labels: {self.across_labels:,}")
        if self.within_splits:
            parts.append(f"further copies in one split: {self.within_splits:,}")
        examples = f" (for example {'; '.join(self.examples)})" if self.examples else ""
        return f"equal images, byte for byte; {', '.join(parts)}{examples}"

    def __bool__(self) -> bool:
        return bool(self.across_splits or self.across_labels or self.within_splits)


def find_duplicates(tables: Mapping[str, datasets.Dataset], digests: Mapping[str, np.ndarray]) -> Duplicates:
    """Count them among some splits.

    Args:
        tables: Encoded splits by name, with the columns `id` and `label`.
        digests: For each split the digests of its images, uint8 (rows, 16).

    Takes 40 bytes of memory for each image, and more only for the duplicates.
    """
    names = list(tables)
    lengths = [len(tables[name]) for name in names]
    halves = np.concatenate([digests[name] for name in names]).view("<u8")
    rows = _repeated(halves)
    if not len(rows):
        return Duplicates()
    split_of = np.repeat(np.arange(len(names), dtype=np.uint8), lengths)[rows]
    labels = np.concatenate([labels_of(tables[name]) for name in names])[rows]
    order = np.lexsort((labels, split_of, halves[rows, 1], halves[rows, 0]))
    rows, split_of, labels = rows[order], split_of[order], labels[order]
    same = (halves[rows[1:]] == halves[rows[:-1]]).all(axis=1)
    starts = np.concatenate([[0], np.flatnonzero(~same) + 1])
    group = np.repeat(np.arange(len(starts)), np.diff([*starts, len(rows)]))
    mixed_splits = (np.minimum.reduceat(split_of, starts) != np.maximum.reduceat(split_of, starts))[group]
    mixed_labels = (np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts))[group]
    again = same & (split_of[1:] == split_of[:-1]) & (labels[1:] == labels[:-1])
    outside = mixed_splits & (split_of != names.index("train")) if "train" in names else mixed_splits
    begins = np.cumsum([0, *lengths])
    told = np.unique(group[mixed_labels | mixed_splits])[:_MOST_EXAMPLES]
    return Duplicates(
        int(outside.sum()),
        int(mixed_labels.sum()),
        int(again.sum()),
        [_pair(tables, names, begins, rows[group == number]) for number in told],
    )


def _repeated(halves: np.ndarray) -> np.ndarray:
    """Rows whose first half occurs more than once, which nearly all are that occur twice as a whole."""
    first = np.ascontiguousarray(halves[:, 0])
    order = np.argsort(first, kind="stable")
    ordered = first[order]
    equal = ordered[1:] == ordered[:-1]
    rows = order[np.concatenate([[False], equal]) | np.concatenate([equal, [False]])]
    return np.sort(rows)


def _pair(tables: Mapping[str, datasets.Dataset], names: list[str], begins: np.ndarray, rows: np.ndarray) -> str:
    shown = []
    for row in (rows[0], rows[-1]):
        split = int(np.searchsorted(begins, row, side="right")) - 1
        shown.append(shortened(tables[names[split]][int(row - begins[split])]["id"], 50))
    return " = ".join(shown)
