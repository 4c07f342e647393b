"""The files below a data folder: listed once, remembered, and listed again only when a directory changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vit_dist.data.cache import locked
from vit_dist.errors import UserError
from vit_dist.files import is_run_folder, replacing

# fmt: off
IMAGE_EXTENSIONS = frozenset([
    "apng", "avif", "avifs", "bmp", "dib", "gif", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpf", "jpg", "jpx",
    "mpo", "pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp",
    "heic", "heif",  # they do not decode, and must be reported rather than overlooked
])
# fmt: on
TABLE_EXTENSIONS = frozenset(["parquet", "csv", "tsv", "json", "jsonl", "tar"])
_VERSION = 1
_CLOCK_TICK_NS = 2_000_000_000  # coarser than the time stamps of any file system in use


@dataclass
class FolderIndex:
    """What lies below a folder; every path is relative to it, with forward slashes, and sorted."""

    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)  # hidden folders with images in them
    num_other: int = 0  # visible files that are neither


@dataclass
class _Scan:
    index: FolderIndex = field(default_factory=FolderIndex)
    # Per directory: path, modification time in ns, number of entries.
    directories: list[tuple[str, int, int]] = field(default_factory=list)
    time_ns: int = 0


def folder_index(root: Path, cache: Path) -> FolderIndex:
    """The index of `root`, from `cache` if it still holds, else listed by one process while the others wait.

    A remembered index holds as long as no directory's modification time changed, which adding, removing or
    renaming a file does; a directory that was modified just before it was listed must also have the same number
    of entries, because its time stamp cannot tell. Files that are overwritten in place do not change the index:
    `split.table_fingerprint` looks at their sizes. Raises `UserError` for folders and names that cannot be read.
    """
    root = root.resolve()
    key = hashlib.sha256(os.fsencode(root)).hexdigest()[:32]
    path = cache / f"index-{key}.parquet"
    scan = _read(path)
    if scan is None or not _holds(root, scan):
        with locked(path):
            scan = _read(path)  # another process may have written it while this one waited
            if scan is None or not _holds(root, scan):
                scan = _scan(root)
                _write(path, scan)
    return scan.index


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _scan(root: Path) -> _Scan:
    scan = _Scan(time_ns=time.time_ns())
    stack: list[tuple[str, str | None, frozenset[tuple[int, int]]]] = [("", None, frozenset())]
    hidden: set[str] = set()
    while stack:
        relative, hidden_in, parents = stack.pop()
        try:
            stat = os.stat(root / relative)
            with os.scandir(root / relative) as listing:
                entries = list(listing)
        except OSError as error:
            raise UserError(f"cannot read the folder {root / relative}: {error.strerror}") from error
        if relative and {"status.json", ".lock"} & {entry.name for entry in entries} and is_run_folder(root / relative):
            continue  # what a run leaves is never data, wherever its folder lies
        identity = (stat.st_dev, stat.st_ino)
        if identity in parents:
            continue  # a link to a folder that it lies in
        scan.directories.append((relative, stat.st_mtime_ns, len(entries)))
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir():
                inside = hidden_in or (path if _is_hidden(entry.name) else None)
                stack.append((path, inside, parents | {identity}))
            elif not _is_hidden(entry.name):
                _add_file(scan.index, hidden, entry, path, hidden_in)
    scan.index.images.sort()
    scan.index.tables.sort()
    scan.index.hidden = sorted(hidden)
    return scan


def _add_file(index: FolderIndex, hidden: set[str], entry: os.DirEntry[str], path: str, hidden_in: str | None) -> None:
    extension = os.path.splitext(entry.name)[1][1:].lower()
    # A dangling link counts as an image, so that it is reported; a pipe does not: it would never end.
    is_image = extension in IMAGE_EXTENSIONS and (entry.is_symlink() or entry.is_file())
    if hidden_in is not None:
        if is_image:
            hidden.add(hidden_in)
    elif is_image:
        index.images.append(path)
    elif extension in TABLE_EXTENSIONS:
        index.tables.append(path)
    else:
        index.num_other += 1


def _holds(root: Path, scan: _Scan) -> bool:
    try:
        for relative, mtime_ns, num_entries in scan.directories:
            directory = root / relative
            if os.stat(directory).st_mtime_ns != mtime_ns:
                return False
            recent = mtime_ns > scan.time_ns - _CLOCK_TICK_NS
            if recent and len(os.listdir(directory)) != num_entries:
                return False
    except OSError:
        return False
    return True


def _write(path: Path, scan: _Scan) -> None:
    index = scan.index
    header = {
        "version": _VERSION,
        "time_ns": scan.time_ns,
        "directories": scan.directories,
        "tables": index.tables,
        "hidden": index.hidden,
        "num_other": index.num_other,
    }
    try:
        images = pa.array(index.images, pa.string())
        table = pa.table({"path": images}).replace_schema_metadata({"vit_dist": json.dumps(header)})
    except UnicodeEncodeError as error:
        raise UserError(f"a file name is not valid UTF-8, rename the file: {error.object!a}") from error
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _read(path: Path) -> _Scan | None:
    try:
        table = pq.read_table(path)
        header: dict[str, Any] = json.loads((table.schema.metadata or {})[b"vit_dist"])
        if header["version"] != _VERSION:
            return None
        index = FolderIndex(table["path"].to_pylist(), header["tables"], header["hidden"], header["num_other"])
        return _Scan(index, [tuple(d) for d in header["directories"]], header["time_ns"])
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException):
        return None  # missing, or written by another version or not to its end: it is built again
