"""Which files of a data folder are its tables, and which split each of them belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_fixtures import png
from test_tables import load, refusal

from vit_dist.data.split import class_list
from vit_dist.data.table_files import group_by_split, split_side_tables

TRAIN, TEST = [f"a{number}.png" for number in range(6)], [f"b{number}.png" for number in range(4)]


def table(path: Path, names: list[str], header: str = "image,label", labels: str = "cat dog") -> None:
    """A table beside its images, which are made if they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = labels.split()
    lines = [f"{name},{classes[number % len(classes)]}" for number, name in enumerate(names)]
    path.write_text("\n".join([header, *lines]) + "\n")
    for number, name in enumerate(names):
        image = path.parent / name
        image.parent.mkdir(parents=True, exist_ok=True)
        if not image.exists():
            image.write_bytes(png((number, 9, 9)))


def class_folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(3):
            (root / name / f"{name}_{number}.png").write_bytes(png((number, 9, 9)))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("labels_train.csv", "labels_test.csv"),
        ("trainset.csv", "testset.csv"),
        ("data.train.csv", "data.test.csv"),
        ("trn.csv", "tst.csv"),
        ("TrainLabels.csv", "TestLabels.csv"),
        ("images_train/labels.csv", "images_test/labels.csv"),
        ("seg_train/l.csv", "seg_test/l.csv"),
        ("train_test_data/train.csv", "train_test_data/test.csv"),
        ("train.csv", "test.csv"),
    ],
)
def test_tables_of_two_splits_are_not_merged(tmp_path: Path, train: str, test: str) -> None:
    table(tmp_path / "d" / train, TRAIN)
    table(tmp_path / "d" / test, TEST)
    sizes = {role: len(rows) for role, rows in load(tmp_path / "d").tables.items()}
    assert sizes == {"train": 6, "test": 4}


def test_tables_without_split_names_and_shards_are_one_split() -> None:
    assert group_by_split(["cats.csv", "dogs.csv"]) == {"cats": ["cats.csv"], "dogs": ["dogs.csv"]}
    shards = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert group_by_split(shards) == {"train": shards}
    assert group_by_split(["train/0.tar", "val/0.tar"]) == {"train": ["train/0.tar"], "val": ["val/0.tar"]}


def test_table_for_evaluation_beside_one_without_a_split_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "d" / "labels.csv", TRAIN)
    table(tmp_path / "d" / "holdout.csv", TEST)
    assert "holdout.csv may be for evaluation and labels.csv for training" in refusal(tmp_path / "d")


@pytest.mark.parametrize("name", ["sample_submission.csv", "sampleSubmission.csv", "predictions.csv", "class_map.csv"])
def test_side_table_is_not_merged_and_is_named(tmp_path: Path, name: str) -> None:
    table(tmp_path / "d" / "labels.csv", TRAIN)
    table(tmp_path / "d" / name, TEST)
    source = load(tmp_path / "d")
    assert len(source.tables["train"]) == 6 and f"not used: {name}" in source.description


def test_side_table_alone_is_the_table() -> None:
    assert split_side_tables(["classes.csv"]) == (["classes.csv"], [])
    assert split_side_tables(["a.csv", "classes.csv"]) == (["a.csv"], ["classes.csv"])


@pytest.mark.parametrize("flag", ["image_column_name", "label_column_name", "split_column_name"])
def test_column_flag_with_class_folders_is_refused(tmp_path: Path, flag: str) -> None:
    class_folders(tmp_path / "d", "cat", "dog")
    assert f"--{flag} kind" in refusal(tmp_path / "d", **{flag: "kind"})


@pytest.mark.parametrize(
    "content",
    [
        "image,label\ncam1/cam1_0.png,a,b,c\ncam1/cam1_1.png,b\n",  # a row that is too long
        "pic,kind\ncam1/cam1_0.png,a\ncam2/cam2_0.png,b\n",  # columns of unknown names
        "path,file_name,label\ncam1/cam1_0.png,cam1_0.png,a\ncam2/cam2_0.png,cam2_0.png,b\n",
    ],
)
def test_table_that_names_images_and_is_not_understood_is_refused(tmp_path: Path, content: str) -> None:
    class_folders(tmp_path / "d", "cam1", "cam2")
    (tmp_path / "d" / "labels.csv").write_text(content)
    assert "labels.csv" in (said := refusal(tmp_path / "d")) and "--class_folders top" in said
    assert class_list(load(tmp_path / "d", class_folders="top").tables["train"], None) == ["cam1", "cam2"]


def test_table_about_something_else_beside_class_folders_is_named_as_not_used(tmp_path: Path) -> None:
    class_folders(tmp_path / "d", "cat", "dog")
    (tmp_path / "d" / "prices.csv").write_text("food,price\nfish,3\nmeat,4\n")
    assert class_list(load(tmp_path / "d").tables["train"], None) == ["cat", "dog"]


def test_flat_test_folder_beside_class_folders_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "d", "cat", "dog", "test")
    assert "test beside the class folders cat, dog may hold images without labels" in refusal(tmp_path / "d")
    chosen = load(tmp_path / "d", class_folders="top")
    assert class_list(chosen.tables["train"], None) == ["cat", "dog", "test"]


def test_y_beside_x_is_no_label(tmp_path: Path) -> None:
    lines = [f"{name},{number},{number}" for number, name in enumerate(TRAIN)]
    table(tmp_path / "d" / "t.csv", TRAIN)
    (tmp_path / "d" / "t.csv").write_text("\n".join(["image,x,y", *lines]))
    assert "no column looks like it holds labels" in refusal(tmp_path / "d" / "t.csv")


def test_column_of_two_splits_without_training_rows_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "d" / "t.csv", TRAIN)
    rows = [f"{name},{'ab'[number % 2]},{('dev', 'test')[number % 2]}" for number, name in enumerate(TRAIN)]
    (tmp_path / "d" / "t.csv").write_text("\n".join(["image,label,kind of use", *rows]))
    assert "no rows are for training" in refusal(tmp_path / "d" / "t.csv")
