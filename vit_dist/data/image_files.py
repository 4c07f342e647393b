"""Images of a column: bytes as they are, or the files that paths, ids and links name, checked to be there."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.data.image_paths import HAS_SUFFIX, NUM_CHECKED, Origin, absolute_paths, checked_rows, leads_to_files
from vit_dist.data.split_words import has_mask_word
from vit_dist.errors import UserError
from vit_dist.listing import shortened

_STORED = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_URL = re.compile(r"(?i)(?!file:)[a-z][a-z0-9+.-]+://")
_DATA_URL = r"^data:[^,]{0,100};base64,"
# How files of the usual formats begin, in base64.
_BASE64_IMAGE = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-9A-Za-z]|SUkqA|TU0AK)[A-Za-z0-9+/_\s-]{24,}")


def stored_images(column: pa.ChunkedArray, name: str, origin: Origin) -> tuple[pa.ChunkedArray | None, list[str]]:
    """The images of a column as bytes or absolute paths, and notes on how they were found.

    Args:
        column: Strings (paths, ids, base64), integers (ids), bytes, or structs of bytes and path.
        name: Its name.
        origin: Where the rows come from.

    Returns:
        Structs of bytes and path; None if the column is to stay as it is.

    Raises:
        UserError: The column holds no images, or the files that were checked are missing.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        raise UserError(f"{origin.where}: column {name} holds {_list_content(kind)}")
    if pa.types.is_binary_view(kind):
        data = column.cast(pa.binary())
        return _stored(data, pc.if_else(pc.is_null(data), None, pa.scalar(None, pa.string())), pc.is_null(data)), []
    if pa.types.is_integer(kind) or _is_text(kind):
        column = column.cast(kind).cast(pa.string())
        return _from_text(column, name, origin)
    if not _names_files(column):
        return None, []  # as it is, it stays mapped into memory
    data, paths = _parts(column)
    found, notes = _from_text(pc.if_else(pc.is_null(data), paths, None), name, origin)
    links = pc.struct_field(found, "path")
    return _stored(data, pc.if_else(pc.is_null(data), links, paths), pc.is_null(column)), notes


def _list_content(kind: pa.DataType) -> str:
    inner = kind
    while hasattr(inner, "value_type"):
        inner = inner.value_type
    if pa.types.is_struct(inner) or _is_text(inner) or pa.types.is_binary(inner):
        return "lists of images: one image per row is needed"
    return "arrays of numbers, not encoded images: store PNG or JPEG bytes, or paths of image files"


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def names_files(column: pa.ChunkedArray) -> bool:
    """Whether some image is given by the path of a file."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return _is_text(kind) or pa.types.is_integer(kind) or _names_files(column)


def file_name_columns(table: pa.Table) -> list[str]:
    """The text columns whose values are names of image files, by the first rows; not those of masks by their names."""
    found = []
    for name in table.column_names:
        column = table.column(name)
        if _is_text(column.type) and not has_mask_word(name):
            values = pc.drop_null(column.slice(0, NUM_CHECKED))
            if len(values) and pc.all(pc.match_substring_regex(pc.utf8_trim_whitespace(values), HAS_SUFFIX)).as_py():
                found.append(name)
    return found


def leads_to_images(column: pa.ChunkedArray, table: Path) -> bool:
    """Whether a path or an id of a column is that of a file, beside the table or in a folder there."""
    if not names_files(column) or pa.types.is_struct(column.type):
        return False
    return leads_to_files(pa.chunked_array([pc.drop_null(column.cast(pa.string()))]), table.parent)


def _names_files(images: pa.ChunkedArray) -> bool:
    if not pa.types.is_struct(images.type) or images.type.get_field_index("path") < 0:
        return False
    paths = pc.struct_field(images, "path")
    if images.type.get_field_index("bytes") < 0:
        return True
    missing = pc.and_(pc.is_null(pc.struct_field(images, "bytes")), pc.is_valid(paths))
    return bool(pc.any(missing).as_py())


def _parts(images: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    paths = pc.struct_field(images, "path").cast(pa.string())
    if images.type.get_field_index("bytes") < 0:
        return pa.chunked_array([pa.nulls(len(chunk), pa.binary()) for chunk in paths.chunks], pa.binary()), paths
    return pc.struct_field(images, "bytes").cast(pa.binary()), paths


def _stored(data: pa.ChunkedArray, paths: pa.ChunkedArray, missing: pa.ChunkedArray) -> pa.ChunkedArray:
    # Batch by batch: in one piece the paths of some ten million images exceed the 2 GiB of an Arrow string array.
    parts = pa.table([data, paths, missing], names=["bytes", "path", "missing"])
    chunks = [
        pa.StructArray.from_arrays(batch.columns[:2], ["bytes", "path"], mask=batch.column(2))
        for batch in parts.to_batches()
    ]
    return pa.chunked_array(chunks, _STORED)


def _from_text(texts: pa.ChunkedArray, name: str, origin: Origin) -> tuple[pa.ChunkedArray, list[str]]:
    sample = [text for text in texts.take(checked_rows(len(texts))).to_pylist() if text]
    if any(_is_base64(text) for text in sample):
        return _from_base64(texts, name, origin), ["images in base64"]
    for text in sample[:10]:
        if reason := _no_path(text):
            raise UserError(f"{origin.where}: column {name} holds {reason}")
    paths, notes = absolute_paths(texts, origin)
    data = pa.chunked_array([pa.nulls(len(paths), pa.binary())], pa.binary())
    return _stored(data, paths, pc.is_null(paths)), notes


def _is_base64(text: str) -> bool:
    return re.match(_DATA_URL, text) is not None or _BASE64_IMAGE.match(text) is not None


def _no_path(text: str) -> str | None:
    """What a text is if it is no path; None if it may be one."""
    text = text.strip()
    if _URL.match(text):
        return f"links ({shortened(text)}), which are not downloaded: download the images first"
    if re.match(r"b['\"]", text) or re.match(r"\{\s*['\"](?:bytes|path)['\"]", text):
        return "bytes printed as text, which cannot be read back: save the table as Parquet"
    if text.startswith("<") and text.endswith(">"):
        return f"the names of Python objects ({shortened(text)}), not images: save paths, or bytes in Parquet"
    if text.startswith(("[", "array(")) or re.match(r"(?:\d{1,3}[ ,;]+){16}", text):
        return "pixel values as text, not encoded images: store PNG or JPEG bytes, or paths of image files"
    return None


def _from_base64(texts: pa.ChunkedArray, name: str, origin: Origin) -> pa.ChunkedArray:
    texts = pc.replace_substring_regex(texts, _DATA_URL, "")
    texts = pc.replace_substring_regex(texts, r"\s+", "")
    texts = pc.replace_substring(pc.replace_substring(texts, "-", "+"), "_", "/")
    chunks, row = [], 0
    for chunk in texts.chunks:
        data = []
        for text in chunk:
            try:
                data.append(base64.b64decode(text.as_buffer(), validate=True) if text.is_valid else None)
            except (binascii.Error, ValueError) as error:
                raise UserError(f"{origin.where}: column {name} is not base64 in row {row}: {error}") from error
            row += 1
        fields = [pa.array(data, pa.binary()), pa.nulls(len(data), pa.string())]
        chunks.append(pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=chunk.is_null()))
    return pa.chunked_array(chunks, _STORED)
