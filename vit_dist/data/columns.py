"""Which split plays which role, which columns hold images and labels, and the common shape of both."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.errors import UserError

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

ROLES = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_PATH_OR_BYTES = ("string", "large_string", "binary", "large_binary")
# fmt: off
_IMAGE_NAMES = frozenset([
    "image", "img", "picture", "photo", "file_name", "filename", "file", "path", "image_path", "filepath",
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif",
])
# fmt: on
_LABEL_NAMES = frozenset(["label", "labels", "fine_label", "target", "cls", "class"])


def split_roles(splits: Sequence[str], options: DataOptions, where: str) -> dict[str, str]:
    """The name of the split for each of train, validation and test that there is one for.

    Raises `UserError` if a split that the options name is missing, if one split would play two roles, or if
    nothing is there to train on.
    """
    roles: dict[str, str] = {}
    for role in ROLES:
        chosen: str | None = getattr(options, f"{role}_split")
        if role == "test" and chosen is not None and chosen.lower() == "none":
            continue
        if chosen is not None and chosen not in splits:
            raise UserError(f"--{role}_split {chosen}: {where} has no such split; it has {', '.join(splits)}")
        name = chosen or _usual_name(role, splits, taken=roles.values())
        if name is None:
            continue
        if name in roles.values():
            raise UserError(f"--{role}_split {name}: this split of {where} already has another role")
        roles[role] = name
    if "train" not in roles:
        raise UserError(f"{where} has no split to train on, only {', '.join(splits)}: name one with --train_split")
    return roles


def usual_role(name: str) -> str | None:
    """The role that a split of this name plays unless the user says otherwise."""
    return next((role for role in ROLES if name.lower() in SPLIT_NAMES[role]), None)


def _usual_name(role: str, splits: Sequence[str], taken: Iterable[str]) -> str | None:
    free = [name for name in splits if name not in set(taken)]
    for usual in SPLIT_NAMES[role]:
        for name in free:
            if name.lower() == usual:
                return name
    return None


def image_column(features: Any, override: str | None, where: str) -> str:
    """The one column of `features` that holds images; raises `UserError` if there is not exactly one."""
    typed = [name for name, feature in features.items() if _holds_images(feature)]
    named = [
        name
        for name, feature in features.items()
        if _is_known(name, _IMAGE_NAMES) and getattr(feature, "dtype", "") in _PATH_OR_BYTES
    ]
    return _choose("image", typed or named, features, override, where, _IMAGE_NAMES)


def label_column(features: Any, override: str | None, where: str) -> str:
    """The one column of `features` that holds class labels; raises `UserError` if there is not exactly one."""
    candidates = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel) or _is_known(name, _LABEL_NAMES)
    ]
    return _choose("label", candidates, features, override, where, _LABEL_NAMES)


def _is_known(name: str, known: frozenset[str]) -> bool:
    return name.rsplit(".", 1)[-1].lower() in known  # `json.label` is the field `label` of `json`


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _choose(
    kind: str, candidates: list[str], features: Any, override: str | None, where: str, known: frozenset[str]
) -> str:
    flag = f"--{kind}_column_name"
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    if override is not None:
        if override in features:
            return override
        close = difflib.get_close_matches(override, list(features), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"{flag} {override}: {where} has no such column{hint}; it has {columns}")
    if len(candidates) > 1:
        candidates = [name for name in candidates if _is_known(name, known)] or candidates
    if len(candidates) == 1:
        return candidates[0]
    found = f"several columns could hold the {kind}s" if candidates else f"no column looks like it holds {kind}s"
    raise UserError(f"{where}: {found}; name one with {flag}. Columns: {columns}")


def _type_name(feature: Any) -> str:
    names = getattr(feature, "names", None)
    if names is not None:
        return f"ClassLabel of {len(names)}"
    if isinstance(feature, dict):
        return "struct<" + ", ".join(feature) + ">"
    return str(getattr(feature, "dtype", type(feature).__name__)).rsplit(".", 1)[-1].replace("Image", "image")


def common_table(table: datasets.Dataset, image: str, label: str, ids: Sequence[str]) -> datasets.Dataset:
    """Columns `id` (string), `image` (bytes or path, not decoded) and `label` (as it is) of some rows.

    Raises `UserError` if the image column holds something else.
    """
    table = table.select_columns([image, label])
    try:
        table = table.cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(f"column {image} holds no images: {error}") from error
    table = table.rename_columns({image: "image", label: "label"})
    names = datasets.Dataset(pa.table({"id": pa.array(ids, pa.string())}))
    return datasets.concatenate_datasets([names, table], axis=1)


def require_bytes(table: datasets.Dataset, column: str, where: str) -> None:
    """Raises `UserError` if images of an archive are given by a path, which could lead anywhere."""
    images = table.data.column(column)
    if _is_text(images.type) or _names_files(images):
        raise UserError(
            f"{where}: column {column} has names of files instead of images; the images of .tar shards lie in them"
        )


def absolute_paths(table: datasets.Dataset, column: str, folders: Sequence[Path]) -> datasets.Dataset:
    """The rows of a table, images that are given by a path made absolute: it is relative to the row's folder."""
    images = table.data.column(column)
    if not _is_text(images.type) and not _names_files(images):
        return table  # as it is, it stays mapped into memory
    chunks = [datasets.Image().cast_storage(chunk).flatten() for chunk in images.chunks]
    data = pa.chunked_array([chunk[0] for chunk in chunks], pa.binary())
    paths = pa.chunked_array([chunk[1] for chunk in chunks], pa.string())
    absolute = [
        os.path.join(folder, path) if path is not None and is_file else path
        for path, is_file, folder in zip(paths.to_pylist(), data.is_null().to_pylist(), folders, strict=True)
    ]
    fields = [data.combine_chunks(), pa.array(absolute, pa.string())]
    stored = pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=pc.is_null(images).combine_chunks())
    return datasets.Dataset(
        pa.table({**{name: table.data.column(name) for name in table.column_names if name != column}, column: stored})
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _names_files(images: pa.ChunkedArray) -> bool:
    """Whether some image is a path without bytes."""
    if not pa.types.is_struct(images.type) or images.type.get_field_index("path") < 0:
        return False
    paths = pc.struct_field(images, "path")
    if images.type.get_field_index("bytes") < 0:
        return True
    missing = pc.and_(pc.is_null(pc.struct_field(images, "bytes")), pc.is_valid(paths))
    return bool(pc.any(missing).as_py())
