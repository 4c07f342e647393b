"""The files below a data folder: listed once, remembered, and listed again only when a directory changed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vit_dist.data.cache import locked, read_sealed, write_sealed
from vit_dist.errors import UserError
from vit_dist.files import is_run_folder
from vit_dist.listing import shortened

# fmt: off
IMAGE_EXTENSIONS = frozenset([
    "apng", "avif", "avifs", "bmp", "dib", "gif", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpf", "jpg", "jpx",
    "mpo", "pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp",
    "heic", "heif",  # they do not decode, and must be reported rather than overlooked
])
# Folders that file systems, desktops and version control keep for themselves, in lower case.
_SYSTEM_FOLDERS = frozenset([
    "__macosx", "__pycache__", "@eadir", "@recently-snapshot", "@recycle", "#recycle", "#snapshot", "$recycle.bin",
    ".appledb", ".appledesktop", ".appledouble", ".documentrevisions-v100", ".dvc", ".fseventsd", ".git", ".hg",
    ".ipynb_checkpoints", ".snapshot", ".snapshots", ".spotlight-v100", ".svn", ".temporaryitems", ".thumbnails",
    ".trash", ".trashes", ".zfs", "found.000", "lost+found", "network trash folder", "recycled", "recycler",
    "system volume information", "temporary items",
])
# fmt: on
TABLE_EXTENSIONS = frozenset(["parquet", "csv", "tsv", "json", "jsonl", "tar"])
_VERSION = 2
_RUN_FOLDER = -1  # in place of a modification time: a run folder changes all the time, and holds no data
_CLOCK_TICK_NS = 2_000_000_000  # coarser than the time stamps of any file system in use
_PSEUDO_FILE_SYSTEMS = ("/proc", "/sys", "/dev")
_MOST_SUFFIXES = 20  # that are told apart in one folder
_LONGEST_SUFFIX = 10


@dataclass
class FolderIndex:
    """What lies below a folder. Every path is relative to it, with forward slashes; lists are sorted."""

    images: pa.StringArray = field(default_factory=lambda: pa.array([], pa.string()))
    folders: list[str] = field(default_factory=list)  # those that hold images directly
    folder_of: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # for each image, into `folders`
    directories: list[str] = field(default_factory=list)  # all visible ones but the root
    tables: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)  # hidden folders with images in them
    system: dict[str, int] = field(default_factory=dict)  # folders of the system by name, which are not read
    links: list[str] = field(default_factory=list)  # links to folders that are not followed
    others: dict[str, dict[str, int]] = field(default_factory=dict)  # further files by folder and suffix

    @property
    def num_other(self) -> int:
        """Visible files that are neither images nor tables."""
        return sum(self.suffixes.values())

    @property
    def suffixes(self) -> dict[str, int]:
        """Their numbers by suffix."""
        total: Counter[str] = Counter()
        for counts in self.others.values():
            total.update(counts)
        return dict(total)


@dataclass
class _Scan:
    index: FolderIndex = field(default_factory=FolderIndex)
    images: list[str] = field(default_factory=list)
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
    path = cache / f"index-{key}.sealed"
    scan = _read(path)
    if scan is None or not _holds(root, scan):
        with locked(path):
            scan = _read(path)  # another process may have written it while this one waited
            if scan is None or not _holds(root, scan):
                scan = _scan(root)
                _write(path, scan)
    return scan.index


def make_index(images: list[str]) -> FolderIndex:
    """An index of image files at these paths, which must be sorted.

    Raises `UnicodeEncodeError` for a path that is not valid UTF-8.
    """
    parents = [path.rpartition("/")[0] for path in images]
    folders = sorted(set(parents))
    number = {folder: position for position, folder in enumerate(folders)}
    folder_of = np.fromiter(map(number.__getitem__, parents), np.int32, len(parents))
    return FolderIndex(images=pa.array(images, pa.string()), folders=folders, folder_of=folder_of)


def _is_system(name: str) -> bool:
    name = name.lower()
    return name in _SYSTEM_FOLDERS or name.startswith(".trash-")


class _Walk:
    """Lists a tree. Directories of the tree itself come before what links lead to, so that an image has the path that
    it has without links; a link to a directory that was read already is left out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scan = _Scan(time_ns=time.time_ns())
        self.hidden: set[str] = set()
        self.system: Counter[str] = Counter()
        self.seen = {_identity(os.stat(parent)) for parent in root.parents}
        here = os.stat(root).st_dev
        self.pseudo = {os.stat(path).st_dev for path in _PSEUDO_FILE_SYSTEMS if os.path.isdir(path)} - {here}

    def run(self) -> _Scan:
        pending: list[tuple[str, str | None, bool]] = [("", None, False)]  # path, hidden folder above, behind a link
        links: list[tuple[str, str | None]] = []
        while pending or links:
            if not pending:
                links.sort(reverse=True)
                link, hidden_in = links.pop()
                pending.append((link, hidden_in, True))
            relative, hidden_in, linked = pending.pop()
            for name, is_link in self._list(relative, hidden_in, linked):
                path = f"{relative}/{name}" if relative else name
                if _is_system(name):
                    self.system[name] += 1
                    continue
                inside = hidden_in or (path if name.startswith(".") else None)
                if is_link:
                    links.append((path, inside))
                else:
                    pending.append((path, inside, linked))
        index = self.scan.index
        index.tables.sort()
        index.links.sort()
        index.directories.sort()
        index.hidden, index.system = sorted(self.hidden), dict(sorted(self.system.items()))
        self.scan.images.sort()
        return self.scan

    def _list(self, relative: str, hidden_in: str | None, linked: bool) -> list[tuple[str, bool]]:
        """Take the files of a directory into the index; its directories, and whether each is a link."""
        try:
            found = os.stat(self.root / relative)
            if linked and (_identity(found) in self.seen or found.st_dev in self.pseudo):
                self.scan.index.links.append(relative)
                return []
            with os.scandir(self.root / relative) as listing:
                entries = list(listing)
        except OSError as error:
            where = shortened(str(self.root / relative), 300)
            raise UserError(f"cannot read the folder {where}: {error.strerror}") from error
        marked = relative and {"status.json", ".lock"} & {entry.name for entry in entries}
        if marked and is_run_folder(self.root / relative):
            self.scan.directories.append((relative, _RUN_FOLDER, 0))
            return []  # what a run leaves is never data, wherever its folder lies
        self.seen.add(_identity(found))
        self.scan.directories.append((relative, found.st_mtime_ns, len(entries)))
        if relative and hidden_in is None and _is_utf8(relative):
            self.scan.index.directories.append(relative)
        inner = []
        for entry in entries:
            if _is_directory(entry):
                inner.append((entry.name, entry.is_symlink()))
            elif not entry.name.startswith("."):
                self._add_file(entry, relative, hidden_in)
        return inner

    def _add_file(self, entry: os.DirEntry[str], folder: str, hidden_in: str | None) -> None:
        path = f"{folder}/{entry.name}" if folder else entry.name
        extension = os.path.splitext(entry.name)[1][1:].lower()
        # A link that leads nowhere, or to no file, counts as an image, so that it is reported; a pipe does not.
        if extension in IMAGE_EXTENSIONS and (entry.is_symlink() or _is_file(entry)):
            if hidden_in is not None:
                self.hidden.add(hidden_in)
            else:
                self.scan.images.append(path)
        elif hidden_in is not None:
            return
        elif extension in TABLE_EXTENSIONS and (_is_file(entry) or _is_dangling(entry)):
            self.scan.index.tables.append(path)
        elif _is_utf8(path):
            counts = self.scan.index.others.setdefault(folder, {})
            known = extension in counts or (len(counts) < _MOST_SUFFIXES and len(extension) <= _LONGEST_SUFFIX)
            suffix = extension if known else "..."
            counts[suffix] = counts.get(suffix, 0) + 1


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_dangling(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _scan(root: Path) -> _Scan:
    try:
        walk = _Walk(root)
    except OSError as error:
        raise UserError(f"cannot read the folder {shortened(str(root), 300)}: {error.strerror}") from error
    scan = walk.run()
    index = scan.index
    _require_utf8(str(root), *index.tables)
    try:
        made = make_index(scan.images)
    except UnicodeEncodeError as error:
        _require_utf8(error.object)
        raise
    if not _LOCALE_IS_UTF8:
        _require_utf8(*scan.images)
    index.images, index.folders, index.folder_of = made.images, made.folders, made.folder_of
    return scan


_LOCALE_IS_UTF8 = sys.getfilesystemencoding() == "utf-8"


def _require_utf8(*names: str) -> None:
    """Raise `UserError` for a name that is not UTF-8 on the disk, or that this locale cannot show."""
    for name in names:
        try:
            name.encode()
            if _LOCALE_IS_UTF8 or name.isascii():
                continue
        except UnicodeEncodeError:
            pass
        try:
            os.fsencode(name).decode()
        except UnicodeError:
            raise UserError(f"a file name is not valid UTF-8, rename the file: {shortened(ascii(name), 250)}") from None
        raise UserError(
            f"the locale's encoding is {sys.getfilesystemencoding()}, and names of files are UTF-8 "
            f"({shortened(ascii(name), 200)}): "
            "set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
        )


def _holds(root: Path, scan: _Scan) -> bool:
    try:
        for relative, mtime_ns, num_entries in scan.directories:
            directory = root / relative
            if mtime_ns == _RUN_FOLDER:
                if not is_run_folder(directory):
                    return False
                continue
            found = os.stat(directory)
            if found.st_mtime_ns != mtime_ns or not stat.S_ISDIR(found.st_mode):
                return False
            recent = mtime_ns > scan.time_ns - _CLOCK_TICK_NS
            if recent and len(os.listdir(directory)) != num_entries:
                return False
    except OSError:
        return False
    return True


_HEADER_FIELDS = ("folders", "directories", "tables", "hidden", "system", "links", "others")


def _write(path: Path, scan: _Scan) -> None:
    index = scan.index
    header = {name: getattr(index, name) for name in _HEADER_FIELDS}
    header |= {"version": _VERSION, "time_ns": scan.time_ns, "scanned": scan.directories}
    table = pa.table({"path": index.images, "folder": index.folder_of})
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"vit_dist": json.dumps(header)}), sink, compression="zstd")
    write_sealed(path, memoryview(sink.getvalue()))


def _read(path: Path) -> _Scan | None:
    content = read_sealed(path)
    if content is None:
        return None
    try:
        # Without Arrow's threads: a process that ends at once would abort in their destructors.
        table = pq.ParquetFile(pa.BufferReader(pa.py_buffer(content)), pre_buffer=False).read(use_threads=False)
        header: dict[str, Any] = json.loads((table.schema.metadata or {})[b"vit_dist"])
        if header["version"] != _VERSION:
            return None
        index = FolderIndex(
            images=table["path"].combine_chunks(),
            folder_of=table["folder"].to_numpy(),
            **{name: header[name] for name in _HEADER_FIELDS},
        )
        return _Scan(index, [], [tuple(d) for d in header["scanned"]], header["time_ns"])
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException):
        return None  # written by another version: it is built again
