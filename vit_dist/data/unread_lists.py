"""Files beside class folders that name images and are not read: they may hold other labels, or assign splits."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vit_dist.data.columns import is_image_name
from vit_dist.data.index import FolderIndex
from vit_dist.data.split_words import split_word
from vit_dist.data.table_files import is_side_table
from vit_dist.data.tables import extension

# What is looked at is bounded, so that a folder of a million text files costs no more than a folder of one hundred.
_MOST_FILES = 100
_MOST_IN_A_FOLDER = 20
_MOST_BYTES = 2**16  # of a text file; of a JSON file, whose images may come late, 16 times as many
_MOST_ROWS = 1000  # of a Parquet file
_ROWS_AT_ONCE = 2**20  # images whose names are compared in one go; 100 bytes of memory each

_DEEPEST = 2  # folders above a list
_LISTS = frozenset(["txt", "lst", "list"])
_DOCUMENTS = re.compile(r"(read.?me|licen[sc]e|copying|changes|notice|citation|requirements).*|.*(md5|sha\d*)(sums?)?")
_LABEL_WORDS = re.compile(r"label|split|annot|list|images|fold|class")
_CHECKSUM = re.compile(r"([0-9a-f]{32,128})\s+\*?\S|(MD5|SHA\d+) ?\(", re.IGNORECASE)
_SEPARATORS = (re.compile(r"[,;\t|\"'\s\[\]{}]+|:\s"), re.compile(r"\s*[,;\t|\"\r\n]\s*"))  # the second keeps spaces
_ENOUGH_NUMBERS = 3


@dataclass
class _Words:
    """Words of a file that may be names of images."""

    words: set[str] = field(default_factory=set)
    image_column: set[str] = field(default_factory=set)  # those under a header such as `image_id`
    few_are_enough: bool = True  # one name of an image tells; a text may mention one in a sentence


def lists_that_name_images(root: Path, index: FolderIndex, known: Collection[str]) -> list[str]:
    """The files that name images of the folder: in the root, or in folders without images up to two levels deep.

    Args:
        root: The data folder.
        index: What lies in it.
        known: Files that are read, or known to be no lists.
    """
    files = [file for file in _candidates(root, index) if file not in known]
    words = {file: _read(root / file) for file in files}
    asked = set().union(*(found.words for found in words.values())) if words else set()
    if not asked:
        return []
    named = _names_of_images(index, asked.union(PurePosixPath(file).stem for file in files))
    return [file for file in files if _tells(file, words[file], named)]


def _candidates(root: Path, index: FolderIndex) -> list[str]:
    filled = set(index.folders)
    places = [folder for folder in ["", *index.directories] if folder not in filled and _depth(folder) <= _DEEPEST]
    by_folder: dict[str, list[str]] = {folder: [] for folder in places if folder}
    by_folder[""] = []  # the root counts even with images in it
    for file in index.tables:
        folder = file.rpartition("/")[0]
        if folder in by_folder and extension(file) != "tar":
            by_folder[folder].append(file)
    for folder in by_folder:
        if _LISTS & index.others.get(folder, {}).keys():
            by_folder[folder] += [f"{folder}/{name}".lstrip("/") for name in _text_files(root / folder)]
    chosen = [sorted(files, key=_order)[:_MOST_IN_A_FOLDER] for _, files in sorted(by_folder.items(), key=_shallow)]
    return [file for files in chosen for file in files][:_MOST_FILES]


def _shallow(item: tuple[str, list[str]]) -> tuple[int, str]:
    return _depth(item[0]), item[0]


def _depth(folder: str) -> int:
    return folder.count("/") + 1 if folder else 0


def _order(file: str) -> tuple[bool, str]:
    """Names that speak of labels and splits first: the others may be one file for each image."""
    stem = PurePosixPath(file).stem.lower()
    return split_word(stem) is None and _LABEL_WORDS.search(stem) is None, file


def _text_files(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [name for name in names if extension(name) in _LISTS and not _DOCUMENTS.fullmatch(name[:-4].lower())]


def _read(path: Path) -> _Words:
    kind = extension(path.name)
    try:
        if kind == "parquet":
            return _read_parquet(path)
        limit = _MOST_BYTES * (16 if kind in ("json", "jsonl") else 1)
        with open(path, "rb") as file:
            text = file.read(limit)
    except (OSError, ValueError, pa.ArrowException):
        return _Words()
    encoding = "utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return _read_text(text.decode(encoding, errors="replace"), kind)


def _read_text(text: str, kind: str) -> _Words:
    lines = [line for line in text.splitlines() if not _CHECKSUM.match(line)]
    kept = "\n".join(lines)
    found = _Words(_paths(word for separator in _SEPARATORS for word in separator.split(kept)))
    found.few_are_enough = kind not in _LISTS or len(lines) == 1
    checksums = text.splitlines()[:_MOST_ROWS] if len(lines) < len(text.splitlines()) else []
    found.words |= {line.split()[0] for line in checksums if line.strip()}  # an image may be called by its checksum
    if kind in ("csv", "tsv") and lines:
        delimiter = max(",;\t|", key=lines[0].count)
        rows = list(csv.reader(lines, delimiter=delimiter, strict=False))
        columns = [place for place, name in enumerate(rows[0]) if is_image_name(name)]
        found.image_column = _paths(row[place] for row in rows[1:] for place in columns if place < len(row))
    return found


def _read_parquet(path: Path) -> _Words:
    with pq.ParquetFile(path) as file:
        batch = next(file.iter_batches(batch_size=_MOST_ROWS), None)
    found = _Words()
    for name, column in zip(batch.schema.names, batch.columns, strict=True) if batch is not None else ():
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_integer(column.type):
            words = _paths(str(value) for value in column.to_pylist() if value is not None)
            found.words |= words
            if is_image_name(name):
                found.image_column |= words
    return found


def _paths(words: Iterable[str]) -> set[str]:
    """The last part of each path, and the last two."""
    found = set()
    for word in words:
        parts = word.strip().replace("\\", "/").split("/")
        if parts[-1]:
            found.add(parts[-1])
            if len(parts) > 1 and parts[-2] not in ("", ".", ".."):
                found.add("/".join(parts[-2:]))
    return found


def _names_of_images(index: FolderIndex, asked: set[str]) -> set[str]:
    """Those of the words that are an image's name, its name without the suffix, or either behind its folder's name."""
    last = {word.rpartition("/")[2] for word in asked}
    wanted = pa.array(sorted(asked), pa.string())
    found: set[str] = set()
    for start in range(0, len(index.images), _ROWS_AT_ONCE):
        paths = index.images.slice(start, _ROWS_AT_ONCE)
        names = _last_parts(paths, "/")
        suffixes = {end.rpartition(".")[2] for end in pc.unique(pc.utf8_slice_codeunits(names, -6)).to_pylist()}
        files = pa.array(
            sorted(last.union(*({f"{word}.{suffix}" for word in last} for suffix in suffixes))), pa.string()
        )
        matched = pc.is_in(names, value_set=files)
        names, tails = names.filter(matched), paths.filter(matched)
        tails = pc.replace_substring_regex(tails, r"^.*/([^/]+/[^/]+)$", r"\1")
        for forms in (tails, names):
            for column in (forms, pc.replace_substring_regex(forms, r"\.[^./]*$", "")):
                found |= set(pc.unique(column.filter(pc.is_in(column, value_set=wanted))).to_pylist())
    folders = {part for folder in index.folders for part in folder.split("/")}
    return found - folders


def _last_parts(paths: pa.Array, separator: str) -> pa.Array:
    parts = pc.split_pattern(paths, separator, max_splits=1, reverse=True)
    return parts.flatten().take(pa.array(np.diff(parts.offsets.to_numpy()).cumsum() - 1))


def _tells(file: str, words: _Words, named: set[str]) -> bool:
    if PurePosixPath(file).stem in named:
        return False  # one file for each image
    matched = words.words & named
    clear = {word for word in matched if _is_clear(word)}
    numbers = {word for word in words.image_column & named if word.isdigit()}
    return len(clear) > (0 if words.few_are_enough else 1) or (
        len(numbers) >= _ENOUGH_NUMBERS and not is_side_table(file)  # numbers of classes
    )


def _is_clear(word: str) -> bool:
    """Whether a word is hardly anything else than the name of an image: `x.jpg`, `cat/7`, `IMG_7`, but not `7`."""
    return "/" in word or "." in word or (any(map(str.isdigit, word)) and not word.isdigit())
