"""Rows of images and labels out of Parquet, CSV and JSON files and WebDataset shards."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from vit_dist.data.columns import image_column, usual_role
from vit_dist.errors import UserError

_SHARD_NUMBER = re.compile(r"[-_. ]?\d+([-_. ]of[-_. ]\d+)?([-_.][0-9a-f]{8,})?$")
_WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d*")  # not 007: that is a name, and its zeros matter


@dataclass(frozen=True)
class Rows:
    """A split with whatever columns its files have, in the order of the files."""

    table: datasets.Dataset
    files: list[str]  # relative to the data folder
    num_rows: list[int]  # per file

    def ids(self) -> list[str]:
        """`<file>#<row>` for every row."""
        counts = zip(self.files, self.num_rows, strict=True)
        return [f"{file}#{row}" for file, count in counts for row in range(count)]

    def folders(self, root: Path) -> list[Path]:
        """For every row the folder of its file, which paths of images are relative to."""
        counts = zip(self.files, self.num_rows, strict=True)
        return [folder for file, count in counts for folder in [(root / file).parent] * count]


def split_of(file: str) -> str:
    """The split that a file belongs to, by the first name in its path that is the name of a split or starts with
    one (`train-00000-of-00002.parquet`, `val/0.tar`); else its name without a shard number."""
    path = PurePosixPath(file)
    stem = path.name.split(".")[0]
    for name in (*path.parts[:-1], stem):
        word = re.match(r"[A-Za-z]+(?![A-Za-z])", name)
        if word and usual_role(word[0]):
            return word[0].lower()
    return _SHARD_NUMBER.sub("", stem) or stem


def extension(file: str) -> str:
    """`csv` of `labels.CSV`."""
    return os.path.splitext(file)[1][1:].lower()


def has_images(root: Path, file: str, override: str | None) -> bool:
    """Whether a file that lies among images is a table of images, by its columns, and not about something else."""
    kind = extension(file)
    if kind == "tar":
        return False  # the archive that the images came in, rather
    try:
        if kind == "parquet":
            features = datasets.Features.from_arrow_schema(pq.read_schema(root / file))
        else:
            features = _read_text([file], root, num_rows=1).table.features
        image_column(features, override, file)
    except (UserError, OSError, ValueError, pa.ArrowException):
        return False
    return True


def read_rows(files: Sequence[str], root: Path, cache_dir: str | None) -> Rows:
    """All rows of some files of one kind. Parquet and tar are converted once, to Arrow files in the cache, and
    mapped into memory. Raises `UserError` for files that cannot be read."""
    kinds = {extension(file) for file in files}
    if len(kinds) > 1:
        raise UserError(f"{root}: files of different kinds for one split: {', '.join(sorted(files)[:5])}")
    readers = {"parquet": _read_parquet, "tar": _read_shards}
    kind = kinds.pop()
    try:
        rows = readers[kind](files, root, cache_dir) if kind in readers else _read_text(files, root)
    except UserError:
        raise
    except Exception as error:  # whatever a parser says about a broken file
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UserError(f"cannot read {_few(files, root)}: {reason}") from error
    if len(rows.table) == 0:
        raise UserError(f"{_few(files, root)}: no rows")
    return rows


def _few(files: Sequence[str], root: Path) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{root / files[0]}{more}"


def _read_parquet(files: Sequence[str], root: Path, cache_dir: str | None) -> Rows:
    from datasets.packaged_modules.parquet.parquet import Parquet

    num_rows = [pq.read_metadata(root / file).num_rows for file in files]
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


def _read_text(files: Sequence[str], root: Path, num_rows: int | None = None) -> Rows:
    """CSV, TSV, JSON lines or a JSON list of objects; at most `num_rows` rows of each file."""
    records: list[dict[str, Any]] = []
    counts = []
    for file in files:
        read = _json_records if extension(file) in ("json", "jsonl") else _csv_records
        new = read(root / file, num_rows)
        records += new
        counts.append(len(new))
    names = dict.fromkeys(name for record in records for name in record)
    convert = _json_column if extension(files[0]) in ("json", "jsonl") else _csv_column
    columns = {name: convert([record.get(name) for record in records]) for name in names}
    return Rows(datasets.Dataset(pa.table(columns)), list(files), counts)


def _csv_records(path: Path, num_rows: int | None) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        records = []
        for record in reader:
            if None in record:
                raise ValueError(f"line {reader.line_num} has more fields than the header")
            records.append(record)
            if len(records) == num_rows:
                break
    return records


def _csv_column(values: list[str | None]) -> pa.Array:
    filled = [value or None for value in values]
    if all(value is None or _WHOLE_NUMBER.fullmatch(value) for value in filled):
        return pa.array([None if value is None else int(value) for value in filled], pa.int64())
    return pa.array(filled, pa.string())


def _json_records(path: Path, num_rows: int | None) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        if file.read(64).lstrip().startswith("["):
            file.seek(0)
            records = json.load(file)[:num_rows]
        else:
            file.seek(0)
            records = []
            for line in file:
                if line.strip():
                    records.append(json.loads(line))
                    if len(records) == num_rows:
                        break
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("not JSON objects, one a line, nor a list of them")
    return records


def _json_column(values: list[Any]) -> pa.Array:
    if any(isinstance(value, dict) and ("bytes" in value or "path" in value) for value in values):
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        return pa.array([_json_image(value) for value in values], image)
    try:
        return pa.array(values)
    except pa.ArrowException:  # a column of many types is of no use here, unless it is asked for
        return pa.array([json.dumps(value) for value in values])


def _json_image(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None if value is None else {"bytes": None, "path": str(value)}
    data = value.get("bytes")
    return {"bytes": None if data is None else base64.b64decode(data, validate=True), "path": value.get("path")}
