"""Images in class folders as tables, and whether a table beside them speaks of the same images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.data.index import FolderIndex
from vit_dist.data.layout import Layout, read_layout
from vit_dist.data.split_words import is_mask
from vit_dist.listing import counted, listed

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def layout_of(root: Path, index: FolderIndex, options: DataOptions) -> Layout:
    """The one sensible reading of the folders; raises `UserError` if there is none, or more than one."""
    counts = np.bincount(index.folder_of, minlength=len(index.folders)).tolist()
    number = {folder: position for position, folder in enumerate(index.folders)}

    def file_names(folder: str) -> set[str]:
        rows = np.flatnonzero(index.folder_of == number.get(folder, -1))[:1000]
        return {path.rpartition("/")[2] for path in index.images.take(pa.array(rows)).to_pylist()}

    return read_layout(
        str(root),
        dict(zip(index.folders, counts, strict=True)),
        options,
        directories=index.directories,
        others=index.others,
        file_names=file_names,
    )


def class_tables(root: Path, index: FolderIndex, layout: Layout) -> dict[str, datasets.Dataset]:
    """For each split a table with the columns `id`, `image` (an absolute path) and `label` (the class).

    The cost per image is Arrow's, not Python's: folders are decided, and rows look theirs up.
    """
    return {role: _class_table(root, index, classes) for role, classes in layout.splits.items()}


def _class_table(root: Path, index: FolderIndex, classes: Mapping[str, str]) -> datasets.Dataset:
    names = sorted(set(classes.values()))
    number = {name: position for position, name in enumerate(names)}
    code_of = np.array([number[classes[f]] if f in classes else -1 for f in index.folders], np.int32)
    codes = code_of[index.folder_of]
    rows = np.flatnonzero(codes >= 0)
    paths = index.images if len(rows) == len(codes) else index.images.take(pa.array(rows))
    labels = pa.array(names, pa.string()).take(pa.array(codes[rows]))
    images = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), _absolute(root, paths)], fields=list(_IMAGE)
    )
    table = datasets.Dataset(pa.table({"id": paths, "image": images, "label": labels}))
    return table.cast_column("image", datasets.Image(decode=False))


def folder_notes(index: FolderIndex) -> list[str]:
    """What lies in the folder and is not read."""
    notes = []
    if index.num_other:
        notes.append(
            f"{index.num_other:,} other file{'s' * (index.num_other != 1)} ignored ({counted(index.suffixes)})"
        )
    if index.system:
        notes.append(f"system folders left out: {listed([f'{name} ({n})' for name, n in index.system.items()], 200)}")
    if index.links:
        notes.append(f"links left out, to folders that are read already or hold no data: {listed(index.links, 120)}")
    return notes


def is_used(index: FolderIndex, layout: Layout) -> np.ndarray:
    """Which of the images in the folder the layout reads."""
    used = {folder for split in layout.splits.values() for folder in split}
    return np.array([folder in used for folder in index.folders], bool)[index.folder_of]


def without_row(root: Path, index: FolderIndex, tables: Iterable[datasets.Dataset]) -> tuple[np.ndarray, int]:
    """Which of the images in the folder no table names, and how many rows hold their image themselves."""
    missing, embedded = pa.array(np.ones(len(index.images), bool)), 0
    here = _absolute(root, index.images)
    for table in tables:
        images = table.select_columns(["image"]).with_format("arrow")[:]["image"]
        paths = pc.filter(pc.struct_field(images, "path"), pc.is_null(pc.struct_field(images, "bytes")))
        embedded += len(table) - len(paths)
        named = pa.array([os.path.normpath(path) for path in paths.to_pylist() if path is not None], pa.string())
        missing = pc.and_(missing, pc.invert(pc.is_in(here, value_set=named)))
    return missing.to_numpy(zero_copy_only=False), embedded


def same_classes(root: Path, layout: Layout, tables: Mapping[str, datasets.Dataset]) -> bool:
    """Whether the labels of the tables are the classes of the folders that their images lie in, under any names."""
    class_of = {folder: name for split in layout.splits.values() for folder, name in split.items()}
    pairs = set()
    for table in tables.values():
        images = table.select_columns(["image"]).with_format("arrow")[:]["image"]
        for path, label in zip(pc.struct_field(images, "path").to_pylist(), table["label"], strict=True):
            if path is None:
                return False
            folder = os.path.relpath(os.path.dirname(path), root)
            pairs.add((class_of.get(folder, folder), label))
    return len(pairs) == len({name for name, _ in pairs}) == len({label for _, label in pairs})


def folders_without_row(index: FolderIndex, missing: np.ndarray) -> list[str]:
    """Folders side by side of which no image is in a row, if they hold at least as many images as the rows name."""
    counts = np.bincount(index.folder_of, minlength=len(index.folders))
    lost = np.bincount(index.folder_of[missing], minlength=len(index.folders))
    whole = [number for number in np.flatnonzero(counts) if counts[number] == lost[number]]
    whole = [number for number in whole if not any(map(is_mask, index.folders[number].split("/")))]
    beside: dict[str, list[int]] = {}
    for number in whole:
        beside.setdefault(index.folders[number].rpartition("/")[0], []).append(int(number))
    several = [number for numbers in beside.values() if len(numbers) > 1 for number in numbers]
    enough = counts[several].sum() >= len(missing) - missing.sum()
    return sorted(index.folders[number] for number in several) if enough else []


def _absolute(root: Path, paths: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(str(root), paths, "/")
