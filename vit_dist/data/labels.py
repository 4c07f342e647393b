"""The label column of a table: which one it is, and whether its values are one class per image."""

from __future__ import annotations

import re
from collections.abc import Iterable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.data.columns import is_guess, label_candidates, label_column, same_labels, usual_role
from vit_dist.errors import UserError
from vit_dist.listing import listed, shortened

_MIN_ROWS_OF_IDS = 20  # with as many distinct labels as rows from here on, labels are taken for ids
_MOST_ONE_HOT = 500  # columns that are looked at
_MOST_SPELLINGS = 8  # of yes and no in one column
_YES = frozenset(["1", "true", "t", "yes", "y", "x", "+", "ja", "oui", "si", "sim", "present", "positive"])
_NO = frozenset(
    ["0", "-1", "false", "f", "no", "n", "", "none", "nan", "-", "nein", "non", "absent", "negative", "neg"]
)
_DECIMAL = r"^-?\d+[.]\d*$|^-?\d*[.]\d+$"
_WHOLE_DECIMAL = r"^-?\d+[.]0*$"


def find_labels(table: datasets.Dataset, image: str, override: str | None, where: str) -> tuple[str, list[str]]:
    """The column with the labels, and notes on how it was chosen.

    Of columns that give the same classes (`label` and `label_name`), the one with names. Raises `UserError` if there
    is not exactly one.
    """
    features = table.features
    if override is None:
        candidates = label_candidates({name: features[name] for name in features if name != image})
        group = [candidates[0], *same_labels(features, candidates[0])] if candidates else []
        group = [name for name in group if name != image]
        if len(group) > 1 and set(candidates) <= set(group):
            return _of_the_same(table, group, where)
        if not candidates and (reason := _one_hot(table, image)):
            raise UserError(f"{where}: {reason}")
    others = {name: feature for name, feature in features.items() if name != image}
    name = label_column(features if override is not None else others, override, where)
    guess = [f"{name} is a guess: --label_column_name"] if override is None and is_guess(name, features[name]) else []
    return name, [*guess, *_judge_flags(table, image, name, where, named=override is not None)]


def _of_the_same(table: datasets.Dataset, group: list[str], where: str) -> tuple[str, list[str]]:
    """Of columns named alike, the one with names if all give the same classes."""
    declared = [name for name in group if isinstance(table.features[name], datasets.ClassLabel)]
    if len(declared) == 1:
        return declared[0], []
    for other in group[1:]:
        if not _one_to_one(table, group[0], other):
            raise UserError(
                f"{where}: columns {group[0]} and {other} give different classes: name one with --label_column_name"
            )
    texts = [name for name in group if pa.types.is_string(_value_type(table.data.column(name)))]
    chosen = (texts or group)[0]
    rest = ", ".join(name for name in group if name != chosen)
    return chosen, [f"the same classes in {rest}"]


def _value_type(column: pa.ChunkedArray) -> pa.DataType:
    return column.type.value_type if pa.types.is_dictionary(column.type) else column.type


def _one_to_one(table: datasets.Dataset, first: str, second: str) -> bool:
    columns = [table.data.column(name) for name in (first, second)]
    if any(pa.types.is_nested(column.type) for column in columns):
        return False
    plain = [column.cast(_value_type(column)) for column in columns]
    pairs = pa.table(plain, names=["first", "second"]).group_by(["first", "second"]).aggregate([])
    return all(len(pairs) == pc.count_distinct(column, mode="all").as_py() for column in plain)


def _flags(table: datasets.Dataset, image: str) -> dict[str, np.ndarray]:
    """The columns of which each value says yes or no (0 and 1, -1 and 1, False and True), bool (rows,) each."""
    found: dict[str, np.ndarray] = {}
    for name in [name for name in table.column_names if name != image][:_MOST_ONE_HOT]:
        column = table.data.column(name)
        if pa.types.is_nested(column.type) or isinstance(table.features[name], datasets.ClassLabel):
            continue
        values = pc.unique(column.cast(_value_type(column)))
        texts = [str(value).strip().lower().removesuffix(".0") for value in values.to_pylist()[:_MOST_SPELLINGS]]
        is_yes = [text in _YES for text in texts]
        if len(texts) == len(values) and any(is_yes) and not all(is_yes) and set(texts) <= _YES | _NO:
            places = pc.index_in(column.cast(values.type), value_set=values)
            found[name] = np.array(is_yes)[places.to_numpy()]
    return found


def _one_hot(table: datasets.Dataset, image: str) -> str | None:
    """Why a table has no label column if its classes are columns of 0 and 1; None if they are not."""
    flags = _flags(table, image)
    if len(flags) < 2:
        return None
    per_row = np.sum(list(flags.values()), axis=0)
    what = f"columns {listed(flags, 120)} hold {_spelled(table, flags)}"
    if (per_row > 1).any():
        choice = f"write one column label, or take one with --label_column_name {shortened(next(iter(flags)))}"
        return f"{what} (several classes per image, of which one is supported): {choice}"
    return f"{what} (one-hot): write one column label with the class of each row"


def _spelled(table: datasets.Dataset, names: Iterable[str]) -> str:
    """The two most frequent values of the first column, as the table spells them: `0 and 1`, `no and yes`."""
    column = table.data.column(next(iter(names)))
    counts = pc.value_counts(column.cast(_value_type(column))).to_pylist()
    common = sorted(counts, key=lambda one: -one["counts"])[:2]
    texts = ["" if one["values"] is None else str(one["values"]).strip() for one in common]
    return " and ".join(sorted(text or "nothing" for text in texts))


def _judge_flags(table: datasets.Dataset, image: str, label: str, where: str, named: bool) -> list[str]:
    """A note on columns of 0 and 1 beside the labels; `named`: the user has named the column of the labels.

    Raises `UserError` if the labels are one column of a one-hot encoding of three or more classes: they would merge all
    classes but one.
    """
    flags = _flags(table, image)
    if label not in flags:
        rest = [name for name in flags if name != label]
        exact = len(rest) > 1 and (np.sum([flags[name] for name in rest], axis=0) == 1).all()
        if not exact or _one_to_one_hot(table, label, flags):
            return []
        return [f"not used: {listed(rest, 100, 4)} ({_spelled(table, rest)}, one-hot)"]
    if len(flags) < 2:
        return []
    others = [name for name in flags if name != label and not (flags[name] & flags[label]).any()]
    per_row = np.sum([flags[name] for name in (label, *others)], axis=0)
    if len(others) > 1 and (per_row == 1).all() and named:
        raise UserError(
            f"{where}: column {shortened(label)} is part of a one-hot encoding with {listed(others, 120)}: its classes "
            "would be 0 and 1. Write one column label with the class of each row, and name that column"
        )
    rest = [name for name in flags if name != label and usual_role(name.lower().removeprefix("is_")) is None]
    return [f"not used: {listed(rest, 100, 4)} ({_spelled(table, rest)}, as in {shortened(label)})"] if rest else []


def _one_to_one_hot(table: datasets.Dataset, label: str, flags: dict[str, np.ndarray]) -> bool:
    """Whether the columns are the one-hot encoding of the labels themselves."""
    names = [name for name in flags if name != label]
    code = np.argmax(np.stack([flags[name] for name in names], axis=1), axis=1)
    column = table.data.column(label)
    if pa.types.is_nested(column.type):
        return False
    pairs = pa.table({"label": column.cast(_value_type(column)), "code": pa.array(code)})
    distinct = pairs.group_by(["label", "code"]).aggregate([])
    return len(distinct) == pc.count_distinct(distinct["label"], mode="all").as_py() == len(names)


def clean_labels(table: datasets.Dataset, name: str, where: str) -> tuple[datasets.Dataset, list[str]]:
    """The table with labels without surrounding spaces and without `.0`, and notes on what was changed.

    Raises `UserError` if the values are not one class per image: fractions, lists of classes, or ids.
    """
    column = table.data.column(name)
    kind = _value_type(column)
    if isinstance(table.features[name], datasets.ClassLabel) or pa.types.is_nested(kind):
        return table, []
    if pa.types.is_string_view(kind):
        kind = pa.string()
        table = table.cast_column(name, datasets.Value("string"))
    column = column.cast(kind)
    values = pc.unique(column)
    _refuse_ids(name, len(values), len(column), where)
    if pa.types.is_integer(kind) and set(pc.drop_null(values).to_pylist()) == {-1, 1}:  # alone, -1 means no label
        return table.cast_column(name, datasets.Value("string")), [f"labels -1 and 1 in {name} read as names"]
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return table, []
    cleaned, notes = _clean(values.cast(pa.string()), name, where)
    if not notes:
        return table, []
    places = pc.index_in(column, value_set=values)
    made = pa.chunked_array([cleaned.take(chunk) for chunk in places.chunks], cleaned.type)
    others = [other for other in table.column_names if other != name]
    kept = table.select_columns(others) if others else None
    fresh = datasets.Dataset(pa.table({name: made}))
    return datasets.concatenate_datasets([kept, fresh], axis=1) if kept is not None else fresh, notes


def _refuse_ids(name: str, num_values: int, num_rows: int, where: str) -> None:
    if num_values == num_rows >= _MIN_ROWS_OF_IDS:
        raise UserError(
            f"{where}: column {name} has another value in each of {num_rows:,} rows, so it holds no classes: name the "
            "column of the labels with --label_column_name"
        )


def _clean(values: pa.Array, name: str, where: str) -> tuple[pa.Array, list[str]]:
    """Distinct labels, cleaned."""
    notes = []
    trimmed = pc.utf8_trim_whitespace(values)
    trimmed = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    if not trimmed.equals(values):
        notes.append(f"spaces around labels in {name} removed")
    present = pc.drop_null(trimmed)
    if len(present) and pc.all(pc.match_substring_regex(present, rf"{_DECIMAL}|^-?\d+$")).as_py():
        if pc.all(pc.match_substring_regex(present, rf"{_WHOLE_DECIMAL}|^-?\d+$")).as_py():
            if pc.any(pc.match_substring_regex(present, _WHOLE_DECIMAL)).as_py():
                whole = pc.replace_substring_regex(trimmed, r"[.]0*$", "")
                return whole.cast(pa.int64()), [*notes, f"labels in {name} such as {present[0]} read as whole numbers"]
        else:
            fractions = present.filter(pc.invert(pc.match_substring_regex(present, rf"{_WHOLE_DECIMAL}|^-?\d+$")))
            raise UserError(
                f"{where}: column {name} holds numbers with fractions ({fractions[0]}), not classes: name another "
                "column with --label_column_name, or write names instead of numbers"
            )
    if several := _several_classes(present.to_pylist()):
        raise UserError(
            f"{where}: column {name} holds several classes per image ({shortened(several)}): keep one class per image; "
            "if this is one class, write it with _ or - between the words"
        )
    return trimmed, notes


def _several_classes(labels: list[str]) -> str | None:
    """A label that lists several classes; None if there is none.

    Parts at a comma, semicolon or space, which names of classes have too, are classes if each is a label of its own as
    well; parts at a vertical bar already if one is, or is at several places (`a|b`, `b|c`; not `animal|cat`,
    `animal|dog`).
    """
    for label in labels:
        if re.fullmatch(r"[\[({].*['\"].*[\])}]", label.strip()):
            return label
    numbers = [label for label in labels if not label.isdigit()]
    if numbers and all(re.fullmatch(r"\d+(?:[ ,;|]+\d+)*", label) for label in labels):
        return numbers[0]  # `16 0`, or `1,5`, which may be a fraction as well
    known = set(labels)
    for separator in "|,; ":
        position_of: dict[str, int] = {}
        for label in (label for label in labels if separator in label):
            parts = [part.strip() for part in label.split(separator) if part.strip()]
            alone = [part for part in parts if part in known]
            if len(parts) > 1 and len(alone) == len(parts):
                return label
            moved = [part for position, part in enumerate(parts) if position_of.setdefault(part, position) != position]
            if separator == "|" and len(parts) > 1 and (alone or moved):
                return label
    return None
