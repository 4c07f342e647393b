"""The files that paths and ids of a table name: found on the disk, made absolute, checked to be there."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.data.index import IMAGE_EXTENSIONS
from vit_dist.data.split_words import split_word
from vit_dist.errors import UserError
from vit_dist.listing import listed, shortened

NUM_CHECKED = 100  # files at the start of a split, and as many spread over it
_MOST_FOLDERS = 1000  # that are searched for an image
_SEARCH_DEPTH = 3
_MOST_LISTED = 3
_MOST_PARTS = 20  # folders that the images of one table are spread over
HAS_SUFFIX = rf"(?i)\.(?:{'|'.join(sorted(IMAGE_EXTENSIONS))})$"


@dataclass(frozen=True)
class Origin:
    """Where the rows of a table come from."""

    where: str  # for messages
    folders: list[Path]  # of each file: paths in it are relative to that folder
    num_rows: list[int]  # of each file
    image_root: str | None = None  # instead of those folders
    may_miss: bool = False  # some files may be missing
    role: str | None = None  # the split that the rows are, where tables are splits


def checked_rows(num_rows: int) -> np.ndarray:
    """The rows whose images are looked at before all others: the first ones, and some spread over the rest."""
    first = np.arange(min(num_rows, NUM_CHECKED))
    spread = np.linspace(0, max(0, num_rows - 1), NUM_CHECKED).astype(np.int64)
    return np.unique(np.concatenate([first, spread])) if num_rows else first


def leads_to_files(texts: pa.ChunkedArray, folder: Path) -> bool:
    """Whether some path or id is that of a file, in the folder or in one within it."""
    plain = _Reading(folder)
    readings = [plain, *_other_readings(plain, texts, None)] if len(texts) else []
    return any(
        any(_exist(replace(reading, base=base).apply(texts)))
        for base in (folder, *_folders_in(folder))
        for reading in readings
    )


def absolute_paths(texts: pa.ChunkedArray, origin: Origin) -> tuple[pa.ChunkedArray, list[str]]:
    """The paths of files, made absolute and checked, folder by folder."""
    parts: list[pa.Array] = []
    notes: dict[str, None] = {}
    start = 0
    for folder, count in _runs(origin):
        rows = texts.slice(start, count)
        reading = _reading(rows, folder, origin)
        parts += reading.apply(rows).chunks
        notes.update(dict.fromkeys(_notes(reading, folder)))
        start += count
    return pa.chunked_array(parts, pa.string()), list(notes)


@dataclass(frozen=True)
class _Reading:
    """One way to make a file's path of what a table says."""

    base: Path
    trim: bool = False  # remove spaces around it
    unquote: bool = False  # file:// links
    home: bool = False  # ~ is the home folder
    form: str | None = None  # Unicode normal form of the names on the disk
    slashes: bool = False  # backslashes of Windows become slashes
    skip: int = 0  # leave out this many leading folders
    suffixes: bool = False  # find the suffix in the folder
    further: tuple[Path, ...] = ()  # the files lie in `base` and in these folders

    def apply(self, paths: pa.ChunkedArray) -> pa.ChunkedArray:
        """Absolute paths."""
        if self.further:
            return _in_several(paths, [replace(self, base=base, further=()) for base in (self.base, *self.further)])
        if self.trim:
            paths = pc.utf8_trim_whitespace(paths)
        if self.unquote:
            paths = pa.chunked_array([[_file_of(path) for path in paths.to_pylist()]], pa.string())
        if self.slashes:
            paths = pc.replace_substring(paths, "\\", "/")
        if self.home:
            paths = pc.replace_substring_regex(paths, "^~/", os.path.expanduser("~/").replace("\\", "\\\\"))
        if self.form:
            paths = pc.utf8_normalize(paths, form=self.form)
        if self.skip:
            paths = pc.replace_substring_regex(paths, rf"^/?(?:[^/]+/){{{self.skip}}}", "")
        root = str(self.base)
        joined = pc.binary_join_element_wise(root if root != "/" else "", paths, "/")
        paths = pc.if_else(pc.starts_with(paths, "/"), paths, joined)
        return _with_suffixes(paths) if self.suffixes else paths


def _file_of(path: str | None) -> str | None:
    return unquote(urlsplit(path).path) if path is not None and path.lower().startswith("file://") else path


def _runs(origin: Origin) -> list[tuple[Path, int]]:
    """Folders and how many rows in sequence have paths relative to each."""
    runs: list[tuple[Path, int]] = []
    for folder, count in zip(origin.folders, origin.num_rows, strict=True):
        if runs and runs[-1][0] == folder:
            runs[-1] = (folder, runs[-1][1] + count)
        else:
            runs.append((folder, count))
    return runs


def _notes(reading: _Reading, folder: Path) -> list[str]:
    notes = []
    if reading.slashes:
        notes.append("backslashes in paths read as slashes")
    if reading.suffixes:
        notes.append("suffixes of files added")
    if reading.skip:
        notes.append(f"the first {reading.skip} folders of each path left out")
    if reading.base != folder:
        notes.append("image files in " + " and ".join(str(base) for base in (reading.base, *reading.further)))
    return notes


def _reading(texts: pa.ChunkedArray, folder: Path, origin: Origin) -> _Reading:
    """How the paths of a table lead to files, found by looking for some of them.

    Raises `UserError` if they do not.
    """
    rows = checked_rows(len(texts))
    sample = pa.chunked_array([pc.drop_null(texts.take(rows))], pa.string())
    root = None if origin.image_root is None else Path(os.path.abspath(Path(origin.image_root).expanduser()))
    if root is not None and not root.is_dir():
        raise UserError(f"--image_root {origin.image_root}: there is no such folder")
    plain = _Reading(root or folder)
    if len(sample) == 0:
        return plain
    tried = [(reading, _exist(reading.apply(sample))) for reading in [plain]]
    if not all(tried[0][1]):
        for reading in _other_readings(plain, sample, root):
            tried.append((reading, _exist(reading.apply(sample))))
            if all(tried[-1][1]):
                break
    best, found = max(tried, key=lambda pair: sum(pair[1]))  # the first of those that find as many
    if not any(found):
        best, found = _beside(replace(tried[-1][0], skip=0), sample, folder, origin) or (best, found)
    if not any(found):
        raise UserError(_none_found(sample, len(texts), plain.base, origin))
    if not all(found) and not origin.may_miss:
        missing = [path for path, there in zip(best.apply(sample).to_pylist(), found, strict=True) if not there]
        shown = ", ".join(shortened(os.path.relpath(path, best.base), 100) for path in missing[:_MOST_LISTED])
        raise UserError(
            f"{origin.where}: {len(missing)} of the {len(found)} files that were checked are missing in {best.base}, "
            f"for example {shown}: add them, remove their rows, or pass --on_bad_image skip --max_bad_fraction "
            f"{_fraction_of_missing(found):g} to leave them out"
        )
    return best


def _fraction_of_missing(found: Sequence[bool]) -> float:
    """Twice the fraction of the checked files, since a split may have more than its part of them; verification says
    exactly how many are missing.
    """
    return min(1.0, math.ceil(200 * (len(found) - sum(found)) / len(found)) / 100)


def _exist(paths: pa.ChunkedArray) -> list[bool]:
    def exists(path: str) -> bool:
        try:
            return os.path.lexists(path) and not os.path.isdir(path)  # a broken link is reported as such later
        except ValueError:  # a NUL byte
            return False

    return [exists(path) for path in paths.to_pylist()]


def _other_readings(plain: _Reading, sample: pa.ChunkedArray, root: Path | None) -> list[_Reading]:
    values = sample.to_pylist()
    mended = replace(
        plain,
        trim=any(value != value.strip() for value in values),
        unquote=any(value.lower().startswith("file://") for value in values),
        home=any(value.startswith("~/") for value in values),
        slashes=any("\\" in value for value in values),
    )
    readings = [mended] if mended != plain else []
    if not all(value.isascii() for value in values):  # archives made on a Mac have decomposed names
        readings += [replace(mended, form=form) for form in ("NFC", "NFD")]
    named = not all(re.search(HAS_SUFFIX, value.strip()) for value in values)
    if named:
        readings.append(replace(mended, suffixes=True))
    if root is not None:
        depth = values[0].replace("\\", "/").strip("/").count("/")
        readings += [replace(mended, skip=skip, suffixes=named) for skip in range(1, min(depth, 20) + 1)]
    return readings or [plain]


def _beside(
    reading: _Reading, sample: pa.ChunkedArray, folder: Path, origin: Origin
) -> tuple[_Reading, list[bool]] | None:
    """The reading below the one folder beside the table that has all files of the sample, if no other has any.

    Of folders for several splits, the one for the split of the table counts; of folders that have a part of the files
    each (`images_part_1`, `images_part_2`), all.
    """
    if origin.image_root is not None:
        return None
    hits = []
    for beside in _folders_in(folder):
        moved = replace(reading, base=beside)
        found = _exist(moved.apply(sample))
        if any(found):
            hits.append((moved, found))
    same_role = [hit for hit in hits if (word := split_word(hit[0].base.name)) and word.role == origin.role]
    if len(hits) > 1 and len(same_role) == 1:
        hits = same_role
    if 1 < len(hits) <= _MOST_PARTS and all(sum(each) == 1 for each in zip(*(found for _, found in hits), strict=True)):
        first, *others = (hit.base for hit, _ in hits)
        return replace(reading, base=first, further=tuple(others)), [True] * len(sample)
    if len(hits) > 1:
        hits.sort(key=lambda hit: -sum(hit[1]))
        shown = ", ".join(f"{hit.base.name} ({sum(found)})" for hit, found in hits[:5])
        raise UserError(
            f"{origin.where}: of {len(sample)} files that were checked, several folders have some: {shown}"
            f"{' and more' if len(hits) > 5 else ''}. Pass --image_root with the one that the paths are relative to, "
            f"such as {hits[0][0].base}"
        )
    return hits[0] if hits and all(hits[0][1]) else None


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
    return [folder / name for name in sorted(names)[:_MOST_FOLDERS]]


def _none_found(sample: pa.ChunkedArray, num_rows: int, base: Path, origin: Origin) -> str:
    number = f"{len(sample)} files" if len(sample) == num_rows else f"{len(sample)} files that were checked"
    first = sample[0].as_py()
    message = f"{origin.where}: none of the {number} is there"
    if all(value.strip().startswith("/") for value in sample.to_pylist()):
        message += f", for example {shortened(first, 100)}"
    else:
        message += f": paths such as {shortened(first, 60)} are relative to {base}"
    start = base if origin.image_root is None else origin.folders[0]
    places = _search(first, start)
    if not places and (other := _other_suffix(first, base)):
        return f"{message}; {other} is there: correct the suffixes, or leave them out"
    if not places:
        return f"{message}. Pass --image_root with the folder that they are relative to"
    name, folder = places[0]
    some = sample.to_pylist()[:: max(1, len(sample) // 10)]
    others = {str(found[0][1]) for value in some if (found := _search(value, start))}
    if several := sorted(others - {str(one) for _, one in places}):
        shown = listed([os.path.relpath(one, base) for one in [str(folder), *several]], 160, 4)
        return (
            f"{message}; they lie in several folders ({shown}): write each path relative to that folder into the table"
        )
    also = f" (or {places[1][1]})" if len(places) > 1 else ""
    return f"{message}; {shortened(name, 60)} lies in {folder}: pass --image_root {folder}{also}"


def _other_suffix(path: str, base: Path) -> str | None:
    """The name of a file that differs from `path` in its suffix alone."""
    folder, name = os.path.split(os.path.join(base, path.replace("\\", "/")))
    stem = os.path.splitext(name)[0]
    return next((other for other in _image_names(folder) if os.path.splitext(other)[0] == stem), None)


def _search(path: str, start: Path) -> list[tuple[str, Path]]:
    """Folders below `start` in which the end of a path, with any suffix, is a file; and the file's name there."""
    parts = [part for part in _file_of(path.strip()).replace("\\", "/").split("/") if part not in ("", ".", "..")]  # type: ignore[union-attr]
    suffixes = (
        [""]
        if re.search(HAS_SUFFIX, path.strip())
        else [
            made
            for name in ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")
            for made in (f".{name}", f".{name.upper()}")
        ]
    )
    folders, places, level = [start], [], [start]
    for _ in range(_SEARCH_DEPTH):
        level = [inner for folder in level for inner in _folders_in(folder)][: _MOST_FOLDERS - len(folders)]
        folders += level
    for skip in range(len(parts)):  # the longest end first
        end = "/".join(parts[skip:])
        places += [
            (end + suffix, folder) for folder in folders for suffix in suffixes if _is_file(folder / (end + suffix))
        ]
        if places:
            break
    return places


def _is_file(path: Path) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:
        return False


def _with_suffixes(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Paths without the suffix of an image as the one file of that name has it; others as they are.

    Raises `UserError` if two files have the name.
    """
    bare = pc.invert(pc.match_substring_regex(paths, HAS_SUFFIX))
    folders = pc.unique(pc.replace_substring_regex(paths.filter(bare), r"/[^/]*$", "")).to_pylist()
    stems: dict[str, str] = {}
    twice: dict[str, str] = {}
    for folder in folders:
        for name in _image_names(folder):
            key = f"{folder}/{os.path.splitext(name)[0]}"
            if key in stems:
                twice[key] = name
            stems[key] = f"{folder}/{name}"
    needed = pc.is_in(paths, value_set=pa.array(list(twice), pa.string()))
    if pc.any(pc.and_(bare, needed)).as_py():
        key = paths.filter(pc.and_(bare, needed))[0].as_py()
        raise UserError(f"two files have the name {key}: {stems[key]} and {twice[key]}; write the suffix in the table")
    places = pc.index_in(paths, value_set=pa.array(list(stems), pa.string()))
    named = pa.array(list(stems.values()), pa.string()).take(places.combine_chunks())
    return pc.if_else(bare, pc.coalesce(pa.chunked_array([_array(named)], pa.string()), paths), paths)


def _in_several(paths: pa.ChunkedArray, readings: Sequence[_Reading]) -> pa.ChunkedArray:
    """Each path in the one folder that has the file; in the first one where none has it.

    Lists each folder once, instead of a stat per image and folder. Raises `UserError` for a file in two folders.
    """
    made = [reading.apply(paths) for reading in readings]
    result, placed = made[0], None
    for reading, candidates in zip(readings, made, strict=True):
        parents = pc.unique(pc.replace_substring_regex(candidates, r"/[^/]*$", "")).to_pylist()
        files = [f"{parent}/{name}" for parent in parents if parent is not None for name in _image_names(parent)]
        there = pc.is_in(candidates, value_set=pa.array(files, pa.string()))
        if placed is not None and pc.any(pc.and_(placed, there)).as_py():
            row = pc.index(pc.and_(placed, there), True).as_py()
            raise UserError(
                f"{result[row].as_py()} and {candidates[row].as_py()} have the same name in the table: write the "
                f"folder of each image in it, such as {reading.base.name}/{os.path.basename(candidates[row].as_py())}"
            )
        result = pc.if_else(there, candidates, result)
        placed = there if placed is None else pc.or_(placed, there)
    return result


def _image_names(folder: str | None) -> Sequence[str]:
    try:
        names = os.listdir(folder)
    except (OSError, ValueError):
        return []
    return sorted(name for name in names if os.path.splitext(name)[1][1:].lower() in IMAGE_EXTENSIONS)


def _array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
