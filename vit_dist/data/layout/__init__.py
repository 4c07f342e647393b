"""What the folders of a data set mean: which are splits, which are classes, and which are neither.

`read_layout` decides once, from the names of folders and the numbers of their files alone, so that every process reads
the same. Where more than one reading is sensible it refuses and names the flags that choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vit_dist.data.layout.classes import map_classes, refuse_foreign_split
from vit_dist.data.layout.inner_splits import splits_below
from vit_dist.data.layout.reading import FileNames, Reading
from vit_dist.data.layout.refusals import (
    check_empty_classes,
    refuse_copies,
    refuse_joined_names,
    refuse_loose_images,
    refuse_no_classes,
    refuse_variants,
)
from vit_dist.data.layout.splits import assign, splits_above
from vit_dist.data.layout.tree import Folder, folder_tree
from vit_dist.data.layout.wrappers import unwrap, unwrap_splits

if TYPE_CHECKING:
    from vit_dist.options import DataOptions


@dataclass(frozen=True)
class Layout:
    """One reading of a data folder."""

    splits: dict[str, dict[str, str]]  # role -> folder that holds images -> class
    notes: list[str] = field(default_factory=list)  # what was decided, for the user
    unused: list[str] = field(default_factory=list)  # folders with images that are left out

    @property
    def classes(self) -> list[str]:
        """Of the training split, sorted."""
        return sorted(set(self.splits["train"].values()))


def read_layout(
    root: str,
    images: Mapping[str, int],
    options: DataOptions,
    *,
    directories: Iterable[str] = (),
    others: Mapping[str, Mapping[str, int]] | None = None,
    file_names: FileNames = lambda folder: set(),
) -> Layout:
    """The one sensible reading of a folder of images.

    Args:
        root: The folder, as the user names it.
        images: Number of image files that lie directly in each folder, by path relative to `root`.
        options: `train_split`, `validation_split`, `test_split` and `class_folders` choose between readings.
        directories: All folders, also those without images.
        others: Numbers of files by suffix that are no images, by folder.
        file_names: Names of the images in a folder; asked for few folders.

    Raises:
        UserError: There is no sensible reading, or more than one.
    """
    reading = Reading(root, options, file_names)
    mapping = _splits(reading, folder_tree(root, images, directories, others or {}))
    return Layout(mapping, reading.notes, sorted(reading.unused))


def _splits(reading: Reading, tree: Folder) -> dict[str, dict[str, str]]:
    """role -> folder that holds images -> class."""
    base = unwrap(reading, tree)
    splits = splits_above(reading, base)
    if splits is None and (mapping := splits_below(reading, base)) is not None:
        return mapping
    if splits is None:
        if reading.named:
            assign(reading, list(base.filled))  # says that there are no such splits
        refuse_joined_names(reading, base)
        refuse_variants(reading, base)
        splits = {"train": base}
    bases = unwrap_splits(reading, splits)
    for role, folder in bases.items():
        refuse_loose_images(reading, folder, role)
        refuse_copies(reading, folder)
        refuse_no_classes(reading, folder)
        check_empty_classes(reading, folder, role)
    mapping = map_classes(reading, bases)
    refuse_foreign_split(reading, mapping, bases)
    return mapping
