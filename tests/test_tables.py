"""Tables of images as people have them: how they are written, which columns count, and where the files lie."""

from __future__ import annotations

import base64
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_fixtures import options, png

from vit_dist.data.source import Source, load_source
from vit_dist.data.split import class_list, encode_labels, stratified_split, table_fingerprint
from vit_dist.errors import UserError

PATHS = [f"img/{number}.png" for number in range(24)]
CLASSES = ["cat", "dog", "cat", "dog", "dog", "cat"] * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 24 images in `img`."""
    images(tmp_path / "data" / "img")
    return tmp_path / "data"


def images(folder: Path, suffix: str = "png", count: int = 24) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.{suffix}").write_bytes(png((number, 9, 9)))


def write(path: Path, rows: Sequence[str], encoding: str = "utf-8", end: str = "\n") -> Path:
    path.write_bytes((end.join(rows) + end).encode(encoding))
    return path


def rows(classes: Sequence[Any] = CLASSES, more: Sequence[Any] | None = None, header: str = "image,label") -> list[str]:
    """Lines of a table: path, label and one more column."""
    values = [f"{path},{label}" for path, label in zip(PATHS, classes, strict=True)]
    return [header, *(values if more is None else [f"{a},{b}" for a, b in zip(values, more, strict=True)])]


def load(data: Path, **values: Any) -> Source:
    return load_source(options(data, data.parent / "cache", **values))


def refusal(data: Path, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        source = load(data, **values)
        encode_labels(source.tables["train"], class_list(source.tables["train"], source.names), "train")
    message = str(caught.value)
    assert len(message) < 500 and "\n" not in message
    return message


def found(source: Source, role: str = "train") -> list[tuple[str | None, str]]:
    """Names of files, as far as the images are files, and classes."""
    table = encode_labels(source.tables[role], class_list(source.tables["train"], source.names), role)
    classes = class_list(source.tables["train"], source.names)
    paths = [image["path"] for image in table["image"]]
    assert all(path is None or os.path.isfile(path) for path in paths)
    return [(path and Path(path).name, classes[label]) for path, label in zip(paths, table["label"], strict=True)]


EXPECTED = [(Path(path).name, name) for path, name in zip(PATHS, CLASSES, strict=True)]


# What must not change


def test_ids_fingerprints_and_held_out_rows_of_ordinary_tables_are_those_of_earlier_versions(folder: Path) -> None:
    """Values that were measured before tables were read by Arrow; runs that were started then go on."""
    tables = {
        "a.csv": [
            "file_name,label,note",
            *(f'{path},{name},"x, y"' for path, name in zip(PATHS, CLASSES, strict=True)),
        ],
        "short.csv": [
            "image,label,note",
            *(f"{p},{c}{',n' * (i % 2)}" for i, (p, c) in enumerate(zip(PATHS, CLASSES, strict=True))),
        ],
        "a.jsonl": [json.dumps({"image": p, "label": c}) for p, c in zip(PATHS, CLASSES, strict=True)],
        "zeros.tsv": ["image\tlabel", *(f"{path}\t{number % 3:03d}" for number, path in enumerate(PATHS))],
    }
    prints = {}
    for name, lines in tables.items():
        source = load(write(folder / name, lines))
        table = source.tables["train"]
        assert list(table["id"]) == [f"{name}#{row}" for row in range(24)]
        table = encode_labels(table, class_list(table, source.names), "train")
        prints[name] = table_fingerprint(table)[:12], stratified_split(table, 0.25, 3)[2][:12]
    assert prints == GOLDEN


GOLDEN = {  # the beginnings of the table's fingerprint and of the hash of the rows that are held out
    "a.csv": ("6b8369e2fcd3", "8a9f7be2cce4"),
    "short.csv": ("20503096db72", "165dcfd698ac"),
    "a.jsonl": ("daf91df13374", "21bdbfb779e4"),
    "zeros.tsv": ("02a361e5bf14", "d37c8c6f6c17"),
}


# How a table is written


@pytest.mark.parametrize(
    ("delimiter", "header", "end"),
    [(delimiter, header, "\n") for delimiter in ",;\t| " for header in ("image,label", None, "label,image")]
    + [(",", "image,label", "\r\n"), (";", None, "\r\n"), (",", "image,label", "\r")],
)
def test_any_usual_delimiter_line_end_and_header_is_read(
    folder: Path, delimiter: str, end: str, header: str | None
) -> None:
    lines = rows(header=header or "")[0 if header else 1 :]
    if header == "label,image":
        lines = [header, *(",".join(reversed(line.split(","))) for line in lines[1:])]
    source = load(write(folder / "t.csv", [line.replace(",", delimiter) for line in lines], end=end))
    assert found(source) == EXPECTED
    assert ("no header" in source.description) == (header is None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-be"])
def test_encodings_are_recognised_and_named(folder: Path, encoding: str) -> None:
    lines = rows([name.replace("cat", "Kühe") for name in CLASSES])
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    source = load(write(folder / "t.csv", [mark + lines[0], *lines[1:]], encoding))
    assert {name for _, name in found(source)} == {"Kühe", "dog"}
    assert (", encoding " in source.description) == (not encoding.startswith("utf-8"))


def test_text_that_is_neither_utf8_nor_western_is_refused(folder: Path) -> None:
    for encoding, name in (("shift-jis", "ネコ"), ("cp1251", "корова"), ("utf-16-le", "cat")):
        lines = rows([label.replace("cat", name) for label in CLASSES])
        assert "save it as CSV UTF-8" in refusal(write(folder / "t.csv", lines, encoding))


@pytest.mark.parametrize(
    "lines",
    [
        ["sep=;", *(line.replace(",", ";") for line in rows())],  # Excel's hint
        ['"' + line.replace(",", '","') + '"' for line in rows()],
        [",image,label", *(f"{number},{line}" for number, line in enumerate(rows()[1:]))],  # pandas' index
        [line + ",," for line in rows()] + [",,,", ",,,"],  # empty columns and rows of a spreadsheet
        [rows()[0], *(line + "," for line in rows()[1:])],
        ["image, label", *(line.replace(",", ", ") for line in rows()[1:])],
        rows(more=["z" * 200_000] * 24, header="image,label,note"),
        rows(more=[10**23 + number for number in range(24)], header="image,label,number"),
        rows(more=['"two\nlines, ""quoted"""'] * 24, header="image,label,note"),
        [line.replace("/", "\\") for line in rows()],
    ],
    ids=["sep", "quoted", "index", "empty cells", "trailing", "spaces", "long", "24 digits", "newlines", "backslashes"],
)
def test_what_spreadsheets_write_is_read(folder: Path, lines: list[str]) -> None:
    assert found(load(write(folder / "t.csv", lines))) == EXPECTED


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*rows()[:5], 'img/5.png,"cat', "img/6.png,dog", 'img/7.png,"x', *rows()[9:]], "line 8: a quotation mark"),
        ([*rows()[:5], 'img/5.png,"cat', *rows()[7:]], "a quotation mark"),
        ([*rows(), "img/1.png,a,b"], "row 25 has 3 fields"),
        ([line.replace("img/3.", "img/3\0.") for line in rows()], "line 5 has a NUL byte"),
        (rows(more=CLASSES, header="image,label,label"), "two columns are called label"),
        (["img/0.png,label", "img/1.png,x"], "may be a header or a row"),
        (["img/0.png,a,b,c", "img/1.png,a,b,c"], "no header, and 4 columns"),
        (["0,0,255", "1,0,255"], "numbers instead of names"),
        (PATHS, "paths without labels"),
        (["label," + ",".join(f"pixel{n}" for n in range(784)), "1," + ",".join(["0"] * 784)], "pixel values in 784"),
        (["a," + ",".join(f"a_very_long_name_{n}" for n in range(5000)), "1," + ",".join(["0"] * 5000)], "4,99"),
    ],
)
def test_tables_that_cannot_be_read_are_refused_in_one_line(folder: Path, lines: list[str], message: str) -> None:
    path = write(folder / "t.csv", lines)
    said = refusal(path)
    assert message in said and "t.csv" in said


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("deep.json", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("map.json", json.dumps(dict(zip(PATHS, CLASSES, strict=True))), "one object of paths and labels"),
        ("pretty.json", json.dumps({"images": PATHS}, indent=1), "line 1 is not a JSON object"),
    ],
)
def test_json_of_another_shape_is_refused(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    assert message in refusal(folder / name)


def test_json_numbers_beyond_64_bits_and_labels_of_two_types_are_read(folder: Path) -> None:
    lines = [json.dumps({"image": p, "label": c, "n": 10**30}) for p, c in zip(PATHS, CLASSES, strict=True)]
    assert found(load(write(folder / "a.jsonl", lines))) == EXPECTED
    lines = [json.dumps({"image": path, "label": (1, "a")[n % 2]}) for n, path in enumerate(PATHS)]
    assert {name for _, name in found(load(write(folder / "b.jsonl", lines)))} == {"1", "a"}


@pytest.mark.parametrize("between", [" ", "  ", "\t", ",", ", "])
@pytest.mark.parametrize("sub", ["img", "my img"])
def test_lists_of_paths_and_labels_are_read(tmp_path: Path, between: str, sub: str) -> None:
    images(tmp_path / "d" / sub)
    labels = ["golden retriever" if name == "dog" else name for name in CLASSES]
    lines = [f"{sub}/{number}.png{between}{label}" for number, label in enumerate(labels)]
    source = load(write(tmp_path / "d" / "list.txt", ["# a comment", "", *lines]))
    assert found(source) == [(f"{n}.png", label) for n, label in enumerate(labels)]


def test_lists_called_like_splits_are_splits_and_other_text_files_are_no_tables(folder: Path) -> None:
    lines = [f"{path} {name}" for path, name in zip(PATHS, CLASSES, strict=True)]
    write(folder / "train.txt", lines[:16])
    write(folder / "val.txt", lines[16:])
    for name, text in (("README.txt", "train the model"), ("classes.txt", "cat\ndog"), ("test.txt", "cat\ndog")):
        (folder / name).write_text(text)
    source = load(folder)
    assert found(source) == EXPECTED[:16] and found(source, "validation") == EXPECTED[16:]
    assert set(source.tables) == {"train", "validation"}


def test_a_list_with_a_split_behind_each_label_is_divided(folder: Path) -> None:
    lines = [f"{p} {c} {'train' if n < 16 else 'test'}" for n, (p, c) in enumerate(zip(PATHS, CLASSES, strict=True))]
    source = load(write(folder / "list.txt", lines))
    assert found(source) == EXPECTED[:16] and found(source, "test") == EXPECTED[16:]


def test_a_spreadsheet_is_to_be_saved_as_csv(folder: Path) -> None:
    for suffix in ("xlsx", "xls", "ods"):
        (folder / f"t.{suffix}").touch()
        assert "save the spreadsheet as CSV" in refusal(folder / f"t.{suffix}")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\3\4 a workbook", "a spreadsheet or archive"),
        (b"\x1f\x8b compressed", "unpack it first"),
    ],
)
def test_files_of_another_format_are_named(folder: Path, start: bytes, message: str) -> None:
    (folder / "t.csv").write_bytes(start)
    assert message in refusal(folder / "t.csv")


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "t.csv")
    assert "regular file" in refusal(folder / "t.csv")


# Splits


@pytest.mark.parametrize(
    ("name", "values"),
    [(name, ("train", "val", "test")) for name in ("split", "Set", "subset", "Usage", "phase", "data set", "anything")]
    + [("partition", ("Training", "VALIDATION", "Testing")), ("split", ("train_set", "dev", "tst"))],
)
def test_a_column_of_splits_divides_the_rows(folder: Path, name: str, values: tuple[str, ...]) -> None:
    splits = [values[number // 8] for number in range(24)]
    source = load(write(folder / "train.csv", rows(more=splits, header=f"image,label,{name}")))
    for role, start in (("train", 0), ("validation", 8), ("test", 16)):
        assert found(source, role) == EXPECTED[start : start + 8]
        assert source.tables[role][0]["id"] == f"train.csv#{start}"
    assert f"splits by column {name}; train 8, validation 8, test 8" in source.description


@pytest.mark.parametrize(
    ("name", "is_true", "roles", "words"),
    [
        ("is_test", range(16, 24), ("train", "test"), ("0", "1")),
        ("is_train", range(16), ("train", "test"), ("False", "True")),
        ("is_valid", range(16, 24), ("train", "validation"), ("no", "yes")),
        ("IsTrainingImage", range(16), ("train", "test"), ("0", "1")),
    ],
)
def test_a_column_of_true_and_false_divides_the_rows(
    folder: Path, name: str, is_true: range, roles: tuple[str, str], words: tuple[str, str]
) -> None:
    flags = [words[number in is_true] for number in range(24)]
    source = load(write(folder / "t.csv", rows(more=flags, header=f"image,label,{name}")))
    assert set(source.tables) == set(roles)
    assert found(source) == EXPECTED[:16] and found(source, roles[1]) == EXPECTED[16:]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("split", ["train", "test", "tset"], "tset is not known"),
        ("Usage", ["Training", "PublicTest", "PrivateTest"], "PrivateTest, PublicTest are not known"),
        ("fold", ["0", "1", "2"], "--split_column_name none"),
        ("split", ["train", "test", ""], "8 rows have no value in column split"),
        ("split", ["test"] * 3, "no rows are for training"),
        ("is_test", ["1"] * 3, "no rows are for training"),
        ("is_valid", ["1", "1", "0"], "--split_column_name is_valid"),
        ("dataset", ["train", "extra", "extra"], "extra is not known"),
        ("my_fold", ["0", "1", "2"], "--split_column_name none"),
        ("is_train", ["1", "0", ""], "should be true or false"),
        ("is_train", ["yes", "other", "no"], "should be true or false"),
        ("holdout", ["0", "0", "1"], "--split_column_name holdout"),
        ("test", ["0", "0", "1"], "--split_column_name test"),
    ],
)
def test_splits_of_unknown_meaning_are_refused(folder: Path, name: str, values: list[str], message: str) -> None:
    path = write(folder / "t.csv", rows(more=values * 8, header=f"image,label,{name}"))
    said = refusal(path)
    assert message in said and name in said
    assert found(load(path, split_column_name="none")) == EXPECTED


def test_twenty_long_values_of_a_split_column_are_not_all_listed(folder: Path) -> None:
    values = ["train"] * 6 + [f"{number} {'x' * 50}" for number in range(18)]
    assert "more are not known" in refusal(write(folder / "t.csv", rows(more=values, header="image,label,split")))


def test_options_choose_values_of_the_split_column(folder: Path) -> None:
    path = write(folder / "t.csv", rows(more=[number // 6 for number in range(24)], header="image,label,fold"))
    source = load(path, train_split="0", validation_split="1", test_split="3")
    for role, start in (("train", 0), ("validation", 6), ("test", 18)):
        assert found(source, role) == EXPECTED[start : start + 6]
    assert "not used: 2 in fold" in source.description
    assert "has the values 0, 1, 2, 3" in refusal(path, train_split="7")
    assert "has no such split" in refusal(write(folder / "u.csv", rows()), train_split="7")


def test_a_split_column_that_contradicts_the_files_is_refused(folder: Path) -> None:
    write(folder / "train.csv", rows(more=["train", "test"] * 12, header="image,label,split"))
    write(folder / "test.csv", rows(more=["test"] * 24, header="image,label,split"))
    assert "assigns rows of train to another split" in refusal(folder)
    write(folder / "train.csv", rows(more=["train"] * 24, header="image,label,split"))
    assert set(load(folder).tables) == {"train", "test"}


def test_columns_that_are_no_splits_are_left_alone(folder: Path) -> None:
    for header, values in (("split", ["train"]), ("vehicle", ["train", "bus"]), ("is_blurred", ["0", "1"])):
        path = write(folder / "t.csv", rows(more=values * (24 // len(values)), header=f"image,label,{header}"))
        assert found(load(path)) == EXPECTED
    assert found(load(write(folder / "t.csv", rows(["train", "test"] * 12)))) == [
        (name, ("train", "test")[number % 2]) for number, (name, _) in enumerate(EXPECTED)
    ]


# Labels


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([f"{n % 3:03d}" for n in range(24)], {"000", "001", "002"}),
        ([f"{n % 3}.0" for n in range(24)], {"0", "1", "2"}),
        ([n % 2 == 0 for n in range(24)], {"True", "False"}),
        ([("cat ", " cat", "dog")[n % 3] for n in range(24)], {"cat", "dog"}),
        ([("animal|cat", "animal|dog")[n % 2] for n in range(24)], {"animal|cat", "animal|dog"}),
        ([('"crane, bird"', '"crane, machine"')[n % 2] for n in range(24)], {"crane, bird", "crane, machine"}),
    ],
)
def test_labels_become_class_names(folder: Path, labels: list[Any], classes: set[str]) -> None:
    assert {name for _, name in found(load(write(folder / "t.csv", rows(labels))))} == classes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (rows([("0.5", "1.5")[n % 2] for n in range(24)]), "numbers with fractions (0.5)"),
        (rows([("cat", "dog", "cat|dog")[n % 3] for n in range(24)]), "several classes per image (cat|dog)"),
        (rows([("a|b", "b|c")[n % 2] for n in range(24)]), "several classes per image"),
        (rows([("cat", "dog", '"cat, dog"')[n % 3] for n in range(24)]), "several classes per image"),
        (rows(["\"['cat']\"", "\"['cat', 'dog']\""] * 12), "several classes per image"),
        (rows(["cat", "dog", ""] * 8), "8 of 24 images have no label, for example t.csv#2"),
        (rows(range(24)), "column label has another value in each of 24 rows"),
        (
            rows([n % 2 for n in range(24)], [1 - n % 2 for n in range(24)], "image,cat,dog"),
            "cat, dog hold 0 and 1 (one-hot",
        ),
        (
            rows([n % 2 for n in range(24)], [n % 3 % 2 for n in range(24)], "image,cat,dog"),
            "several classes per image",
        ),
        (rows(CLASSES, [n % 3 for n in range(24)], "image,label_name,label_id"), "give different classes"),
        (rows(CLASSES, [n % 3 for n in range(24)], "image,species,breed"), "several columns could hold the labels"),
        (rows(["cat"] * 24), "at least 2 are required"),
    ],
)
def test_labels_that_are_not_one_class_per_image_are_refused(folder: Path, lines: list[str], message: str) -> None:
    assert message in refusal(write(folder / "t.csv", lines))


@pytest.mark.parametrize(
    "header", ["label,label_name", "class_id,class_name", "label_name,label", "target,target_name"]
)
def test_of_two_columns_with_the_same_classes_the_names_count(folder: Path, header: str) -> None:
    numbers = [int(name == "dog") for name in CLASSES]
    columns = (CLASSES, numbers) if header == "label_name,label" else (numbers, CLASSES)
    path = write(folder / "t.csv", rows(*columns, f"image,{header}"))
    assert found(load(path)) == EXPECTED
    number = next(name for name in header.split(",") if "name" not in name)
    assert {name for _, name in found(load(path, label_column_name=number))} == {"0", "1"}


def test_a_column_that_is_guessed_is_said_to_be(folder: Path) -> None:
    source = load(write(folder / "t.csv", rows(header="fname,species")))
    assert found(source) == EXPECTED
    assert "species is a guess: --label_column_name" in source.description
    assert "fname is a guess: --image_column_name" in source.description
    assert (
        "is a guess" not in load(folder / "t.csv", image_column_name="fname", label_column_name="species").description
    )


def test_an_image_with_two_labels_is_refused_and_repeated_rows_are_counted(folder: Path) -> None:
    said = refusal(write(folder / "t.csv", [*rows(), "img/0.png,dog", "img/1.png,cat"]))
    assert "2 image files have different labels" in said and "img/0.png" in said
    source = load(write(folder / "t.csv", [*rows(), *rows()[1:4]]))
    assert "3 rows of train name an image file again" in source.description
    splits = [("train", "test")[number // 12] for number in range(24)]
    lines = [*rows(more=splits, header="image,label,split"), f"img/0.png,{CLASSES[0]},test"]
    assert "WARNING: 1 rows of test name images of train" in load(write(folder / "t.csv", lines)).description


def test_files_of_one_split_with_different_columns_are_refused(folder: Path) -> None:
    write(folder / "train1.csv", rows())
    write(folder / "train2.csv", rows(header="image,class"))
    assert "train2.csv has a column class, train1.csv has not" in refusal(folder)


# Where the files lie


def test_ids_without_suffix_are_found_in_the_folder_or_the_one_beside_the_table(folder: Path) -> None:
    lines = ["image_id,label", *(f"{number},{name}" for number, name in enumerate(CLASSES))]
    source = load(write(folder / "t.csv", lines))
    assert found(source) == EXPECTED
    assert "suffixes of files added" in source.description and str(folder / "img") in source.description
    assert found(load(write(folder / "img" / "t.csv", lines))) == EXPECTED
    assert found(load(folder / "t.csv", image_root=str(folder / "img"))) == EXPECTED
    images(folder / "img", "jpg", 1)
    assert "two files have the name" in refusal(folder / "t.csv")


def test_files_that_lie_in_several_folders_are_not_guessed(folder: Path) -> None:
    images(folder / "test_images", count=4)
    path = write(folder / "t.csv", [line.replace("img/", "") for line in rows()])
    said = refusal(path)
    assert "img (24), test_images (4)" in said and "--image_root" in said
    assert found(load(path, image_root=str(folder / "img"))) == EXPECTED
    said = refusal(folder)  # never the classes img and test_images
    assert "several folders" in said and "--class_folders" not in said


def test_image_root_with_class_folders_is_refused(folder: Path) -> None:
    for name in ("cat", "dog"):
        images(folder / "photos" / name, count=3)
    assert "no table that names images" in refusal(folder / "photos", image_root=str(folder))


@pytest.mark.parametrize("prefix", ["/kaggle/input/set/", "C:\\Users\\me\\", "file:///home/someone/", "elsewhere/"])
def test_paths_of_another_machine_need_an_image_root_that_is_proposed(folder: Path, prefix: str) -> None:
    lines = [line if number == 0 else prefix + line for number, line in enumerate(rows())]
    path = write(folder / "t.csv", lines)
    said = refusal(path)
    assert "none of the 24 files is there" in said and f"--image_root {folder}" in said
    assert found(load(path, image_root=str(folder))) == EXPECTED


def test_files_with_another_suffix_are_named(folder: Path) -> None:
    said = refusal(write(folder / "t.csv", [line.replace(".png", ".jpg") for line in rows()]))
    assert "0.png is there: correct the suffixes" in said


def test_paths_as_file_urls_are_read(folder: Path) -> None:
    lines = [line if number == 0 else f"file://{folder}/{line}" for number, line in enumerate(rows())]
    assert found(load(write(folder / "t.csv", lines))) == EXPECTED


def test_names_in_another_normal_form_are_found(folder: Path) -> None:
    for number, form in enumerate(("NFC", "NFD")):
        sub = unicodedata.normalize(form, "é")
        images(folder / str(number) / sub)
        other = unicodedata.normalize(("NFD", "NFC")[number], "é")
        path = write(folder / str(number) / "t.csv", [line.replace("img/", other + "/") for line in rows()])
        assert found(load(path)) == EXPECTED


def test_missing_files_are_named_unless_they_may_be_skipped(folder: Path) -> None:
    path = write(folder / "t.csv", [*rows(), "img/x.png,cat"])
    said = refusal(path)
    assert "1 of the 25 files that were checked are missing" in said and "img/x.png" in said
    assert len(load(path, on_bad_image="skip").tables["train"]) == 25
    lines = rows()
    lines[3] = ",cat"
    assert "1 of 24 rows have no image" in refusal(write(folder / "t.csv", lines))
    assert "there is no such folder" in refusal(path, image_root="/nowhere")


def test_a_check_of_files_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["image,label", *(f"gone/{number}.png,{'ab'[number % 2]}" for number in range(5000))]
    calls = []

    def lexists(path: str) -> bool:
        calls.append(path)
        return False

    monkeypatch.setattr(os.path, "lexists", lexists)
    said = refusal(write(folder / "t.csv", lines))
    assert re.search(r"none of the (1\d\d|200) files that were checked", said)
    assert len(calls) < 1000


# What is in the image column


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_base64_is_read(folder: Path, prefix: str) -> None:
    data = [base64.b64encode(png((number, 1, 1))).decode() for number in range(24)]
    lines = ["image,label", *(f'"{prefix}{text}",{name}' for text, name in zip(data, CLASSES, strict=True))]
    source = load(write(folder / "t.csv", lines))
    assert [image["bytes"] for image in source.tables["train"]["image"]] == [png((n, 1, 1)) for n in range(24)]
    lines[8] = lines[8].replace("A", "*", 1)
    assert "is not base64 in row 7" in refusal(write(folder / "t.csv", lines))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.org/a.jpg", "download the images first"),
        ("s3://bucket/a.jpg", "download the images first"),
        ("gs://bucket/a", "download the images first"),
        ("b'\\x89PNG'", "save the table as Parquet"),
        ("\"{'bytes': b'x', 'path': None}\"", "save the table as Parquet"),
        ("<PIL.Image.Image image mode=RGB size=8x8>", "the names of Python objects"),
        ('"[[1, 2], [3, 4]]"', "pixel values as text"),
        (" ".join(["70"] * 64), "pixel values as text"),
    ],
)
def test_a_column_that_holds_no_images_is_described(folder: Path, image: str, message: str) -> None:
    said = refusal(write(folder / "t.csv", ["image,label", *(f"{image},{name}" for name in CLASSES)]))
    assert message in said and len(said.replace(str(folder), "")) < 200


PNGS = [png((number, 1, 1)) for number in range(24)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(PNGS),
        pa.array(PNGS, pa.large_binary()),
        pa.array(PNGS, pa.binary_view()),
        pa.array([{"bytes": data, "path": None} for data in PNGS]),
        pa.array(PATHS).dictionary_encode(),
        pa.array(PATHS, pa.large_string()),
        pa.array([base64.b64encode(data).decode() for data in PNGS]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "labels", [pa.array(CLASSES), pa.array(CLASSES).dictionary_encode()], ids=["plain", "categories"]
)
def test_parquet_columns_of_every_type_are_read(folder: Path, column: pa.Array, labels: pa.Array) -> None:
    pq.write_table(pa.table({"image": column, "label": labels}), folder / "t.parquet")
    assert [name for _, name in found(load(folder / "t.parquet"))] == CLASSES


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(np.zeros((24, 4, 4, 3), np.uint8).tolist()), "arrays of numbers"),
        (pa.array([[{"bytes": PNGS[0], "path": None}]] * 24), "lists of images"),
        (pa.array([PATHS[:2]] * 24), "lists of images"),
    ],
)
def test_lists_in_the_image_column_are_refused(folder: Path, column: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"image": column, "label": CLASSES}), folder / "t.parquet")
    assert message in refusal(folder / "t.parquet")


def test_splits_by_column_hold_for_saved_data_sets(folder: Path) -> None:
    columns = {"image": PNGS, "label": CLASSES, "split": ["train"] * 16 + ["test"] * 8}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"), split=datasets.Value("string"))
    made = [{"bytes": data, "path": None} for data in PNGS]
    datasets.Dataset.from_dict({**columns, "image": made}, features=features).save_to_disk(folder / "saved")
    source = load(folder / "saved")
    assert [name for _, name in found(source)] == CLASSES[:16]
    assert [name for _, name in found(source, "test")] == CLASSES[16:]
