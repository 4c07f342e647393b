"""From `--data` to data sets: source, classes, splits, verified images, transforms. Every rank gets the same."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from vit_dist.data.dataset import ImageDataset
from vit_dist.data.decode import DecodeRules, stored_size
from vit_dist.data.describe import class_lines, sample_sizes, size_line
from vit_dist.data.duplicates import find_duplicates
from vit_dist.data.source import load_source
from vit_dist.data.split import (
    class_list,
    classes_hash,
    classes_without_images,
    encode_labels,
    limit,
    stratified_split,
    table_fingerprint,
)
from vit_dist.data.transforms import Transform, load_processor
from vit_dist.data.verify import Seen, Verified, apply_policy, fraction_to_skip, judge_levels, verify
from vit_dist.listing import listed
from vit_dist.options import DataOptions, ModelOptions

_WARNING = "WARNING: "
Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class ImageData:
    """Data sets for training, validation and (where there is one) test, over one list of classes."""

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset | None
    classes: list[str]
    processor: Any  # the model's image processor
    description: list[str]  # for the plan: what was understood
    record: dict[str, Any]  # for the run record: hashes, revision, counts
    skipped: dict[str, int]  # bad images left out, by split
    input_size: int  # pixels
    duplicates: dict[str, int] = field(default_factory=dict)  # numbers of equal images, if all were looked at

    @property
    def warnings(self) -> list[str]:
        """What limits how far the result can be trusted."""
        return [line.removeprefix(_WARNING) for line in self.description if line.startswith(_WARNING)]


def build_data(
    options: DataOptions, model: ModelOptions, seed: int, progress: Progress, most_verified: int | None = None
) -> ImageData:
    """Load, split and verify the images; the hold-out and every choice of images depend on `seed` alone.

    Slow parts are done by one process per cache while others wait on a file lock, not in a collective. Of more than
    `most_verified` images only as many are decoded, spread over all. Raises UserError for everything that is wrong
    with the data.
    """
    rules = DecodeRules.from_options(options)
    processor = load_processor(model, options.cache_dir)
    source = load_source(options)
    classes = class_list(source.tables["train"], source.names)
    tables = {split: encode_labels(table, classes, split) for split, table in source.tables.items()}
    notes, split_hash = [source.description, *source.notes], None
    if "validation" not in tables:
        tables["train"], tables["validation"], split_hash = stratified_split(
            tables["train"], options.train_val_split, seed
        )
        share = f"{options.train_val_split:.0%}"
        notes.append(f"no validation split: {share} of train held out, by class (seed {seed}, {split_hash[:12]})")
    if "test" not in tables:
        notes.append("no test split: no test result will be given")
    caps = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}
    tables = {split: limit(table, getattr(options, caps[split]), seed, caps[split]) for split, table in tables.items()}
    total = sum(map(len, tables.values()))
    if most_verified is not None and options.verify_images and total > most_verified:
        checked = _sampled(tables, rules, options, progress, most_verified)
    else:
        checked = _verified(tables, rules, options, progress)
    tables, skipped = checked.tables, checked.skipped
    if any(skipped.values()):
        notes.append("left out bad images: " + ", ".join(f"{n} of {split}" for split, n in skipped.items() if n))
    notes.append(f"{len(classes)} classes; " + ", ".join(f"{split} {len(table):,}" for split, table in tables.items()))
    notes += class_lines(tables["train"], classes)
    for split, table in tables.items():
        if missing := classes_without_images(table, classes):
            effect = "cannot be learned" if split == "train" else f"the {split} accuracy does not cover them"
            notes.append(f"{_WARNING}no images in {split} of {listed(missing, 120)}: {effect}")
    if model.image_size is not None:
        notes += _enlargement(tables["train"], model.image_size)
    notes.append(size_line(checked.seen, sum(map(len, tables.values()))))
    notes += checked.notes
    plain, augmented = Transform(processor), Transform(processor, options, seed)
    sets = {
        split: ImageDataset(table, augmented if split == "train" else plain, rules) for split, table in tables.items()
    }
    prints = {split: table_fingerprint(table) for split, table in sorted(tables.items())}
    return ImageData(
        sets["train"],
        sets["validation"],
        sets.get("test"),
        classes,
        processor,
        notes,
        {
            "fingerprint": hashlib.sha256(repr(prints).encode()).hexdigest(),
            "splits": {split: {"images": len(tables[split]), "fingerprint": prints[split]} for split in tables},
            "validation_indices": split_hash,
            "classes": classes_hash(classes),
            "revision": source.revision,
            "processor": hashlib.sha256(processor.to_json_string().encode()).hexdigest(),
        },
        skipped,
        plain.side,
        checked.duplicates,
    )


def _enlargement(table: datasets.Dataset, asked: int, probes: int = 32) -> list[str]:
    """A note if `--image_size` is at least twice the median image's shorter side, by the headers of some images."""
    rows = sorted({i * (len(table) - 1) // max(1, probes - 1) for i in range(probes)})
    sides = [min(size) for image in table[rows]["image"] if (size := stored_size(image)) is not None]
    if not sides or asked < 2 * (side := int(statistics.median(sides))):
        return []
    return [
        f"--image_size {asked} is {asked / side:.1f} times the images' own {side} px (median shorter side): more "
        "compute, no more detail"
    ]


@dataclass(frozen=True)
class _Checked:
    """What looking at the images showed."""

    tables: dict[str, datasets.Dataset]  # without the bad images
    skipped: dict[str, int]  # how many those were
    seen: Seen
    notes: list[str] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)


def _verified(
    tables: dict[str, datasets.Dataset], rules: DecodeRules, options: DataOptions, progress: Progress
) -> _Checked:
    """Every image is decoded once; what does not decode stops the run or is left out, as `--on_bad_image` says."""
    skipped = dict.fromkeys(tables, 0)
    if not options.verify_images:
        return _Checked(tables, skipped, sample_sizes(list(tables.values())))
    outcomes = _decoded(tables, rules, options, progress)
    checked, digests, seen, notes = {}, {}, Seen(), []
    needed = fraction_to_skip([(len(outcomes[split].bad), len(table)) for split, table in tables.items()])
    for split, table in tables.items():
        outcome = outcomes[split]
        checked[split], keep = apply_policy(table, outcome.bad, options, split, needed)
        digests[split], skipped[split] = outcome.digests[keep], int((~keep).sum())
        seen.add(outcome.seen)
        if note := judge_levels(outcome.seen, split):
            notes.append(note)
    if duplicates := find_duplicates(checked, digests):
        is_serious = duplicates.across_splits or duplicates.across_labels
        notes.append(f"{_WARNING if is_serious else ''}{duplicates}")
    return _Checked(checked, skipped, seen, notes, duplicates.results())


def _sampled(
    tables: dict[str, datasets.Dataset], rules: DecodeRules, options: DataOptions, progress: Progress, most: int
) -> _Checked:
    """As `_verified` for `most` images, spread over each split; all rows are kept, and equal images are not counted."""
    total = sum(map(len, tables.values()))
    parts = {}
    for split, table in tables.items():
        rows = np.unique(np.linspace(0, len(table) - 1, max(1, most * len(table) // total)).astype(np.int64))
        parts[split] = table.select(rows)
    outcomes = _decoded(parts, rules, options, progress)
    seen, notes = Seen(), [f"{sum(map(len, parts.values())):,} of {total:,} images decoded here; train decodes all"]
    for split, outcome in outcomes.items():
        seen.add(outcome.seen)
        if outcome.bad and options.on_bad_image != "skip":
            apply_policy(parts[split], outcome.bad, options, split)
        if outcome.bad:
            notes.append(f"{len(outcome.bad):,} of {len(parts[split]):,} images of {split} do not decode")
    return _Checked(tables, dict.fromkeys(tables, 0), seen, notes)


def _decoded(
    tables: dict[str, datasets.Dataset], rules: DecodeRules, options: DataOptions, progress: Progress
) -> dict[str, Verified]:
    return {
        split: verify(table, rules, cache_dir=options.cache_dir, progress=progress(split))
        for split, table in tables.items()
    }
