"""From tables with any columns to images and labels: columns chosen, files found, rows assigned to splits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.data.columns import ROLES, NoLabelColumn, common_table, image_column, is_guess
from vit_dist.data.image_files import file_name_columns, names_files, stored_images
from vit_dist.data.image_paths import Origin
from vit_dist.data.labels import clean_labels, find_labels
from vit_dist.data.split_column import SplitColumn, find_split_column
from vit_dist.data.split_words import split_word
from vit_dist.errors import UserError
from vit_dist.listing import shortened

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

_MOST_LISTED = 3
_MOST_COPIED = 1 << 30  # bytes


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split, with whatever columns they have."""

    table: datasets.Dataset  # without an indices mapping
    ids: pa.ChunkedArray  # strings
    origin: Origin
    is_archive: bool = False  # images lie in it: a path in it could lead anywhere
    notes: list[str] = field(default_factory=list)  # how the files are written


@dataclass(frozen=True)
class Labelled:
    """Images and labels by role, and what was understood."""

    tables: dict[str, datasets.Dataset]  # columns id, image, label
    notes: list[str]
    unused: list[str]  # rows that play no role
    by_column: bool  # whether a column assigned the rows to splits
    label_column: str  # of the training rows
    is_guess: bool  # whether nothing but its name says that the column holds the labels


def labelled_tables(splits: Mapping[str, SplitRows], options: DataOptions) -> Labelled:
    """The images and labels of each role, out of rows with any columns.

    Raises `UserError` if columns cannot be told apart, files are missing, or an image has two labels.
    """
    tables: dict[str, datasets.Dataset] = {}
    columns: dict[str, SplitColumn | None] = {}
    label_column, guessed = "", False
    notes: dict[str, None] = {}
    asked = {role: getattr(options, f"{role}_split") for role in ROLES} if len(splits) == 1 else None
    for role, rows in splits.items():
        where = f"{rows.origin.where} ({role})" if len(splits) > 1 else rows.origin.where
        named = file_name_columns(rows.table.data.table)
        image = image_column(rows.table.features, options.image_column_name, where, named)
        try:
            label, chosen = find_labels(rows.table, image, options.label_column_name, where)
        except NoLabelColumn as error:
            if role != "test":
                raise
            raise UserError(f"{where}: no column with labels: pass --test_split none, or add one") from error
        if image == label:
            raise UserError(f"--image_column_name {image}: {where} has its labels in this column")
        if role == "train":
            guess = f"{image} is a guess: --image_column_name"
            is_guessed = options.image_column_name is None and is_guess(image, rows.table.features[image])
            chosen = [guess, *chosen] if is_guessed else chosen
            chosen = [f"images in column {image}, labels in {label}", *chosen]
            label_column = label
            guessed = options.label_column_name is None and is_guess(label, rows.table.features[label])
        columns[role] = find_split_column(rows.table, (image, label), options.split_column_name, asked, where)
        tables[role], found = _common(rows, image, label, options, where)
        notes.update(dict.fromkeys([*rows.notes, *chosen, *found]))
    tables, more, unused = _by_column(tables, columns, splits["train"].origin.where)
    if len(tables) == 1 and options.split_column_name != "none":
        _refuse_folders_of_splits(tables["train"], splits["train"].origin.where)
    return Labelled(tables, [*notes, *more, *_repeated(tables)], unused, bool(more), label_column, guessed)


def _refuse_folders_of_splits(table: datasets.Dataset, where: str) -> None:
    """Raise `UserError` if the rows of one split name images in `train/` and in `test/`."""
    folders = pc.unique(pc.replace_substring_regex(pc.drop_null(_paths(table)), r"/[^/]*$", "")).to_pylist()
    if len(folders) < 2:
        return
    start = len(os.path.commonpath(folders)) + 1
    names = sorted({folder[start:].partition("/")[0] for folder in folders})
    roles = {word.role: name for name in names if (word := split_word(name)) and not word.rest}
    if len(roles) > 1 and "train" in roles:
        shown = " and ".join(shortened(name) for name in roles.values())
        raise UserError(
            f"{where}: its rows name images in {shown}, and no column says which split a row belongs to: add a column "
            "split, write one table for each split, or pass --split_column_name none to use all rows alike"
        )


def _common(
    rows: SplitRows, image: str, label: str, options: DataOptions, where: str
) -> tuple[datasets.Dataset, list[str]]:
    column = rows.table.data.column(image)
    if rows.is_archive and names_files(column):
        raise UserError(
            f"{where}: column {image} has names of files instead of images; the images of .tar shards lie in them"
        )
    stored, notes = stored_images(column, image, rows.origin)
    table, cleaned = clean_labels(rows.table.select_columns([image, label]), label, where)
    if stored is not None:
        _refuse_overlap(pc.struct_field(stored, "path"), rows, where)
        labels = table.select_columns([label])
        table = datasets.concatenate_datasets([datasets.Dataset(pa.table({image: stored})), labels], axis=1)
    if num_missing := _num_missing(table.data.column(image)):
        if options.on_bad_image == "error":
            raise UserError(
                f"{where}: {num_missing:,} of {len(table):,} rows have no image in column {image}: complete or remove "
                "them, or pass --on_bad_image skip"
            )
        notes = [*notes, f"{num_missing:,} rows without an image"]
    return common_table(table, image, label, rows.ids), [*notes, *cleaned]


def _refuse_overlap(paths: pa.ChunkedArray, rows: SplitRows, where: str) -> None:
    """Raise `UserError` if two tables name the same image file: they are two tables of the same images, not parts."""
    counts = rows.origin.num_rows
    if len(counts) < 2:
        return
    table_of = pa.array(np.repeat(np.arange(len(counts)), counts))
    named = pa.table({"path": paths, "table": table_of}).filter(pc.is_valid(paths))
    shared = named.group_by("path").aggregate([("table", "count_distinct"), ("table", "min"), ("table", "max")])
    shared = shared.filter(pc.greater(shared["table_count_distinct"], 1))
    if not len(shared):
        return
    starts = np.cumsum([0, *counts[:-1]])
    ids = [rows.ids[int(starts[shared[f"table_{end}"][0].as_py()])].as_py() for end in ("min", "max")]
    one, other = (shortened(first.rpartition("#")[0]) for first in ids)
    raise UserError(
        f"{where}: {len(shared):,} images are named in several tables, for example "
        f"{_shown([shared['path'][0].as_py()])} in {one} and {other}: pass one of the tables with --data"
    )


def _num_missing(images: pa.ChunkedArray) -> int:
    """Rows with neither bytes nor a path."""
    if not pa.types.is_struct(images.type):
        return images.null_count
    fields = [name for name in ("bytes", "path") if images.type.get_field_index(name) >= 0]
    is_empty = pc.is_null(pc.struct_field(images, fields[0])) if fields else pc.is_null(images)
    for name in fields[1:]:
        is_empty = pc.and_(is_empty, pc.is_null(pc.struct_field(images, name)))
    return int(pc.sum(pc.or_(pc.is_null(images), is_empty)).as_py() or 0)


def _by_column(
    tables: dict[str, datasets.Dataset], columns: dict[str, SplitColumn | None], where: str
) -> tuple[dict[str, datasets.Dataset], list[str], list[str]]:
    """The tables by role once columns that hold splits are followed, notes, and what is not used."""
    found = {role: column for role, column in columns.items() if column is not None}
    if len(tables) > 1:
        for role, column in found.items():
            if any(len(column.rows(other)) for other in ROLES if other != role):
                raise UserError(
                    f"{where}: the files are splits, and column {column.name} assigns rows of {role} to another split: "
                    "pass one file with --data, or --split_column_name none"
                )
        return tables, [], []
    if not found:
        return tables, [], []
    column = found["train"]
    assigned = {role: _subset(tables["train"], rows) for role in ROLES if len(rows := column.rows(role))}
    if "train" not in assigned:
        raise UserError(
            f"{where}: by column {column.name} no rows are for training: pass --train_split with a value of the "
            "column, or --split_column_name none to use all rows alike"
        )
    if list(assigned) == ["train"] and not column.unused:
        return tables, [], []
    return assigned, [f"splits by column {column.name}"], [f"{name} in {column.name}" for name in column.unused]


def _subset(table: datasets.Dataset, rows: np.ndarray) -> datasets.Dataset:
    """Some rows. Images inside the table are not copied; other columns are, which is faster than an indices mapping."""
    if table.data.nbytes > _MOST_COPIED:
        return table.select(rows)
    mask = np.zeros(len(table), bool)
    mask[rows] = True
    return datasets.Dataset(table.data.table.filter(pa.array(mask)), info=datasets.DatasetInfo(features=table.features))


def _repeated(tables: dict[str, datasets.Dataset]) -> list[str]:
    """Notes on image files that several rows name. Raises `UserError` for one with two labels."""
    paths = {role: _paths(table) for role, table in tables.items()}
    notes = []
    for role, table in tables.items():
        column = paths[role]
        present = pc.drop_null(column)
        num_more = len(present) - pc.count_distinct(present).as_py()
        if num_more:
            _refuse_two_labels(table, column, role)
            notes.append(f"{num_more:,} rows of {role} name an image file again")
    for role, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if role in paths and other in paths and len(paths[role]) and len(paths[other]):
            shared = pc.and_(pc.is_in(paths[other], value_set=pc.drop_null(paths[role])), pc.is_valid(paths[other]))
            if count := pc.sum(shared).as_py():
                example = _shown(pc.unique(paths[other].filter(shared))[:1].to_pylist())
                _refuse_other_labels({part: (paths[part], _arrow(tables[part], "label")) for part in (role, other)})
                notes.append(f"WARNING: {count:,} rows of {other} name images of {role} ({example})")
    return notes


def _paths(table: datasets.Dataset) -> pa.ChunkedArray:
    """The paths of images that are files, null for others."""
    images = _arrow(table, "image")
    return pc.if_else(pc.is_null(pc.struct_field(images, "bytes")), pc.struct_field(images, "path"), None)


def _arrow(table: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column in the order of the rows. (`with_format("arrow")[:]` would make a chunk of each row.)"""
    column = table.data.column(name)
    return column if table._indices is None else column.take(table._indices.column(0))


def _refuse_two_labels(table: datasets.Dataset, paths: pa.ChunkedArray, role: str) -> None:
    labels = _arrow(table, "label")
    if pa.types.is_nested(labels.type):
        return  # refused later as no classes
    rows = pa.table({"path": paths, "label": labels}).filter(pc.is_valid(paths))
    counts = rows.group_by("path").aggregate([("label", "count_distinct")])
    twice = counts.filter(pc.greater(counts["label_count_distinct"], 1))["path"]
    if len(twice):
        raise UserError(
            f"{role}: {len(twice):,} image files have different labels in different rows, for example "
            f"{_shown(twice[:_MOST_LISTED].to_pylist())}: one class per image is needed"
        )


def _refuse_other_labels(splits: Mapping[str, tuple[pa.ChunkedArray, pa.ChunkedArray]]) -> None:
    """Raise `UserError` if two splits give the same image file different labels: one of them means another file.

    `splits`: paths and labels of the rows, by role.
    """
    if any(pa.types.is_nested(labels.type) for _, labels in splits.values()):
        return  # refused later as no classes
    first, second = (pa.table({"path": p, "label": labels.cast(pa.string())}) for p, labels in splits.values())
    joined = first.filter(pc.is_valid(first["path"])).join(second, "path", join_type="inner", right_suffix="_2")
    different = joined.filter(pc.not_equal(joined["label"], joined["label_2"]))
    if len(different):
        row, roles = different.slice(0, 1).to_pylist()[0], list(splits)
        raise UserError(
            f"{_shown([row['path']])} has the label {shortened(row['label'])} in {roles[0]} and "
            f"{shortened(row['label_2'])} in {roles[1]} (images with two labels: {len(different):,}): write the folder "
            "of each image in the tables, or correct the labels"
        )


def _shown(paths: list[str]) -> str:
    return ", ".join(path if len(path) <= 100 else "..." + path[-97:] for path in paths)
