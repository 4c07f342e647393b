"""Everything that `--data` accepts, as tables with the columns `id`, `image` and `label`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.data.cache import cache_folder
from vit_dist.data.columns import (
    absolute_paths,
    common_table,
    image_column,
    label_column,
    require_bytes,
    split_roles,
    usual_role,
)
from vit_dist.data.hub import datasets_cache, first_line, load_hub
from vit_dist.data.index import IMAGE_EXTENSIONS, TABLE_EXTENSIONS, FolderIndex, folder_index
from vit_dist.data.split import hold_out
from vit_dist.data.tables import extension, has_images, read_rows, split_of
from vit_dist.errors import UserError
from vit_dist.first_look import no_such_data

if TYPE_CHECKING:
    import numpy as np

    from vit_dist.options import DataOptions

_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@dataclass(frozen=True)
class Source:
    """Images with their labels, as they come: labels are not encoded yet, nothing is held out."""

    tables: dict[str, datasets.Dataset]  # by role (train, validation, test); columns id, image, label
    names: list[str] | None  # class names that the source declares, in the order of its integer labels
    description: str  # one line: what was understood
    revision: str | None = None  # commit of a hub data set


def load_source(options: DataOptions) -> Source:
    """The data that `options.data` names, not yet decoded.

    `id` is a file's path within a folder, or `<file>#<row>` or `<split>#<row>` in a table; `image` holds bytes or
    an absolute path; `label` a class name, or an integer (a `ClassLabel` where names are declared). Raises
    `UserError` for whatever cannot be found, read or understood.
    """
    data = options.data
    if data == "digits":
        return _digits(options)
    path = find(data)
    if path is None:
        splits, commit = load_hub(data, options)
        return _from_splits(splits, data, "Hugging Face hub", options, commit)
    if path.is_file():
        return _files(path.parent, {"train": [path.name]}, str(path), options)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _saved(path, options)
    return _folder(path, options)


def find(data: str) -> Path | None:
    """The file or folder that `--data` names; None if it is `digits` or may be a hub id. Reads no image.

    Raises `UserError` for a path that is not there, or a file that is not read.
    """
    path = Path(data).expanduser()
    if data == "digits" or (data and not os.path.exists(path) and not looks_like_path(data)):
        return None
    if not data or not os.path.exists(path):
        raise UserError(no_such_data(data, path))
    if path.is_file() and extension(path.name) not in TABLE_EXTENSIONS:
        raise UserError(f"--data {data}: not one of the files that are read, {_kinds(TABLE_EXTENSIONS)}")
    return Path(os.path.abspath(path))


def looks_like_path(data: str) -> bool:
    return data.startswith((".", "/", "~", "\\")) or data.count("/") > 1 or extension(data) in TABLE_EXTENSIONS


def _kinds(extensions: frozenset[str]) -> str:
    return ", ".join(f".{name}" for name in sorted(extensions))


def _folder(root: Path, options: DataOptions) -> Source:
    index = folder_index(root, cache_folder(options.cache_dir))
    tables = index.tables
    if index.images:  # class folders may well hold tables about something else
        tables = [file for file in tables if has_images(root, file, options.image_column_name)]
    if tables:
        return _files(root, _by_split(tables), str(root), options)
    if index.hidden:
        raise UserError(
            f"{root / index.hidden[0]} is a hidden folder with images in it: delete it, or rename it if it is a class"
        )
    if not index.images:
        raise UserError(f"{root}: no images ({_kinds(IMAGE_EXTENSIONS)}) and no tables ({_kinds(TABLE_EXTENSIONS)})")
    return _image_folder(root, index, options)


def _by_split(files: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(split_of(file), []).append(file)
    return groups


def _image_folder(root: Path, index: FolderIndex, options: DataOptions) -> Source:
    tops: dict[str, list[str]] = {}
    for path in index.images:
        top, slash, _ = path.partition("/")
        if not slash:
            raise UserError(
                f"{root / path} lies in no class folder: put each image into a folder named after its class"
            )
        tops.setdefault(top, []).append(path)
    # A folder called train may also be a class, beside cars and planes: then the images lie in it directly.
    nested = {path.partition("/")[0] for path in index.images if path.count("/") > 1}
    has_splits = any(usual_role(top) == "train" or top == options.train_split for top in nested)
    has_splits = has_splits or all(usual_role(top) for top in tops)
    splits = tops if has_splits else {"train": index.images}
    roles = split_roles(list(splits), options, str(root))
    tables = {role: _class_folders(root, splits[name], int(has_splits)) for role, name in roles.items()}
    num_classes = pc.count_distinct(tables["train"].data["label"]).as_py()
    notes = [f"image folder, {num_classes} class{'es' if num_classes != 1 else ''}"]
    if index.num_other:
        notes.append(f"{index.num_other:,} other file{'s' if index.num_other != 1 else ''} ignored")
    return Source(tables, None, _describe(str(root), notes, tables, set(splits) - set(roles.values())))


def _class_folders(root: Path, paths: list[str], depth: int) -> datasets.Dataset:
    """A table of images whose class is the name of the folder at `depth` in their path."""
    labels = []
    for path in paths:
        parts = path.split("/", depth + 1)
        if len(parts) < depth + 2:
            raise UserError(
                f"{root / path} lies in no class folder: put each image into a folder named after its class"
                + (", or pass --test_split none" if usual_role(parts[0]) == "test" else "")
            )
        labels.append(parts[depth])
    absolute = pc.binary_join_element_wise(str(root), pa.array(paths, pa.string()), "/")
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), absolute], fields=list(_IMAGE))
    return common_table(datasets.Dataset(pa.table({"image": images, "label": labels})), "image", "label", paths)


def _files(root: Path, splits: dict[str, list[str]], where: str, options: DataOptions) -> Source:
    """Tables in files; files without a split in their name are all there is to train on."""
    chosen = (options.train_split, options.validation_split, options.test_split)
    if not any(usual_role(name) or name in chosen for name in splits):
        splits = {"train": [file for files in splits.values() for file in files]}
    roles = split_roles(list(splits), options, where)
    tables, ids = {}, {}
    for role, split in roles.items():
        rows = read_rows(splits[split], root, datasets_cache(options.cache_dir))
        image = image_column(rows.table.features, options.image_column_name, str(root / rows.files[0]))
        if extension(rows.files[0]) == "tar":
            require_bytes(rows.table, image, str(root / rows.files[0]))
        tables[role] = absolute_paths(rows.table, image, rows.folders(root))
        ids[role] = rows.ids()
    kinds = sorted({extension(file) for split in roles.values() for file in splits[split]})
    return _source(tables, ids, where, "/".join(kinds), options, set(splits) - set(roles.values()))


def _source(
    tables: dict[str, datasets.Dataset],
    ids: dict[str, list[str]],
    where: str,
    kind: str,
    options: DataOptions,
    unused: set[str],
    revision: str | None = None,
) -> Source:
    """A source out of tables with any columns, by role."""
    common = {}
    for role, table in tables.items():
        image = image_column(table.features, options.image_column_name, f"{where} ({role})")
        label = label_column(table.features, options.label_column_name, f"{where} ({role})")
        if image == label:
            raise UserError(f"--image_column_name {image}: {where} has its labels in this column")
        common[role] = common_table(table, image, label, ids[role])
        if role == "train":
            kind += f", images in column {image}, labels in {label}"
    names = getattr(common["train"].features["label"], "names", None)
    return Source(common, names, _describe(where, [kind], common, unused), revision)


def _describe(where: str, notes: list[str], tables: dict[str, datasets.Dataset], unused: set[str]) -> str:
    sizes = ", ".join(f"{role} {len(table):,}" for role, table in tables.items())
    ignored = [f"not used: {', '.join(sorted(unused))}"] if unused else []
    return f"{where}: " + "; ".join([", ".join(notes), sizes, *ignored])


def _row_ids(splits: dict[str, str], tables: dict[str, datasets.Dataset]) -> dict[str, list[str]]:
    return {role: [f"{splits[role]}#{row}" for row in range(len(table))] for role, table in tables.items()}


def _from_splits(
    splits: dict[str, datasets.Dataset], where: str, kind: str, options: DataOptions, revision: str | None = None
) -> Source:
    roles = split_roles(list(splits), options, where)
    tables = {role: splits[split] for role, split in roles.items()}
    ids = _row_ids(roles, tables)
    return _source(tables, ids, where, kind, options, set(splits) - set(roles.values()), revision)


def _saved(path: Path, options: DataOptions) -> Source:
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a half-copied folder leads to
        raise UserError(f"cannot read {path}, written by save_to_disk: {first_line(error)}") from error
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    return _from_splits(splits, str(path), "written by save_to_disk", options)


def _digits(options: DataOptions) -> Source:
    """scikit-learn's 8x8 digits, a fifth of them, always the same, as a test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [{"bytes": _png(image), "path": None} for image in digits.images]
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[str(i) for i in range(10)])
    )
    table = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    table = common_table(table, "image", "label", [f"digits#{row}" for row in range(len(table))])
    train, test, _ = hold_out(table, 0.2, seed=0)
    splits = {"train": train, "test": test}
    roles = split_roles(list(splits), options, "digits")
    tables = {role: splits[split] for role, split in roles.items()}
    notes = ["8x8 gray images from scikit-learn, 10 classes"]
    return Source(tables, features["label"].names, _describe("digits", notes, tables, set()))


def _png(pixels: np.ndarray) -> bytes:
    """Gray levels 0 to 16 as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(file, "PNG")
    return file.getvalue()
