"""Rows of images and labels out of Parquet, CSV and JSON files and WebDataset shards."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vit_dist.data.columns import image_column, is_guess, is_image_name, is_label_name, label_candidates, usual_role
from vit_dist.data.image_files import file_name_columns, leads_to_images
from vit_dist.data.text_tables import json_column, json_records, read_text, whole_numbers
from vit_dist.errors import UserError
from vit_dist.listing import listed, shortened

_SHARD_NUMBER = re.compile(r"[-_. ]?\d+([-_. ]of[-_. ]\d+)?([-_.][0-9a-f]{8,})?$")
_JSON = ("json", "jsonl")
_FAMILIES = {"tsv": "csv", "txt": "csv", "jsonl": "json"}  # kinds that are read alike
_NUM_PEEKED = 20  # rows that tell what a table is about


@dataclass(frozen=True)
class Rows:
    """A split with whatever columns its files have, in the order of the files."""

    table: datasets.Dataset
    files: list[str]  # relative to the data folder
    num_rows: list[int]  # per file
    notes: list[str] = field(default_factory=list)  # how the files are written

    def ids(self) -> pa.ChunkedArray:
        """`<file>#<row>` for every row."""
        return pa.chunked_array(
            [numbered(file, count) for file, count in zip(self.files, self.num_rows, strict=True)], pa.string()
        )

    def folders(self, root: Path) -> list[Path]:
        """For every file its folder, which paths of images are relative to."""
        return [(root / file).parent for file in self.files]


def numbered(name: str, count: int) -> pa.Array:
    """`<name>#0`, `<name>#1`, ..."""
    return pc.binary_join_element_wise(name, pa.array(np.arange(count)).cast(pa.string()), "#")


def split_of(file: str) -> str:
    """The split that a file belongs to, by the first name in its path that is the name of a split or starts with
    one (`train-00000-of-00002.parquet`, `val/0.tar`); else its name without a shard number."""
    path = PurePosixPath(file)
    for name in (*path.parts[:-1], path.name.split(".")[0]):
        word = re.match(r"[A-Za-z]+(?![A-Za-z])", name)
        if word and usual_role(word[0]):
            return word[0].lower()
    return stem_of(file)


def stem_of(file: str) -> str:
    """The name of a file without its suffixes and the number of a shard."""
    stem = PurePosixPath(file).name.split(".")[0]
    return _SHARD_NUMBER.sub("", stem) or stem


def extension(file: str) -> str:
    """`csv` of `labels.CSV`."""
    return os.path.splitext(file)[1][1:].lower()


def has_images(root: Path, file: str, override: str | None, label: str | None = None) -> bool:
    """Whether a file that lies among images is a table of images, by its columns, and not about something else.

    `override` and `label`: the columns of images and labels that the user named.
    """
    kind = extension(file)
    if kind == "tar":
        return False  # the archive that the images came in, rather
    try:
        if kind == "parquet":
            features = datasets.Features.from_arrow_schema(pq.read_schema(root / file))
            image = image_column(features, override, file)
            return override is not None or label in features or not is_guess(image, features[image])
        rows = _read_text([file], root, [override] if override else [], num_rows=_NUM_PEEKED)
        features = rows.table.features
        image = image_column(features, override, file, file_name_columns(rows.table.data.table))
        if override is not None or label in features or not is_guess(image, features[image]):
            return True
        return bool(label_candidates(features)) and leads_to_images(rows.table.data.column(image), root / file)
    except Exception:  # whatever a file of another kind leads to
        return False


def split_lists(root: Path) -> list[str]:
    """Lists of images called `train.txt`, `val_list.txt` and the like that lie in a folder."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    lists = [name for name in names if extension(name) == "txt" and usual_role(re.split(r"[^A-Za-z]", name)[0])]
    return [name for name in lists if has_images(root, name, None)]


def column_names(root: Path, file: str) -> list[str]:
    """The columns of a table, by its schema or its first rows; raises `UserError` if it cannot be read."""
    with _readable([file], root):
        if extension(file) == "parquet":
            return list(pq.read_schema(root / file).names)
        return list(_read_text([file], root, num_rows=_NUM_PEEKED).table.column_names)


def read_rows(files: Sequence[str], root: Path, cache_dir: str | None, names: Sequence[str] = ()) -> Rows:
    """All rows of some files of one kind.

    Parquet and tar are converted once, to Arrow files in the cache, and mapped into memory.

    Args:
        files: Paths below `root`.
        root: The data folder.
        cache_dir: Where `datasets` keeps what it converts.
        names: Columns that the user named.

    Raises:
        UserError: A file cannot be read, or the files are of different kinds.
    """
    kinds = {_FAMILIES.get(extension(file), extension(file)) for file in files}
    if len(kinds) > 1:
        shown = ", ".join(file if len(file) <= 60 else "..." + file[-57:] for file in sorted(files)[:5])
        raise UserError(f"{root}: files of different kinds for one split: {shown}; pass one of them with --data")
    readers = {"parquet": _read_parquet, "tar": _read_shards}
    kind = kinds.pop()
    with _readable(files, root):
        rows = readers[kind](files, root, cache_dir) if kind in readers else _read_text(files, root, names)
    if len(rows.table) == 0:
        raise UserError(f"{_few(files, root)}: no rows")
    if len({stem_of(file) for file in files}) > 1:
        return replace(rows, notes=[*rows.notes, f"read as one table: {listed(files, room=120)}"])
    return rows


@contextlib.contextmanager
def _readable(files: Sequence[str], root: Path) -> Iterator[None]:
    """Raises `UserError` for files of another format, and for whatever a parser says about a broken one."""
    for file in files:
        _refuse_another_format(root / file)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(f"cannot read {_few(files, root)}: {reason}") from error


def _refuse_another_format(path: Path) -> None:
    """Raise `UserError` if a file's first bytes are those of another format than its name says."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer instead of the file: run git lfs pull")
    if text.startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path}: a web page, not a table: download the file itself")
    if extension(path.name) in ("csv", "tsv", "txt", *_JSON):
        if start.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
            raise UserError(f"{path}: a spreadsheet or archive with the name of a text file: save it as CSV UTF-8")
        if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise UserError(f"{path}: a compressed file: unpack it first")


def _few(files: Sequence[str], root: Path) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{root / files[0]}{more}"


def _read_parquet(files: Sequence[str], root: Path, cache_dir: str | None) -> Rows:
    from datasets.packaged_modules.parquet.parquet import Parquet

    num_rows = [pq.read_metadata(root / file).num_rows for file in files]
    _require_columns([pq.read_schema(root / file).names for file in files], files, root, ())
    return Rows(_build(Parquet, files, root, cache_dir), list(files), num_rows)


def _read_shards(files: Sequence[str], root: Path, cache_dir: str | None) -> Rows:
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    table = _build(WebDataset, files, root, cache_dir)
    counts = dict.fromkeys((str(root / file) for file in files), 0)
    for url in table["__url__"]:
        counts[url] += 1
    table = table.remove_columns(["__key__", "__url__"])
    return Rows(table.flatten(), list(files), list(counts.values()))  # `json` becomes `json.label`, ...


def _build(builder_class: Any, files: Sequence[str], root: Path, cache_dir: str | None) -> datasets.Dataset:
    from datasets.data_files import DataFilesDict, DataFilesList

    paths = [root / file for file in files]
    # Handed over as a list, not as patterns: a folder may be called `data[1]`. Size and time make a new version of
    # a file a new entry in the cache.
    versions = [(str(stat.st_size), str(stat.st_mtime_ns)) for stat in map(os.stat, paths)]
    data_files = DataFilesDict({"train": DataFilesList([str(path) for path in paths], versions)})
    builder = builder_class(cache_dir=cache_dir, data_files=data_files)
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def _read_text(files: Sequence[str], root: Path, names: Sequence[str] = (), num_rows: int | None = None) -> Rows:
    """CSV and its relatives, lists, JSON lines or JSON lists; at most `num_rows` rows of each file."""
    if extension(files[0]) in _JSON:
        return _read_json(files, root, num_rows)
    tables: list[pa.Table] = []
    notes: dict[str, None] = {}
    for file in files:
        table, found = read_text(root / file, num_rows, names)
        tables.append(table)
        notes.update(dict.fromkeys(found))
    _require_columns([table.column_names for table in tables], files, root, names)
    text = pa.concat_tables(tables, promote_options="default")
    columns = {name: whole_numbers(text.column(name)) for name in text.column_names}
    return Rows(datasets.Dataset(pa.table(columns)), list(files), [len(table) for table in tables], list(notes))


def _require_columns(columns: Sequence[Sequence[str]], files: Sequence[str], root: Path, names: Sequence[str]) -> None:
    """Raise `UserError` if files that are read as one table differ in their columns.

    Shards of one table, whose names differ in a number alone, may differ in columns that hold neither images nor
    labels. Other files with different columns may describe the same images twice, as `train.csv` and
    `train_folds.csv` do.
    """
    first = columns[0]
    for column_names, file in zip(columns[1:], files[1:], strict=True):
        are_shards = stem_of(file) == stem_of(files[0])
        for name in sorted(set(first) ^ set(column_names)):
            if not are_shards or name in names or is_image_name(name) or is_label_name(name):
                one, other = (files[0], file) if name in first else (file, files[0])
                raise UserError(
                    f"{shortened(str(root), 120)}: {shortened(one)} has a column {shortened(name, 30)}, "
                    f"{shortened(other)} has not: pass one of them with --data, or give both the same columns"
                )


def _read_json(files: Sequence[str], root: Path, num_rows: int | None) -> Rows:
    records: list[dict[str, Any]] = []
    counts = []
    columns_of = []
    for file in files:
        new = json_records(root / file, num_rows)
        records += new
        counts.append(len(new))
        columns_of.append(list(dict.fromkeys(name for record in new for name in record)))
    _require_columns(columns_of, files, root, ())
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: json_column([record.get(name) for record in records]) for name in names}
    return Rows(datasets.Dataset(pa.table(columns)), list(files), counts)
