"""Classes, held-out and limited splits, and fingerprints; the same on every process, restart and machine."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.errors import UserError
from vit_dist.listing import listed, shortened

_HASHED_BYTES = 256 * 2**20  # of embedded images; what is beyond is sampled


def class_list(train: datasets.Dataset, names: list[str] | None) -> list[str]:
    """The classes, in the order of their indices, from the training split alone.

    Declared names keep their order, also those without an image; other names are sorted as strings, other
    integers by value. Raises `UserError` for labels that are missing, out of range or not classes at all, and for
    fewer than two classes.
    """
    labels = _labels(train, "train")
    found = pc.unique(labels).to_pylist()
    if names is not None:
        _refuse_alike(names, "the data declare")
        classes = [normal_name(name) for name in names]
    elif found and isinstance(found[0], int) and not isinstance(found[0], bool):
        classes = [str(value) for value in sorted(found)]
    else:
        classes = sorted(str(value) for value in found)
    for name in classes:
        if not name.strip() or not name.isprintable():
            where = "" if names is not None else f", for example {_examples(train, pc.equal(labels, name))}"
            raise UserError(
                f"class name {shortened(ascii(name))} is empty or has unprintable characters: rename the class{where}"
            )
    if names is None:
        _refuse_alike(_raw_names(train), "train has")
    if len(classes) < 2 or len(found) < 2:
        raise UserError(
            f"train has images of {len(found)} class{'es' if len(found) != 1 else ''}"
            f" ({listed(_class_names(train, found)) or 'none'}); at least 2 are required"
        )
    return classes


def normal_name(name: str) -> str:
    """A class name in the composed normal form (NFC): file systems and zip files differ in theirs."""
    return unicodedata.normalize("NFC", name)


def _refuse_alike(names: Sequence[str], who: str) -> None:
    """Raise `UserError` for two classes whose names look alike: one class, written in two ways.

    Letters are classes of their own: `A` and `a`.
    """
    known: dict[str, str] = {}
    pairs = []
    for name in names:
        plain = normal_name(name).strip()
        key = plain.casefold() if len(plain) > 1 else plain
        if key in known:
            pairs.append(_spelled(known[key], name))
        known.setdefault(key, name)
    if pairs:
        more = f" (and {len(pairs) - 2:,} more pairs)" if len(pairs) > 2 else ""
        raise UserError(
            f"{who} two classes whose names look alike, {'; '.join(pairs[:2])}{more}: rename one if they differ, or "
            "give both one name (case, spaces around a name and Unicode normal forms do not tell classes apart)"
        )


def _spelled(one: str, two: str) -> str:
    """Both names; with escapes where their letters look the same."""
    if normal_name(one) == normal_name(two):
        return f"{shortened(normal_name(one), 30)} ({shortened(ascii(one), 40)} and {shortened(ascii(two), 40)})"
    return f"'{shortened(one, 50)}' and '{shortened(two, 50)}'"


def _raw_names(table: datasets.Dataset) -> list[str]:
    """The labels that are names, as they are written."""
    labels = pc.unique(_arrow(table, ["label"])["label"])
    return labels.to_pylist() if _is_text(labels.type) else []


def classes_without_images(train: datasets.Dataset, classes: list[str]) -> list[str]:
    """Declared classes that no row of the encoded training split has."""
    present = set(pc.unique(_arrow(train, ["label"])["label"]).to_pylist())
    return [name for index, name in enumerate(classes) if index not in present]


def _class_names(table: datasets.Dataset, found: list[Any]) -> list[str]:
    names = getattr(table.features["label"], "names", None)
    return [str(value) if names is None else names[value] for value in found]


def encode_labels(table: datasets.Dataset, classes: list[str], split_name: str) -> datasets.Dataset:
    """The table with int64 labels: indices into `classes`, matched by name.

    Raises `UserError` for a class that `classes` lacks, a missing label, or a split without labels.
    """
    labels = _labels(table, split_name)
    feature = table.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        labels = pc.take(pa.array(map(normal_name, feature.names), pa.string()), labels)
    elif pa.types.is_boolean(labels.type):
        labels = pc.if_else(labels, "True", "False")
    elif pa.types.is_integer(labels.type):
        labels = labels.cast(pa.string())
    indices = pc.index_in(labels, value_set=pa.array(classes, labels.type))
    if indices.null_count:
        unknown = pc.is_null(indices)
        names = sorted(pc.unique(pc.filter(labels, unknown)).to_pylist())
        raise UserError(
            f"{split_name} has {'a class' if len(names) == 1 else 'classes'} that train does not have: "
            f"{listed([repr(name) for name in names], 150)}, for example {_examples(table, unknown)}; "
            "remove these images, or add training images of the class"
        )
    column = datasets.Dataset(pa.table({"label": indices.cast(pa.int64())}))
    return datasets.concatenate_datasets([table.remove_columns("label"), column], axis=1)


def stratified_split(
    table: datasets.Dataset, fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Train and validation rows, drawn by class, and a SHA-256 (hex) of the validation ids.

    Each class gives its share to within one image and keeps at least one to train on. Raises `UserError` if the
    share is not between 0 and 1, or so small that nothing would be held out.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--train_val_split {fraction}: a share between 0 and 1 is needed")
    labels = _codes(table)
    counts = np.bincount(labels)
    total = min(round(fraction * len(table)), int(np.maximum(counts - 1, 0).sum()))
    if total == 0:
        raise UserError(
            f"holding out {fraction:.3g} of {len(table)} training images ({len(counts)} classes) leaves none to "
            "validate on: raise --train_val_split, add images, or give a validation split"
        )
    rng = np.random.default_rng(seed)
    chosen = _draw(labels, _shares(counts, np.maximum(counts - 1, 0), total, rng), rng)
    validation = np.flatnonzero(chosen)
    ids = _ids(table).take(pa.array(validation)).to_pylist()
    digest = hashlib.sha256("\0".join(sorted(ids)).encode()).hexdigest()
    return table.select(np.flatnonzero(~chosen)), table.select(validation), digest


def limit(
    table: datasets.Dataset, max_samples: int | None, seed: int, flag: str = "max_..._samples"
) -> datasets.Dataset:
    """At most `max_samples` rows, drawn by class, in their original order; each class keeps one if they suffice.

    Raises `UserError`, naming `flag`, if `max_samples` is not positive.
    """
    if max_samples is None:
        return table
    if max_samples <= 0:
        raise UserError(f"--{flag} {max_samples}: at least one image is needed; leave it out to use all")
    if max_samples >= len(table):
        return table
    labels = _codes(table)
    counts = np.bincount(labels)
    rng = np.random.default_rng(seed)
    num_each = np.ones_like(counts) if max_samples >= len(counts) else np.zeros_like(counts)
    num_each += _shares(counts - num_each, counts - num_each, max_samples - int(num_each.sum()), rng)
    return table.select(np.flatnonzero(_draw(labels, num_each, rng)))


def table_fingerprint(table: datasets.Dataset, *, with_times: bool = False) -> str:
    """SHA-256 (hex) over ids, labels and images, wherever the files lie and whenever they were copied.

    A file counts by its size; embedded bytes by their length and content, of all rows up to 256 MiB in all and of
    evenly spaced rows beyond. `with_times` adds the files' change times (ctime), for caches on one machine.
    """
    digest = hashlib.sha256(b"vit_dist table 1")
    rows = _arrow(table, ["id", "label"])
    for column in (rows["id"], rows["label"]):
        _update(digest, column)
    images = _arrow(table, ["image"])["image"]
    lengths = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), -1).cast(pa.int64()).to_numpy()
    _update(digest, lengths)
    _update(digest, _file_stats(images, lengths, with_times))
    stride = max(1, -(-int(lengths.clip(0).sum()) // _HASHED_BYTES))
    for row in np.flatnonzero(lengths >= 0)[::stride].tolist():
        digest.update(images[row]["bytes"].as_buffer())
    return digest.hexdigest()


def labels_of(table: datasets.Dataset) -> np.ndarray:
    """The labels of an encoded table, int64 (rows,)."""
    return _arrow(table, ["label"])["label"].to_numpy()


def classes_hash(classes: list[str]) -> str:
    """SHA-256 (hex) of the class names and their order."""
    return hashlib.sha256(json.dumps(classes).encode()).hexdigest()


def _arrow(table: datasets.Dataset, columns: list[str]) -> pa.Table:
    """Columns as they are stored, rows as the table orders them."""
    return table.select_columns(columns).with_format("arrow")[:]


def _ids(table: datasets.Dataset) -> pa.ChunkedArray:
    return _arrow(table, ["id"])["id"]


def _labels(table: datasets.Dataset, split_name: str) -> pa.ChunkedArray:
    """Labels as string, bool or int64 without nulls, within the range of the declared names."""
    labels = _arrow(table, ["label"])["label"]
    kind = labels.type.value_type if pa.types.is_dictionary(labels.type) else labels.type
    if not any(is_kind(kind) for is_kind in _LABEL_KINDS):
        raise UserError(
            f"{split_name}: labels are {shortened(str(kind))}, but one class per image is needed, a name or an integer"
        )
    labels = labels.cast(kind)
    if _is_text(kind):
        labels = _composed(labels)
    missing = pc.is_null(labels, nan_is_null=True)
    _refuse(table, missing, split_name, "no label")
    if pa.types.is_floating(kind):
        _refuse(table, pc.not_equal(labels, pc.trunc(labels)), split_name, "a label that is not a whole number")
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        labels = labels.cast(pa.int64())
        low = pc.less(labels, 0)
        if pc.all(pc.equal(labels, -1)).as_py():
            low = pc.is_valid(labels)
        _refuse(table, low, split_name, f"a label below 0 ({pc.min(labels).as_py()})")
        names = getattr(table.features["label"], "names", None)
        if names is not None:
            wrong = pc.greater_equal(labels, len(names))
            last = shortened(names[-1]) if names else "there is none"
            _refuse(table, wrong, split_name, f"a label above {len(names) - 1}, the last class ({last})")
    return labels


def _composed(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Names in the composed normal form; each of them is looked at once."""
    names = pc.unique(labels)
    composed = pc.utf8_normalize(names, form="NFC")
    return labels if composed.equals(names) else pc.take(composed, pc.index_in(labels, value_set=names))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


_LABEL_KINDS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
)


def _refuse(table: datasets.Dataset, wrong: pa.ChunkedArray, split_name: str, what: str) -> None:
    """Raise `UserError` if a row is `wrong`."""
    count = pc.sum(wrong).as_py() or 0
    if count == 0:
        return
    if count == len(table):
        advice = ": pass --test_split none" if split_name == "test" else ""
        raise UserError(f"{split_name} is not labelled, all its {count:,} images have {what}{advice}")
    raise UserError(
        f"{split_name}: {count:,} of {len(table):,} images have {what}, for example {_examples(table, wrong)}; "
        "correct or remove them"
    )


def _examples(table: datasets.Dataset, mask: pa.ChunkedArray) -> str:
    ids = _ids(table).take(pa.array(np.flatnonzero(np.asarray(mask))[:3])).to_pylist()
    return listed(ids, 130)


def _codes(table: datasets.Dataset) -> np.ndarray:
    """For every row the number of its class among the classes that occur, int64 (n,)."""
    labels = _arrow(table, ["label"])["label"].combine_chunks()
    return np.unique(labels.to_numpy(zero_copy_only=False), return_inverse=True)[1]


def _shares(weights: np.ndarray, most: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """How many of `total` each class gets: in proportion to `weights`, at most `most`, by largest remainder."""
    exact = weights * (total / max(1, int(weights.sum())))
    shares = np.minimum(np.floor(exact).astype(np.int64), most)
    while (rest := total - int(shares.sum())) > 0:
        open_ = np.flatnonzero(shares < most)
        ties = rng.permutation(len(open_))  # else the first classes would always win
        order = open_[np.lexsort((ties, (shares - exact)[open_]))]
        shares[order[:rest]] += 1
    return shares


def _draw(labels: np.ndarray, num_each: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask, bool (n,), that has `num_each[c]` random rows of each class c."""
    order = np.lexsort((rng.permutation(len(labels)), labels))  # rows by class, shuffled within
    counts = np.bincount(labels, minlength=len(num_each))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(labels), bool)
    chosen[order] = rank < np.repeat(num_each, counts)
    return chosen


def _file_stats(images: pa.ChunkedArray, lengths: np.ndarray, with_times: bool) -> np.ndarray:
    """Sizes, and change times in ns, of the images that are files; -1 for those that are missing."""
    paths = pc.struct_field(images, "path").filter(pa.array(lengths < 0)).to_pylist()

    def stat(path: str | None) -> tuple[int, int]:
        try:
            found = os.stat(path or "")
        except OSError:
            return -1, -1
        return found.st_size, found.st_ctime_ns if with_times else 0

    chunks = [paths[start : start + 1000] for start in range(0, len(paths), 1000)]
    with ThreadPoolExecutor(16) as pool:  # network file systems answer many questions at once
        found = [pair for chunk in pool.map(lambda chunk: list(map(stat, chunk)), chunks) for pair in chunk]
    return np.array(found, np.int64)


def _update(digest: Any, values: np.ndarray | pa.ChunkedArray) -> None:
    """Hash values so that neither their chunks nor their Arrow representation matter."""
    if isinstance(values, pa.ChunkedArray):
        if pa.types.is_integer(values.type):
            values = values.to_numpy()
        else:
            text = [str(value) for value in values.to_pylist()]
            digest.update("\0".join(text).encode())
            values = np.array([len(value) for value in text])
    digest.update(values.astype("<i8").tobytes())
