"""A column that says which rows are for training, validation and test."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.data.columns import ROLES
from vit_dist.data.split_words import split_word
from vit_dist.errors import UserError
from vit_dist.listing import listed

_ABBREVIATIONS = {  # in a column only: folders of these names may be classes
    "tr": "train", "learn": "train", "learning": "train", "vali": "validation", "vld": "validation", "te": "test",
}  # fmt: skip
_ADDED_WORD = re.compile(r"[ _-]*(?:subset|partition)$")
# fmt: off
_SPLIT_COLUMNS = frozenset([
    "set", "sets", "set_name", "train_test", "train_val", "train_val_test", "tvt", "usage", "cv",
])
_SPLIT_WORDS = frozenset(["split", "splits", "fold", "folds", "kfold", "subset", "subsets", "partition", "partitions"])
# They count if one of their values is the name of a split.
_LIKELY_SPLIT_COLUMNS = frozenset([
    "part", "phase", "stage", "mode", "purpose", "dataset", "data_set", "dataset_type", "dataset_name", "data_type",
    "role", "use",
])
# fmt: on
_IS_ROLE = re.compile(r"(is|in|for|use_for)_?(.+)")
_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "1.0"), ("0", "false", "f", "no", "n", "0.0")
_MOST_VALUES = 20  # more distinct values are no splits
_NUM_PEEKED = 1000  # rows: most columns of other things have more distinct values among these already


@dataclass(frozen=True)
class SplitColumn:
    """The split of every row, by one column or by several columns such as `is_train` and `is_test`."""

    name: str
    roles: np.ndarray  # int8 (rows,): index into ROLES, -1 for rows that are not used
    unused: list[str]  # values of the column that play no role

    def rows(self, role: str) -> np.ndarray:
        """The indices of the rows of a split, int64."""
        return np.flatnonzero(self.roles == ROLES.index(role))


def role_of(value: str) -> str | None:
    """The role that a value such as `Training`, `val` or `test_set` names."""
    word = _ADDED_WORD.sub("", value.strip().lower())
    found = split_word(word)
    return found.role if found is not None and not found.rest else _ABBREVIATIONS.get(word)


def find_split_column(
    table: datasets.Dataset,
    taken: Collection[str],
    chosen: str | None,
    values: Mapping[str, str | None] | None,
    where: str,
) -> SplitColumn | None:
    """The column of `table` that assigns rows to splits; None if there is none.

    Args:
        table: Rows without an indices mapping.
        taken: Columns that hold something else.
        chosen: The column that the user named, or `none`.
        values: For each role the value that the user named, if any; `none` leaves the test rows alone. None if the
            table is one split already: then only values that name splits count.
        where: The table, for messages.

    Raises:
        UserError: Such a column has values whose meaning is unknown, or several columns disagree.
    """
    if chosen is not None and chosen.lower() == "none" and chosen not in table.column_names:
        return None
    if chosen is not None and chosen not in table.column_names:
        raise UserError(
            f"--split_column_name {chosen}: {where} has no such column; it has {listed(list(table.column_names))}"
        )
    names: list[str]
    flags: list[str]
    if chosen is not None:
        names, flags = ([], [chosen]) if _flag_role(chosen) and _truth(table, chosen) else ([chosen], [])
    else:
        names = [
            name for name in table.column_names if name not in taken and _assigns_splits(table, name, values is None)
        ]
        flags = [name for name in table.column_names if name not in taken and _is_flag(table, name, where)]
    if len(names) > 1 or (names and flags):
        raise UserError(
            f"{where}: several columns could hold the split of each row, {listed([*names, *flags])}: name one with "
            "--split_column_name"
        )
    if names:
        return _by_values(table, names[0], values, where)
    if chosen is None and values is not None and len(flags) == 1 and _IS_ROLE.fullmatch(_normal(flags[0])) is None:
        raise UserError(
            f"{where}: column {flags[0]} may say which rows are for {_flag_role(flags[0])}: pass --split_column_name "
            f"{flags[0]}, or --split_column_name none to use all rows alike"
        )
    return _by_flags(table, flags, values, where, asked=chosen is not None) if flags else None


def _normal(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).strip("_")


def _texts(table: datasets.Dataset, name: str) -> list[str | None] | None:
    """The distinct values of a column as text, sorted; None if it has too many or is of another type."""
    column = table.data.column(name)
    if not _is_scalar(column.type) or len(pc.unique(column.slice(0, _NUM_PEEKED))) > _MOST_VALUES:
        return None
    values = pc.unique(column)
    if len(values) > _MOST_VALUES:
        return None
    feature = table.features[name]
    found = [_text(feature, value) for value in values.to_pylist()]
    return sorted(found, key=lambda value: value or "")


def _text(feature: object, value: object) -> str | None:
    if value is None or value == "":
        return None
    names = getattr(feature, "names", None)
    return str(value) if names is None or not isinstance(value, int) else str(names[value])


def _is_scalar(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_boolean,
        pa.types.is_floating,
    )
    return any(check(kind) for check in checks)


def _assigns_splits(table: datasets.Dataset, name: str, is_split: bool) -> bool:
    usual = _normal(name)
    texts = _texts(table, name)
    if not texts:
        return False
    roles = {role_of(text) for text in texts if text is not None} - {None}
    if usual in _SPLIT_COLUMNS or not _SPLIT_WORDS.isdisjoint(usual.split("_")):
        return bool(roles) or (len(texts) > 1 and not is_split)
    if usual in _LIKELY_SPLIT_COLUMNS:
        return bool(roles)
    return len(roles) > 1


def _flag_role(name: str) -> str | None:
    """The role that a column such as `is_test` is about."""
    usual = _normal(name)
    matched = _IS_ROLE.fullmatch(usual)
    return role_of(matched[2]) if matched else role_of(usual)


def _truth(table: datasets.Dataset, name: str) -> dict[str | None, bool] | None:
    """Which values of a column mean true; None if it holds anything else than true and false."""
    texts = _texts(table, name)
    if texts is None or not texts or len(texts) > 2:
        return None
    truth = {text: (text or "").strip().lower() in _TRUE for text in texts}
    return truth if all(text and text.strip().lower() in (*_TRUE, *_FALSE) for text in texts) else None


def _is_flag(table: datasets.Dataset, name: str, where: str) -> bool:
    role = _flag_role(name)
    if role is None:
        return False
    truth = _truth(table, name)
    if truth is None:
        texts = _texts(table, name)
        if texts is not None and len(texts) > 1 and _normal(name).startswith("is_"):
            shown = listed([text or "(empty)" for text in texts])
            raise UserError(
                f"{where}: column {name} should be true or false for each row, but has {shown}: correct it, or pass "
                "--split_column_name none to use all rows alike"
            )
        return False
    return len(truth) == 2 or next(iter(truth.values())) != (role == "train")


def _by_values(table: datasets.Dataset, name: str, asked: Mapping[str, str | None] | None, where: str) -> SplitColumn:
    column, feature = table.data.column(name), table.features[name]
    texts = _texts(table, name)
    if texts is None:
        raise UserError(f"{where}: column {name} has more than {_MOST_VALUES} distinct values: they are no splits")
    if None in texts:
        empty = pc.or_kleene(pc.is_null(column), pc.equal(column, "") if pa.types.is_string(column.type) else False)
        rows = np.flatnonzero(np.asarray(empty.fill_null(True)))
        raise UserError(
            f"{where}: {len(rows):,} rows have no value in column {name}, for example row {rows[0]}: fill it, or pass "
            "--split_column_name none to use all rows alike"
        )
    known = [text for text in texts if text is not None]
    roles, unused = _roles_of_values(known, name, asked, where)
    values = pc.unique(column)
    numbers = [
        ROLES.index(roles[text]) if (text := _text(feature, value)) in roles else -1 for value in values.to_pylist()
    ]
    codes = np.array(numbers, np.int8)[np.asarray(pc.index_in(column, values))]
    return SplitColumn(name, codes, unused)


def _roles_of_values(
    values: list[str], name: str, asked: Mapping[str, str | None] | None, where: str
) -> tuple[dict[str, str], list[str]]:
    """The role of each value, and the values without one."""
    roles: dict[str, str] = {}
    chosen = {role: None for role in ROLES} if asked is None else asked
    for role, wanted in chosen.items():
        if wanted is None or (role == "test" and wanted.lower() == "none"):
            continue
        same = [value for value in values if value == wanted] or [
            value for value in values if role_of(wanted) and role_of(value) == role_of(wanted)
        ]
        if not same:
            raise UserError(f"--{role}_split {wanted}: column {name} of {where} has the values {listed(values)}")
        for value in same:
            if roles.setdefault(value, role) != role:
                raise UserError(f"--{role}_split {wanted}: rows of this value in {where} already have another role")
    rest = [value for value in values if value not in roles]
    unknown = [value for value in rest if role_of(value) is None]
    if unknown and asked is not None and chosen["train"] is None:
        raise UserError(
            f"{where}: column {name} may hold the split of each row, but {listed(unknown)} "
            f"{'is' if len(unknown) == 1 else 'are'} not known: pass --train_split, --validation_split and "
            "--test_split with its values, or --split_column_name none to use all rows alike"
        )
    for value in rest:
        usual = role_of(value)
        if usual is not None and chosen[usual] is None:
            roles[value] = usual
    return roles, [value for value in values if value not in roles]


def _by_flags(
    table: datasets.Dataset, names: list[str], values: Mapping[str, str | None] | None, where: str, *, asked: bool
) -> SplitColumn:
    """Splits by columns of true and false."""
    is_true: dict[str, np.ndarray] = {}
    for name in names:
        truth, role = _truth(table, name), _flag_role(name)
        assert truth is not None and role is not None
        if role in is_true:
            raise UserError(f"{where}: several columns say which rows are for {role}, {listed(names)}: rename one")
        column, feature = table.data.column(name), table.features[name]
        found = pc.unique(column)
        codes = np.array([truth[_text(feature, value)] for value in found.to_pylist()])
        is_true[role] = codes[np.asarray(pc.index_in(column, found))]
    label = " and ".join(names)
    total = sum(flags.astype(np.int8) for flags in is_true.values())
    if np.any(total > 1):
        raise UserError(f"{where}: row {int(np.argmax(total > 1))} is of several splits by the columns {label}")
    held = "test" if "test" not in is_true else "validation"
    if "train" in is_true and held not in is_true:  # what is not for training is held back
        is_true[held] = np.asarray(total == 0)
    roles = np.full(len(table), ROLES.index("train") if "train" not in is_true else -1, np.int8)
    for role, flags in is_true.items():
        roles[flags] = ROLES.index(role)
    share = float(np.mean(roles == ROLES.index("train")))
    if not asked and values is not None and share < 0.5 and set(is_true) == {"validation"}:
        raise UserError(
            f"{where}: column {label} is true for {1 - share:.0%} of the rows. If they are for validation pass "
            f"--split_column_name {label}, if it says something else --split_column_name none"
        )
    if ((values or {}).get("test") or "").lower() == "none":
        roles[roles == ROLES.index("test")] = -1
    return SplitColumn(label, roles, [] if np.all(roles >= 0) else ["rows of no split"])
