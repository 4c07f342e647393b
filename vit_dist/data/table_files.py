"""Which files of a data folder are its tables, and which split each of them belongs to."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from vit_dist.data.columns import usual_role
from vit_dist.data.split_words import split_word
from vit_dist.data.tables import split_of
from vit_dist.errors import UserError
from vit_dist.listing import listed

# Files with the columns of a table of images whose labels are none: answers of a model, or names of the classes.
_SIDE_TABLE = re.compile(
    r"(.*[^a-z])?(sample[^a-z]?)?(submissions?|predictions?|preds?|results?)([^a-z]*(v|ver|version|final|best|new|old)?\d*)|"
    r"classes|labels?[ _-]?(map|mapping|names|dict)|"
    r"(class(es)?|categor(y|ies))[ _-]?(map|mapping|names|list|index|indices|dict|ids?)"
)


def group_by_split(files: Sequence[str], named: Collection[str] = ()) -> dict[str, list[str]]:
    """The files of each split, by their names; `named` are splits that the user named.

    Names such as `train.csv` or `val/0.tar` decide alone. Otherwise other spellings count (`labels_train.csv` beside
    `labels_test.csv`, `seg_train/` beside `seg_test/`), if there are files for training and for something else.

    Raises:
        UserError: Some of the files are for evaluation by their names, and none for training.
    """
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(split_of(file), []).append(file)
    if len({usual_role(name) for name in groups} - {None}) > 1 or not groups.keys().isdisjoint(named):
        return groups
    roles = {file: _role(file) for file in files}
    found = set(roles.values()) - {None}
    if "train" in found and len(found) > 1:
        groups = {}
        for file, role in roles.items():
            groups.setdefault(role or split_of(file), []).append(file)
        return groups
    if found and "train" not in found and None in roles.values():
        held = [file for file, role in roles.items() if role is not None]
        others = [file for file, role in roles.items() if role is None]
        raise UserError(
            f"{listed(held, 80)} may be for evaluation and {listed(others, 80)} for training, by their names: rename "
            "them to train and test, or pass one of them with --data"
        )
    return groups


def _role(file: str) -> str | None:
    """The role in the name of a file, else of the folder that it lies in, and so on outwards."""
    path = PurePosixPath(file)
    words = (split_word(name) for name in (path.name.rpartition(".")[0], *reversed(path.parts[:-1])))
    return next((word.role for word in words if word is not None), None)


def split_side_tables(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """(tables, side tables such as `sample_submission.csv`); a table that is alone is no side table."""
    side = [file for file in files if is_side_table(file)]
    main = [file for file in files if file not in side]
    return (main, side) if main else (list(files), [])


def is_side_table(file: str) -> bool:
    """Whether a file of this name holds answers of a model or names of the classes, and no labels of images."""
    return _SIDE_TABLE.fullmatch(_snake_case(PurePosixPath(file).stem)) is not None


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
