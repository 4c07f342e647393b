"""Everything that `--data` accepts comes out in one shape; what it does not accept is named."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from image_fixtures import image_folder, options, png, run_python, settle, shared_data

from vit_dist.data import index as index_module
from vit_dist.data.decode import DecodeRules, decode
from vit_dist.data.index import folder_index
from vit_dist.data.source import Source, load_source
from vit_dist.data.split import class_list, encode_labels
from vit_dist.errors import UserError
from vit_dist.options import DataOptions

COLOURS = {0: (10, 0, 0), 1: (0, 20, 0), 2: (0, 0, 30)}
NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def load(tmp_path):
    """Load with caches of the test's own."""
    return lambda data, **values: load_source(options(data, tmp_path / "cache", **values))


def error(load: Any, data: Any, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(data, **values)
    return str(caught.value)


def pairs(source: Source, role: str = "train") -> list[tuple[tuple[int, ...], str]]:
    """Colour and class of every row, by way of decoding and encoding."""
    table = source.tables[role]
    assert table.column_names == ["id", "image", "label"]
    assert table.features["image"] == datasets.Image(decode=False)
    assert len(set(table["id"])) == len(table)
    classes = class_list(source.tables["train"], source.names)
    encoded = encode_labels(table, classes, role)
    return [(decode(row["image"], DecodeRules()).getpixel((0, 0)), classes[row["label"]]) for row in encoded]


def expected(labels: list[int], names: list[str] = NAMES) -> list[tuple[tuple[int, ...], str]]:
    return [(COLOURS[label], names[label]) for label in labels]


def hub_table(labels: list[int], image: str = "img", label: str = "label") -> datasets.Dataset:
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)})
    images = [{"bytes": png(COLOURS[value]), "path": None} for value in labels]
    return datasets.Dataset.from_dict({image: images, label: labels}, features=features)


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def images_beside(root: Path, labels: list[int]) -> list[str]:
    (root / "images").mkdir(parents=True, exist_ok=True)
    for row, label in enumerate(labels):
        (root / "images" / f"{row}.png").write_bytes(png(COLOURS[label]))
    return [f"images/{row}.png" for row in range(len(labels))]


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


# Digits


def test_digits(load):
    source = load("digits")
    train, test = source.tables["train"], source.tables["test"]
    assert set(source.tables) == {"train", "test"} and len(train) + len(test) == 1797 and len(test) == 359
    assert not set(train["id"]) & set(test["id"])
    assert source.names == [str(digit) for digit in range(10)]
    assert np.bincount(test["label"]).min() >= 34
    assert decode(train[0]["image"], DecodeRules()).size == (8, 8)
    assert list(load("digits").tables["test"]["id"]) == list(test["id"])
    assert "train 1,438, test 359" in source.description
    assert set(load("digits", test_split="none").tables) == {"train"}


# Folders of class folders


def test_class_folders_without_splits(load, tmp_path):
    root = image_folder(tmp_path / "photos", {"dog": 2, "cat/siamese": 1, "cat": 1})
    source = load(root)
    table = source.tables["train"]
    assert list(table["id"]) == ["cat/0.png", "cat/siamese/0.png", "dog/0.png", "dog/1.png"]
    assert list(table["label"]) == ["cat", "cat", "dog", "dog"]
    assert table[0]["image"] == {"bytes": None, "path": str(root / "cat/0.png")}
    assert source.names is None
    assert source.description == f"{root}: image folder, 2 classes; train 4"


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "validation", "test"),
        ("training", "valid", "testing"),
        ("Train", "val", "Test"),
        ("train", "eval", "test"),
    ],
)
def test_class_folders_in_split_folders(load, tmp_path, train, validation, test):
    folders = {f"{train}/a": 3, f"{train}/b": 2, f"{validation}/b": 1, f"{test}/a": 2, "extra/a": 1}
    source = load(image_folder(tmp_path / "photos", folders))
    assert {role: len(table) for role, table in source.tables.items()} == {"train": 5, "validation": 1, "test": 2}
    assert list(source.tables["validation"]["label"]) == ["b"]
    assert source.description.endswith("2 classes; train 5, validation 1, test 2; not used: extra")


def test_splits_by_name(load, tmp_path):
    root = image_folder(tmp_path / "photos", {"fit/a": 1, "fit/b": 1, "dev/a": 1, "test/a": 1})
    assert "--train_split" in error(load, image_folder(tmp_path / "other", {"test/a": 1, "val/b": 1}))
    source = load(root, train_split="fit", test_split="none")
    assert {role: table[0]["id"] for role, table in source.tables.items()} == {
        "train": "fit/a/0.png",
        "validation": "dev/a/0.png",
    }
    assert "it has dev, fit, test" in error(load, root, train_split="fit", validation_split="vall")
    assert "already has another role" in error(load, root, train_split="fit", validation_split="fit")


def test_class_folder_called_train_is_a_class(load, tmp_path):
    source = load(image_folder(tmp_path / "vehicles", {"train": 2, "car": 2}))
    assert sorted(set(source.tables["train"]["label"])) == ["car", "train"]


def test_images_without_a_class(load, tmp_path):
    root = image_folder(tmp_path / "kaggle", {"train/a": 1, "train/b": 1, "test": 2})
    assert "--test_split none" in error(load, root)
    assert len(load(root, test_split="none").tables["train"]) == 2
    assert "no class folder" in error(load, image_folder(tmp_path / "flat", {".": 2}))
    assert "0.png" in error(load, image_folder(tmp_path / "mixed", {".": 1, "a": 1, "b": 1}))
    assert "no class folder" in error(load, image_folder(tmp_path / "unlabelled", {"train": 1, "test": 1}))


def test_hidden_files_do_not_matter_but_hidden_images_do(load, tmp_path):
    root = image_folder(tmp_path / "photos", {"a": 2, "b": 2})
    (root / ".git").mkdir()
    (root / "__MACOSX" / "a").mkdir(parents=True)
    for name in (".DS_Store", ".git/config", "__MACOSX/a/._0.png", "a/._0.png", "a/Thumbs.db", "notes.txt"):
        (root / name).touch()
    source = load(root)
    assert len(source.tables["train"]) == 4 and "2 other files ignored (1 .db, 1 .txt)" in source.description
    for folder in (".mine", "a/.mine"):
        image_folder(root, {folder: 1})
        message = error(load, root)
        assert str(root / folder) in message and "delete it" in message
        shutil.rmtree(root / folder)
    assert len(load(root).tables["train"]) == 4


def test_links(load, tmp_path):
    elsewhere = image_folder(tmp_path / "elsewhere", {"x": 2})
    root = image_folder(tmp_path / "photos", {"a": 1, "b": 1})
    (root / "a" / "linked.png").symlink_to(elsewhere / "x" / "0.png")
    (root / "a" / "dangling.png").symlink_to("nowhere")
    (root / "a" / "loop").symlink_to(root)
    (root / "c").symlink_to(elsewhere / "x")
    os.mkfifo(root / "a" / "pipe.png")
    ids = list(load(root).tables["train"]["id"])
    assert ids == ["a/0.png", "a/dangling.png", "a/linked.png", "b/0.png", "c/0.png", "c/1.png"]


def test_special_characters_in_names(load, tmp_path):
    root = image_folder(tmp_path / "my [photos] *", {"été, rot": 1, "a#b": 1})
    assert [label for _, label in pairs(load(root))] == ["a#b", "été, rot"]
    hub_table([0, 1]).to_parquet(tmp_path / "my [photos] *" / "train-0.parquet")
    assert len(load(tmp_path / "my [photos] *" / "train-0.parquet").tables["train"]) == 2
    image_folder(tmp_path / "odd", {"a": 1, "b": 1})
    with open(os.fsencode(tmp_path / "odd" / "a") + b"/\xff.png", "wb"):
        assert "UTF-8" in error(load, tmp_path / "odd")


def test_home_and_relative_paths(load, tmp_path, monkeypatch):
    root = image_folder(tmp_path / "photos", {"a": 1, "b": 1})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for data in ("~/photos", "photos", "./photos", "photos/../photos/"):
        assert load(data).tables["train"][0]["image"]["path"] == str(root / "a" / "0.png")


def test_default_cache_is_that_of_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "hf")
    load_source(DataOptions(data=str(image_folder(tmp_path / "photos", {"a": 1, "b": 1}))))
    assert list((tmp_path / "hf" / "vit_dist").glob("index-*.sealed"))


# The index


@pytest.fixture
def scans(monkeypatch):
    """How often a folder was listed."""
    calls = []
    scan = index_module._scan
    monkeypatch.setattr(index_module, "_scan", lambda root: calls.append(root) or scan(root))
    return calls


def test_folder_unchanged_is_listed_once(tmp_path, scans):
    root = image_folder(tmp_path / "photos", {"a": 2, "b/deep": 2})
    settle(root)
    for _ in range(3):
        assert len(folder_index(root, tmp_path).images) == 4
    assert len(scans) == 1
    (root / "b" / "deep" / "0.png").rename(root / "b" / "deep" / "renamed.png")
    assert "b/deep/renamed.png" in folder_index(root, tmp_path).images.to_pylist() and len(scans) == 2
    shutil.rmtree(root / "b")
    assert folder_index(root, tmp_path).images.to_pylist() == ["a/0.png", "a/1.png"] and len(scans) == 3


def test_file_added_in_the_same_clock_tick_is_noticed(tmp_path, scans):
    root = image_folder(tmp_path / "photos", {"a": 2})
    folder_index(root, tmp_path)
    stat = os.stat(root / "a")
    image_folder(root, {"a": 3})
    os.utime(root / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(folder_index(root, tmp_path).images) == 3 and len(scans) == 2


def test_index_damaged_is_made_again(tmp_path, scans):
    root = image_folder(tmp_path / "photos", {"a": 2})
    settle(root)
    folder_index(root, tmp_path)
    (path,) = tmp_path.glob("index-*.sealed")
    path.write_bytes(path.read_bytes()[:-20])
    assert len(folder_index(root, tmp_path).images) == 2 and len(scans) == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_folder_is_listed_once_by_two_processes(tmp_path):
    root = image_folder(tmp_path / "photos", {f"class{number}": 20 for number in range(20)})
    settle(root)
    code = (
        "import time; from pathlib import Path; from vit_dist.data import index\n"
        "scan, calls = index._scan, []\n"
        "def slow(root): calls.append(1); time.sleep(1); return scan(root)\n"
        "index._scan = slow\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "found = index.folder_index(Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "print(len(found.images), len(calls))"
    )
    runs = [run_python(code, root, tmp_path, data_options=options(root, tmp_path)) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    outputs = []
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        outputs.append(run.communicate(timeout=60))
    assert sorted(output.split() for output, _ in outputs) == [["400", "0"], ["400", "1"]]
    assert [stderr for _, stderr in outputs] == ["", ""]


def test_cache_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache_dir"):
        load_source(options(image_folder(tmp_path / "photos", {"a": 1, "b": 1}), tmp_path / "file"))


# Parquet


def test_parquet_with_hub_metadata(load, tmp_path):
    hub_table([0, 1, 2, 1]).to_parquet(tmp_path / "rows.parquet")
    source = load(tmp_path / "rows.parquet")
    assert source.names == NAMES
    assert pairs(source) == expected([0, 1, 2, 1])
    assert source.tables["train"][3]["id"] == "rows.parquet#3"
    assert "images in column img, labels in label" in source.description


@pytest.mark.parametrize("image", ["struct", "binary"])
def test_parquet_without_hub_metadata(load, tmp_path, image):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [png(COLOURS[label]) for label in (2, 0)]
    values = data if image == "binary" else [{"bytes": item, "path": None} for item in data]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column = pa.array(values, pa.binary() if image == "binary" else struct)
    pq.write_table(pa.table({"image": column, "label": ["cat", "ant"]}), tmp_path / "rows.parquet")
    source = load(tmp_path / "rows.parquet")
    assert source.names is None and pairs(source) == expected([2, 0])


def test_folder_of_parquet_shards_is_read(load, tmp_path):
    root = tmp_path / "clone"
    (root / "data").mkdir(parents=True)
    hub_table([0, 1]).to_parquet(root / "data" / "train-00000-of-00002.parquet")
    hub_table([2]).to_parquet(root / "data" / "train-00001-of-00002.parquet")
    hub_table([1]).to_parquet(root / "data" / "test-00000-of-00001.parquet")
    (root / "README.md").touch()
    source = load(root)
    assert pairs(source) == expected([0, 1, 2]) and pairs(source, "test") == expected([1])
    assert list(source.tables["train"]["id"]) == [
        "data/train-00000-of-00002.parquet#0",
        "data/train-00000-of-00002.parquet#1",
        "data/train-00001-of-00002.parquet#0",
    ]
    hub_table([2, 2]).to_parquet(root / "data" / "train-00001-of-00002.parquet")  # a new version of a shard
    assert pairs(load(root)) == expected([0, 1, 2, 2])


def test_files_without_a_split_in_their_name_are_all_train(load, tmp_path):
    for shard in range(2):
        hub_table([shard, 2]).to_parquet(tmp_path / f"part-{shard}.parquet")
    assert pairs(load(tmp_path)) == expected([0, 2, 1, 2])
    hub_table([0]).to_parquet(tmp_path / "holdout-0.parquet")
    source = load(tmp_path, train_split="part", test_split="holdout")
    assert pairs(source) == expected([0, 2, 1, 2]) and pairs(source, "test") == expected([0])


def test_unused_split_is_not_read(load, tmp_path):
    hub_table([0, 1]).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "test.parquet").write_bytes(b"broken")
    assert "test.parquet" in error(load, tmp_path)
    assert len(load(tmp_path, test_split="none").tables["train"]) == 2


# CSV and JSON


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_csv_with_paths(load, tmp_path, suffix):
    root = tmp_path / "table"
    paths = images_beside(root, [0, 1, 2])
    paths[1] = str(root / paths[1])  # absolute is fine
    rows = [{"file_name": path, "label": NAMES[row], "note": "x"} for row, path in enumerate(paths)]
    path = write_csv(root / f"labels.{suffix}", rows, "\t" if suffix == "tsv" else ",")
    for data in (path, root):  # the table wins over the folder of images beside it
        source = load(data)
        assert pairs(source) == expected([0, 1, 2])
        assert source.tables["train"][2]["id"] == f"labels.{suffix}#2"


def test_csv_files_by_split_in_their_own_folders(load, tmp_path):
    for split, labels in (("train", [0, 1]), ("validation", [1])):
        paths = images_beside(tmp_path / split, labels)
        rows = [{"image": path, "label": NAMES[label]} for path, label in zip(paths, labels, strict=True)]
        write_csv(tmp_path / split / "metadata.csv", rows)
    source = load(tmp_path)
    assert pairs(source) == expected([0, 1]) and pairs(source, "validation") == expected([1])


def test_numbers_in_csv_are_numbers_only_if_nothing_is_lost(load, tmp_path):
    paths = images_beside(tmp_path, [0, 1, 0])

    def classes(labels: list[str]) -> list[str]:
        write_csv(tmp_path / "a.csv", [{"image": p, "label": v} for p, v in zip(paths, labels, strict=True)])
        return class_list(load(tmp_path / "a.csv").tables["train"], None)

    assert classes(["10", "9", "10"]) == ["9", "10"]
    assert classes(["007", "7", "10"]) == ["007", "10", "7"]
    with pytest.raises(UserError, match=r"no label, for example a\.csv#1"):
        classes(["1", "", "2"])


def test_class_folders_may_hold_tables_about_something_else(load, tmp_path):
    root = image_folder(tmp_path / "photos", {"a": 1, "b": 1})
    write_csv(root / "owners.csv", [{"name": "Ada", "age": 36}])
    (root / "classes.json").write_text('{"a": 0, "b": 1}')
    (root / "photos.tar").write_bytes(b"")
    assert "image folder, 2 classes" in load(root).description


@pytest.mark.parametrize("as_list", [False, True])
def test_json_lines_and_lists(load, tmp_path, as_list):
    paths = images_beside(tmp_path / "table", [0, 1, 2])
    data = base64.b64encode(png(COLOURS[2])).decode()
    images = [paths[0], {"bytes": None, "path": paths[1]}, {"bytes": data, "path": None}]
    rows = [{"image": image, "label": NAMES[row]} for row, image in enumerate(images)]
    path = tmp_path / "table" / ("rows.json" if as_list else "rows.jsonl")
    path.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)) + "\n\n")
    assert pairs(load(path)) == expected([0, 1, 2])


def test_json_lines_as_datasets_writes_them(load, tmp_path):
    paths = images_beside(tmp_path, [1, 0])
    rows = {"image": [str(tmp_path / path) for path in paths], "label": [1, 0]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    datasets.Dataset.from_dict(rows, features=features).to_json(tmp_path / "rows.jsonl")
    source = load(tmp_path / "rows.jsonl")
    assert pairs(source) == expected([1, 0], ["0", "1"])  # names are not written


def test_broken_tables_are_named(load, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "b.jsonl").write_text('{"image": "x.png", "label"\n')
    (tmp_path / "c.csv").write_bytes(b"image,label\n\xff\xfe,1\n")
    (tmp_path / "d.csv").write_text("image,label\n")
    (tmp_path / "e.tar").write_bytes(b"not a tar")
    (tmp_path / "f.csv").write_text("image,label\na.png,1,2\n")
    (tmp_path / "g.jsonl").write_text("3\n")
    (tmp_path / "h.jsonl").write_text('{"image": {"bytes": "***"}, "label": 1}\n')
    for path in sorted(tmp_path.glob("?.*")):
        assert str(path) in error(load, path)
    (tmp_path / "i.xlsx").touch()
    assert "save the spreadsheet as CSV" in error(load, tmp_path / "i.xlsx")
    (tmp_path / "i.doc").touch()
    assert ".parquet" in error(load, tmp_path / "i.doc")


# WebDataset


def test_webdataset_with_cls(load, tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    for shard, labels in enumerate([[0, 1], [2]]):
        samples = {
            f"{shard}{row}": {"png": png(COLOURS[label]), "cls": str(label).encode()}
            for row, label in enumerate(labels)
        }
        write_tar(root / f"train-{shard:06}.tar", samples)
    write_tar(root / "val-000000.tar", {"0": {"png": png(COLOURS[1]), "cls": b"1"}})
    source = load(root)
    numbers = ["0", "1", "2"]
    assert pairs(source) == expected([0, 1, 2], numbers) and pairs(source, "validation") == expected([1], numbers)
    assert list(source.tables["train"]["id"]) == ["train-000000.tar#0", "train-000000.tar#1", "train-000001.tar#0"]
    assert len(load(root / "train-000000.tar").tables["train"]) == 2


def test_webdataset_with_labels_in_json(load, tmp_path):
    samples = {
        str(row): {"png": png(COLOURS[label]), "json": json.dumps({"label": NAMES[label], "width": 4}).encode()}
        for row, label in enumerate([2, 0, 1])
    }
    source = load(write_tar(tmp_path / "a.tar", samples))
    assert pairs(source) == expected([2, 0, 1]) and "labels in json.label" in source.description


# save_to_disk


def test_saved_dataset_and_dict(load, tmp_path):
    hub_table([0, 1, 2]).select([2, 0, 1]).save_to_disk(tmp_path / "one")
    source = load(tmp_path / "one")
    assert pairs(source) == expected([2, 0, 1]) and source.tables["train"][1]["id"] == "train#1"
    both = datasets.DatasetDict(train=hub_table([0, 1, 2]), dev=hub_table([1]), other=hub_table([2]))
    both.save_to_disk(tmp_path / "both")
    source = load(tmp_path / "both")
    assert pairs(source, "validation") == expected([1]) and source.tables["validation"][0]["id"] == "dev#0"
    assert "not used: other" in source.description
    shutil.rmtree(tmp_path / "both" / "dev")
    assert "save_to_disk" in error(load, tmp_path / "both")
    datasets.DatasetDict(test=hub_table([0]), extra=hub_table([0])).save_to_disk(tmp_path / "no_train")
    assert "only test, extra" in error(load, tmp_path / "no_train")


# Columns


def saved(path: Path, **columns: Any) -> Path:
    features = {"image": datasets.Image(decode=False)}
    values: dict[str, Any] = {"image": [{"bytes": png(), "path": None}] * 2}
    for name, feature in columns.items():
        features[name] = feature
        is_image = isinstance(feature, datasets.Image)
        values[name] = values["image"] if is_image else ["a", "b"] if feature == datasets.Value("string") else [0, 1]
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).save_to_disk(path)
    return path


def test_columns_are_inferred(load, tmp_path):
    kind, number, text = datasets.ClassLabel(names=["x", "y"]), datasets.Value("int64"), datasets.Value("string")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"fine_label": kind, "coarse_label": kind}, "fine_label"),
        ({"species": kind, "width": number}, "species"),
        ({"gender": kind, "label": number}, "label"),
        ({"target": text}, "target"),
        ({"label": number, "mask": datasets.Image()}, "label"),
    ]
    for number_, (columns, label) in enumerate(cases):
        source = load(saved(tmp_path / str(number_), **columns))
        assert source.description.split(";")[0].endswith(f"images in column image, labels in {label}")


def test_columns_that_cannot_be_told_apart(load, tmp_path):
    kind, number = datasets.ClassLabel(names=["x", "y"]), datasets.Value("int64")
    two = saved(tmp_path / "two", age=kind, gender=kind)
    message = error(load, two)
    assert "--label_column_name" in message and "age (ClassLabel of 2), gender (ClassLabel of 2)" in message
    assert load(two, label_column_name="gender").description.split(";")[0].endswith("labels in gender")
    assert "did you mean gender?" in error(load, two, label_column_name="gendr")
    assert "--label_column_name" in error(load, saved(tmp_path / "none", width=number))
    images = saved(tmp_path / "images", photo=datasets.Image(), label=number)
    assert "--image_column_name" in error(load, images)
    assert "column photo" in load(images, image_column_name="photo").description
    assert "label" in error(load, images, image_column_name="label")


# What is not there


def test_paths_that_do_not_exist(load, tmp_path):
    image_folder(tmp_path / "photos", {"train/a": 1})
    assert f"did you mean {tmp_path / 'photos'}?" in error(load, tmp_path / "fotos" / "train")
    assert f"did you mean {tmp_path / 'photos' / 'train'}?" in error(load, tmp_path / "photos" / "trian")
    for data in ("./nowhere", "~/nowhere-at-all", "a/b/c", "rows.parquet", ""):
        assert "no such file or folder" in error(load, data)


def test_folders_without_anything(load, tmp_path):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    assert "no images" in error(load, tmp_path / "empty")
    (tmp_path / "empty" / "a" / "readme.txt").touch()
    assert "no images" in error(load, tmp_path / "empty")


NO_NETWORK = (
    "import socket, time\n"
    "def refuse(*_, **__): raise socket.gaierror(-2, 'Name or service not known')\n"
    "socket.getaddrinfo = refuse\n"
    "from vit_dist.data.source import load_source; from vit_dist.errors import UserError\n"
    "start = time.monotonic()\n"
    "try: source = load_source(options); print(0, len(source.tables['train']), source.revision)\n"
    "except UserError as error: print(time.monotonic() - start, error)"
)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_unreachable_hub_is_one_line_within_seconds(tmp_path, offline):
    env = {"HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    run = run_python(NO_NETWORK, data_options=options("someone/flowers", tmp_path), env=env)
    output, errors = run.communicate(timeout=100)
    assert output, errors
    seconds, message = output.split(maxsplit=1)
    assert float(seconds) < 10
    assert "someone/flowers" in message and "no such path exists here" in message and "hub" in message
    assert message.count("\n") == 1


def test_hub_data_set_in_the_cache_needs_no_network(tmp_path):
    from datasets.packaged_modules.parquet.parquet import Parquet

    hub_table([0, 1, 2]).to_parquet(tmp_path / "rows.parquet")
    builder = Parquet(
        cache_dir=str(tmp_path / "cache" / "datasets"),
        dataset_name="bugs",
        hash="d" * 40,
        data_files={"train": str(tmp_path / "rows.parquet")},
    )
    builder.download_and_prepare()
    (files,) = (tmp_path / "cache" / "datasets").glob(f"bugs/*/0.0.0/{'d' * 40}")
    shutil.copytree(files, tmp_path / "cache" / "datasets" / "someone___bugs" / "default" / "0.0.0" / ("d" * 40))
    env = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    run = run_python(NO_NETWORK, data_options=options("someone/bugs", tmp_path / "cache"), env=env)
    output, errors = run.communicate(timeout=100)
    assert output.split()[1:] == ["3", "d" * 40], output + errors


def test_answers_of_the_hub(load, monkeypatch, tmp_path):
    """The hub's part played by a local builder: the commit is pinned and recorded, its errors become ours."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    asked: dict[str, Any] = {}

    class Builder:
        hash = "0" * 40

        def download_and_prepare(self) -> None:
            pass

        def as_dataset(self) -> datasets.DatasetDict:
            return datasets.DatasetDict(train=hub_table([0, 1, 2]), test=hub_table([2]))

    def builder(data: str, **values: Any) -> Builder:
        asked.update(values, data=data)
        return Builder()

    def info(self: Any, data: str, **values: Any) -> Any:
        if failure is not None:
            raise failure
        return huggingface_hub.hf_api.DatasetInfo(id=data, sha="c" * 40, tags=[])

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    failure: Exception | None = None
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    source = load("someone/bugs", data_config="small", data_revision="main")
    assert pairs(source) == expected([0, 1, 2]) and source.tables["test"][0]["id"] == "test#0"
    assert source.revision == "c" * 40 == asked["revision"] and asked["name"] == "small"
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    failure = RepositoryNotFoundError("?", response=response)
    assert "no such data set" in error(load, "someone/bugs")
    failure = RevisionNotFoundError("?", response=response)
    assert "--data_revision v9" in error(load, "someone/bugs", data_revision="v9")
    failure = OSError("no network")
    assert load("someone/bugs").revision == "0" * 40  # the copy in the cache
    assert offline == huggingface_hub.constants.HF_HUB_OFFLINE


# Data beside the checkout


CLOTHING, CIFAR10 = shared_data("clothing"), shared_data("cifar10")


@pytest.mark.skipif(CLOTHING is None, reason="no shared/data/clothing beside or above the checkout")
def test_real_folder(load):
    source = load(CLOTHING)
    sizes = {role: len(table) for role, table in source.tables.items()}
    assert set(sizes) == {"train", "validation", "test"} and min(sizes.values()) > 100
    classes = class_list(source.tables["train"], source.names)
    assert len(classes) == 10 and classes == sorted(classes)
    for role, table in source.tables.items():
        assert len(encode_labels(table, classes, role)) == sizes[role]


@pytest.mark.skipif(CIFAR10 is None, reason="no shared/data/cifar10 beside or above the checkout")
def test_real_parquet(load):
    source = load(CIFAR10, train_split="test", test_split="none")
    assert len(source.tables["train"]) == 10000
    classes = class_list(source.tables["train"], source.names)
    assert len(classes) == 10
    assert decode(source.tables["train"][77]["image"], DecodeRules()).size == (32, 32)
