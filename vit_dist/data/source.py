"""Everything that `--data` accepts, as tables with the columns `id`, `image` and `label`."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa

from vit_dist.data.cache import cache_folder
from vit_dist.data.columns import NoLabelColumn, common_table, image_column, split_roles, usual_role
from vit_dist.data.folders import (
    class_tables,
    folder_notes,
    folders_without_row,
    is_used,
    layout_of,
    same_classes,
    without_row,
)
from vit_dist.data.hub import datasets_cache, load_hub
from vit_dist.data.image_paths import Origin
from vit_dist.data.index import IMAGE_EXTENSIONS, TABLE_EXTENSIONS, FolderIndex, folder_index
from vit_dist.data.labelled import SplitRows, labelled_tables
from vit_dist.data.layout import Layout
from vit_dist.data.mask_files import without_masks
from vit_dist.data.shards import require_labels
from vit_dist.data.split import stratified_split
from vit_dist.data.split_column import find_split_column
from vit_dist.data.split_words import are_ids, split_word
from vit_dist.data.table_files import group_by_split, is_side_table, split_side_tables
from vit_dist.data.tables import column_names, extension, has_images, numbered, read_rows, split_lists
from vit_dist.data.unread_lists import lists_that_name_images
from vit_dist.errors import UserError, first_line
from vit_dist.first_look import no_such_data
from vit_dist.listing import counted, listed, shortened

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

_LONG_MESSAGE = 400  # characters; more follows in the message
_LONGEST_MESSAGE = 500
_TABLES_SHOWN = 3  # whose columns are printed
_SPREADSHEETS = ("xlsx", "xls", "xlsm", "xlsb", "ods", "numbers")


@dataclass(frozen=True)
class Source:
    """Images with their labels, as they come: labels are not encoded yet, nothing is held out."""

    tables: dict[str, datasets.Dataset]  # by role (train, validation, test); columns id, image, label
    names: list[str] | None  # class names that the source declares, in the order of its integer labels
    description: str  # one line: what was understood
    revision: str | None = None  # commit of a hub data set
    notes: list[str] = field(default_factory=list)  # what was decided on the way
    label_column: str = ""
    is_guess: bool = False  # whether nothing but its name says that the column holds the labels


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
    root = path.parent if path.is_file() else path
    try:
        return _local(path, options)
    except UserError as error:
        if len(str(error.args[0])) < _LONGEST_MESSAGE:
            raise
        raise UserError(_short_paths(error, root), error.args[1]) from None


def _local(path: Path, options: DataOptions) -> Source:
    if path.is_file():
        if extension(path.name) == "tar" and options.label_column_name is None:
            require_labels(path)
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
    if not path.is_file() and not path.is_dir():
        raise UserError(f"--data {shortened(data, 200)}: neither a regular file nor a folder")
    if path.is_file() and extension(path.name) in _SPREADSHEETS:
        raise UserError(f"--data {shortened(data, 200)}: save the spreadsheet as CSV UTF-8 and pass that file")
    if path.is_file() and extension(path.name) not in (*TABLE_EXTENSIONS, "txt"):
        raise UserError(
            f"--data {shortened(data, 200)}: not one of the files that are read, {_kinds(TABLE_EXTENSIONS)}"
        )
    return Path(os.path.abspath(path))


def looks_like_path(data: str) -> bool:
    return data.startswith((".", "/", "~", "\\")) or data.count("/") > 1 or extension(data) in TABLE_EXTENSIONS


def _kinds(extensions: frozenset[str]) -> str:
    return ", ".join(f".{name}" for name in sorted(extensions))


def _folder(root: Path, options: DataOptions) -> Source:
    index = folder_index(root, cache_folder(options.cache_dir))
    found, side = split_side_tables([*index.tables, *split_lists(root)])
    asked = options.image_column_name or options.label_column_name
    if len(index.images) and not asked and all(map(is_side_table, found)):
        found, side = [], [*found, *side]  # answers of a model are no labels of the images beside them
    if not len(index.images):
        if found:
            if extension(found[0]) == "tar" and options.label_column_name is None:
                require_labels(root / found[0])
            return _without(side, _files(root, group_by_split(found, _named_splits(options)), str(root), options))
        _refuse_hidden(root, index)
        only = f", only {counted(index.suffixes)}" if index.others else ""
        raise UserError(
            f"{shortened(str(root), 100)}: no images ({_kinds(IMAGE_EXTENSIONS)}) and no tables "
            f"({_kinds(TABLE_EXTENSIONS)}){only}"
        )
    # Class folders may well hold tables about something else.
    named = (options.image_column_name, options.label_column_name)
    tables = [file for file in found if has_images(root, file, *named)]
    if tables and not options.class_folders:
        unread = [*side, *(file for file in found if file not in tables)]
        return _without(unread, _beside_images(root, index, tables, side, options))
    try:
        layout = layout_of(root, index, options)
    except UserError as error:
        if not found and side:
            table = shortened(str(root / side[0]), 120)
            hint = f"{listed(side, 60, 2)} is not read for labels, by its name: pass --data {table} if it holds them"
            raise UserError(f"{error}. {hint}") from None
        if not found or options.class_folders:
            raise
        raise UserError(f"{error}. {_hint(root, found, options)}") from None
    if not options.class_folders:
        _refuse_unread_tables(root, index, layout, side if found else [])
    return _without(side, _image_folder(root, index, layout, tables, options))


def _hint(root: Path, tables: list[str], options: DataOptions) -> str:
    """What to do with tables that may label images in no class folders, and are not understood."""
    first = f"{listed(tables, 60, 2)} may label them"
    try:
        _files(root, group_by_split(tables, _named_splits(options)), tables[0], options)
        columns = column_names(root, tables[0])
    except UserError as error:
        return f"{first}, but {_short_paths(error, root)}"
    return f"{first}: name its columns ({listed(columns, 100)}) with --image_column_name and --label_column_name"


def _without(unread: list[str], source: Source) -> Source:
    return replace(source, description=f"{source.description}; not used: {listed(unread)}") if unread else source


def _refuse_unread_tables(root: Path, index: FolderIndex, layout: Layout, known: list[str]) -> None:
    """Raise `UserError` for a file that names images of class folders and is not read: it may label them."""
    used = is_used(index, layout)
    read = replace(index, images=index.images.filter(pa.array(used)), folder_of=index.folder_of[used])
    for file in lists_that_name_images(root, read, known):
        if extension(file) in ("csv", "tsv"):
            try:
                rows = read_rows([file], root, None)
                image_column(rows.table.features, None, shortened(str(root / file), 100))
            except UserError as error:
                raise UserError(
                    f"{_short_paths(error, root)}; it names images of this folder: correct the table, or pass "
                    "--class_folders top to ignore it"
                ) from None
        raise UserError(
            f"{shortened(str(root / file), 150)} names images of this folder and is not read: it may label them or "
            "assign them to splits. Pass --class_folders top to read the folders alone, or "
            f"--data {shortened(str(root / file), 150)} for the table"
        )


def _short_paths(error: UserError, root: Path) -> str:
    """The message, with a shorter path of the data folder where it is too long."""
    message = str(error.args[0])
    return message if len(message) < _LONG_MESSAGE else message.replace(str(root), shortened(str(root), 70))


def _refuse_unread_splits(root: Path, layout: Layout, tables: list[str], options: DataOptions) -> None:
    """Raise `UserError` for tables without labels that assign the images of class folders to splits."""
    if len(layout.splits) > 1:
        return
    for file in tables:
        columns = read_rows([file], root, datasets_cache(options.cache_dir)).table
        image = image_column(columns.features, None, file)
        word = split_word(PurePosixPath(file).stem)
        if word and word.role == "test" and layout.unused:  # the list of the images without labels
            continue
        if word or find_split_column(columns, (image,), None, None, file):
            raise UserError(
                f"{shortened(str(root / file), 150)} assigns images to splits and has no column of labels, so it is "
                "not read beside class folders: add the column, move the images to train/CLASS and test/CLASS, or pass "
                "--class_folders top to ignore the table"
            )


def _refuse_hidden(root: Path, index: FolderIndex) -> None:
    if index.hidden:
        raise UserError(
            f"{shortened(str(root / index.hidden[0]), 250)} is a hidden folder with images in it: delete it, or rename "
            "it if it is a class"
        )


def _beside_images(root: Path, index: FolderIndex, tables: list[str], side: list[str], options: DataOptions) -> Source:
    """Tables that name images beside the images: one of the two says what the classes are."""
    asked = options.image_column_name or options.label_column_name
    layout, source, no_classes = None, None, None
    try:
        layout = layout_of(root, index, options)
    except UserError as error:
        no_classes = error
    try:
        source = _files(root, group_by_split(tables, _named_splits(options)), str(root), options)
    except NoLabelColumn:  # it describes the images of the class folders
        if asked:
            raise
        if layout is None:
            named = f"({listed(column_names(root, tables[0]), 80)}): name one with --label_column_name"
            raise UserError(
                f"{no_classes}. {listed(tables, 60, 2)} has no column that looks like labels {named}"
            ) from None
    except UserError as error:
        if (flags := _flags_for_folders(root, index, options)) is None:
            raise
        whole = UserError(f"{error.args[0]}; or pass {flags} if the folders are the classes")
        raise UserError(_short_paths(whole, root)) from None
    if source is None and layout is not None:
        _refuse_unread_splits(root, layout, tables, options)
        _refuse_unread_tables(root, index, layout, [*tables, *side])
        return _image_folder(root, index, layout, tables, options)
    assert source is not None
    rowless, embedded = without_row(root, index, source.tables.values())
    if layout is not None:
        rowless &= is_used(index, layout)
    missing, total = int(rowless.sum()), len(index.images)
    if layout is not None and len(layout.classes) > 1 and missing and not asked and embedded < 10 * total:
        raise UserError(
            f"{shortened(str(root), 120)}: {listed(tables, 80)} labels {total - missing:,} of {total:,} images, and "
            f"all lie in class folders ({listed(layout.classes, 80)}): pass --class_folders top for the folders, or "
            f"--data {shortened(str(root / _main_table(tables)), 150)} for the table"
        )
    if layout is not None and not asked and not _agree(root, layout, source):
        column = shortened(source.label_column)
        raise UserError(
            f"{shortened(str(root), 120)}: the classes are column {column} of {listed(tables, 80)}, or the folders "
            f"({listed(layout.classes, 80)}): pass --label_column_name {column} for the column, or --class_folders top "
            "for the folders"
        )
    if layout is None and not asked and (folders := folders_without_row(index, rowless)):
        table = shortened(str(root / _main_table(tables)), 120)
        labelled = f"{listed(tables, 80)} labels {total - missing:,} of {total:,} images"
        flags = _flags_for_folders(root, index, options)
        read = f", or {flags} for the folders" if flags else ""
        raise UserError(
            f"{shortened(str(root), 120)}: {labelled}, and none in {listed(folders, 100)}: pass --data {table} for the "
            f"table alone{read}"
        )
    if missing:
        described = f"{source.description}; {missing:,} of {total:,} images in the folder are in no row"
        return replace(source, description=described)
    return source


def _flags_for_folders(root: Path, index: FolderIndex, options: DataOptions) -> str | None:
    """Flags with which the class folders can be read without the tables; None if no flags help."""
    for test, flags in ((options.test_split, ""), ("none", " --test_split none")):
        with contextlib.suppress(UserError):
            layout = layout_of(root, index, replace(options, class_folders="top", test_split=test))
            if len(layout.classes) > 1 and not any(map(split_word, layout.classes)):
                return f"--class_folders top{flags}"
    return None


def _agree(root: Path, layout: Layout, source: Source) -> bool:
    """Whether the folders say nothing against the labels.

    A column that is surely the labels counts more than folders of other names, such as sites; not more than class
    folders of the same names, since it may be stale, or hold answers of a model.
    """
    if len(layout.classes) < 2 or are_ids(layout.classes):
        return True
    labels = {str(label) for table in source.tables.values() for label in table.unique("label")}
    return not (source.is_guess or len(labels & set(layout.classes)) > 1) or same_classes(root, layout, source.tables)


def _main_table(tables: list[str]) -> str:
    """The table to train on, by its name."""
    roles = {file: word.role for file in tables if (word := split_word(PurePosixPath(file).stem))}
    return next((file for file in tables if roles.get(file) == "train"), tables[0])


def _image_folder(root: Path, index: FolderIndex, layout: Layout, tables: list[str], options: DataOptions) -> Source:
    _refuse_hidden(root, index)
    for flag in ("image_root", "image_column_name", "label_column_name", "split_column_name"):
        if (value := getattr(options, flag)) not in (None, "none"):
            raise UserError(
                f"--{flag} {shortened(value, 100)}: {shortened(str(root), 150)} holds class folders and no table that "
                f"names images; leave --{flag} out, or pass the table with --data"
            )
    images, masks = without_masks(index)
    made = class_tables(root, images, layout)
    num_classes = len(layout.classes)
    notes = [f"image folder, {num_classes} class{'es' if num_classes != 1 else ''}", *folder_notes(index)]
    unused = [*layout.unused, *(f"{file} (no labels are taken from it)" for file in tables)]
    columns = [note for file in tables[:_TABLES_SHOWN] if (note := _columns(root, file))]
    return Source(
        made,
        None,
        _describe(str(root), notes, made, unused),
        notes=[*layout.notes, *columns, *([masks] if masks else [])],
    )


def _columns(root: Path, file: str) -> str | None:
    """The columns of a table from which no labels are taken."""
    try:
        return f"not used: {shortened(file)} with the columns {listed(column_names(root, file))}"
    except UserError:
        return None


def _named_splits(options: DataOptions) -> frozenset[str]:
    names = (options.train_split, options.validation_split, options.test_split)
    return frozenset(name for name in names if name is not None)


def _files(root: Path, splits: dict[str, list[str]], where: str, options: DataOptions) -> Source:
    """Tables in files; files without a split in their name are all there is to train on."""
    chosen = _named_splits(options)
    if not any(usual_role(name) or name in chosen for name in splits):
        splits = {"train": [file for files in splits.values() for file in files]}
    roles, refusal = _roles(list(splits), options, where)
    named = [name for name in (options.image_column_name, options.label_column_name, options.split_column_name) if name]
    parts = {}
    for role, split in roles.items():
        rows = read_rows(splits[split], root, datasets_cache(options.cache_dir), named)
        first = str(root / rows.files[0])
        origin = _origin(first, rows.folders(root), rows.num_rows, options)
        if len(roles) > 1 or split_word(PurePosixPath(first).stem):
            origin = replace(origin, role=role)
        parts[role] = SplitRows(rows.table, rows.ids(), origin, extension(first) == "tar", rows.notes)
    kinds = sorted({extension(file) for split in roles.values() for file in splits[split]})
    unused = {file for name in set(splits) - set(roles.values()) for file in splits[name]}
    return _source(parts, where, "/".join(kinds), options, unused, refusal=refusal)


def _origin(where: str, folders: list[Path], num_rows: list[int], options: DataOptions) -> Origin:
    return Origin(where, folders, num_rows, options.image_root, options.on_bad_image == "skip")


def _roles(splits: list[str], options: DataOptions, where: str) -> tuple[dict[str, str], UserError | None]:
    """As `split_roles`. The one split there is may have a column of splits that the options mean: then the refusal is
    for the case that it has not.
    """
    try:
        return split_roles(splits, options, where), None
    except UserError as error:
        if len(splits) > 1:
            raise
        return {"train": splits[0]}, error


def _source(
    parts: dict[str, SplitRows],
    where: str,
    kind: str,
    options: DataOptions,
    unused: set[str],
    revision: str | None = None,
    refusal: UserError | None = None,
) -> Source:
    """A source out of rows with any columns, by role."""
    made = labelled_tables(parts, options)
    if refusal is not None and not made.by_column:
        raise refusal
    names = getattr(made.tables["train"].features["label"], "names", None)
    notes = [kind, *made.notes]
    described = _describe(where, notes, made.tables, {*unused, *made.unused})
    return Source(made.tables, names, described, revision, label_column=made.label_column, is_guess=made.is_guess)


def _describe(where: str, notes: list[str], tables: dict[str, datasets.Dataset], unused: Collection[str]) -> str:
    sizes = ", ".join(f"{role} {len(table):,}" for role, table in tables.items())
    ignored = [f"not used: {listed(sorted(unused))}"] if unused else []
    return f"{where}: " + "; ".join([", ".join(notes), sizes, *ignored])


def _from_splits(
    splits: dict[str, datasets.Dataset], where: str, kind: str, options: DataOptions, revision: str | None = None
) -> Source:
    roles, refusal = _roles(list(splits), options, where)
    parts = {}
    for role, split in roles.items():
        num_rows = len(splits[split])
        origin = _origin(where, [Path.cwd()], [num_rows], options)
        parts[role] = SplitRows(splits[split], pa.chunked_array([numbered(split, num_rows)], pa.string()), origin)
    unused = set(splits) - set(roles.values())
    return _source(parts, where, kind, options, unused, revision, refusal)


def _saved(path: Path, options: DataOptions) -> Source:
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a half-copied folder leads to
        raise UserError(
            f"cannot read {path}, written by save_to_disk: {first_line(error.__cause__ or error)}"
        ) from error
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
    train, test, _ = stratified_split(table, 0.2, seed=0)
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
