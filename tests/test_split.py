"""Class lists, encoded labels, hold-out, limits and fingerprints."""

from __future__ import annotations

import os
from typing import Any

import datasets
import numpy as np
import pytest
from image_fixtures import image_folder, options, png, run_python

from vit_dist.data.columns import common_table
from vit_dist.data.source import load_source
from vit_dist.data.split import (
    class_list,
    classes_hash,
    classes_without_images,
    encode_labels,
    limit,
    stratified_split,
    table_fingerprint,
)
from vit_dist.errors import UserError


def table(labels: list[Any], names: list[str] | None = None, label: Any = None) -> datasets.Dataset:
    columns: dict[str, Any] = {"image": [{"bytes": png(), "path": None}] * len(labels), "label": labels}
    features = None
    if names is not None:
        label = datasets.ClassLabel(names=names)
    if label is not None:
        features = datasets.Features(image=datasets.Image(decode=False), label=label)
    rows = datasets.Dataset.from_dict(columns, features=features)
    return common_table(rows, "image", "label", [f"rows#{row}" for row in range(len(labels))])


def refused(labels: list[Any], *says: str, names: list[str] | None = None, label: Any = None) -> None:
    with pytest.raises(UserError) as caught:
        class_list(table(labels, names, label), names)
    for text in says:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "classes", "encoded"),
    [
        (["b", "a", "10", "2", "b"], ["10", "2", "a", "b"], [3, 2, 0, 1, 3]),  # as `datasets` sorts: lexically
        ([2, 0, 1, 0], ["0", "1", "2"], [2, 0, 1, 0]),
        ([10, 9, 30], ["9", "10", "30"], [1, 0, 2]),  # by value, not as text
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        ([1.0, 0.0], ["0", "1"], [1, 0]),
    ],
)
def test_undeclared_classes(labels, classes, encoded):
    rows = table(labels)
    assert class_list(rows, None) == classes
    result = encode_labels(rows, classes, "train")
    assert list(result["label"]) == encoded
    assert result.features["label"] == datasets.Value("int64")
    assert result.column_names == ["id", "image", "label"]


def test_declared_names_keep_their_order_also_without_images():
    rows = table([0, 2, 2], ["zebra", "ant", "bee"])
    classes = class_list(rows, rows.features["label"].names)
    assert classes == ["zebra", "ant", "bee"]
    encoded = encode_labels(rows, classes, "train")
    assert list(encoded["label"]) == [0, 2, 2]
    assert classes_without_images(encoded, classes) == ["ant"]


def test_splits_that_declare_another_order_are_matched_by_name():
    validation = table([0, 1, 1], ["ant", "zebra"])
    assert list(encode_labels(validation, ["zebra", "ant"], "validation")["label"]) == [1, 0, 0]


def test_split_without_some_classes_keeps_the_indices_of_train():
    assert list(encode_labels(table(["b", "c"]), ["a", "b", "c"], "validation")["label"]) == [1, 2]


def test_bad_labels_are_refused_with_an_example():
    refused(["a", "a"], "1 class", "(a)")
    refused([3, 3], "1 class")
    refused([0, 1, None], "no label", "rows#2")
    refused([0.0, 1.0, float("nan")], "no label", "rows#2")
    refused([0.0, 1.5], "whole number", "rows#1")
    refused([0, 1, -100], "-100", "rows#2")
    refused([0, 1, -1], "-1", "rows#2")
    refused(["a", ""], "empty", "rows#1")
    refused(["a", "b\n"], "unprintable", "rows#1")
    refused([[0, 1], [1, 2]], "one class per image")
    refused([0, 0], "1 class", names=["a", "b"])


def test_label_beyond_the_declared_names_is_refused():
    rows = table([0, 1, 2], label=datasets.Value("int64"))
    features = rows.features.copy()
    features["label"] = datasets.ClassLabel(names=["a", "b"])
    rows = datasets.Dataset(rows.data.table, info=datasets.DatasetInfo(features=features))
    with pytest.raises(UserError, match=r"above 1, the last class \(b\), for example rows#2"):
        class_list(rows, ["a", "b"])


def test_class_absent_from_train_names_split_class_and_image():
    with pytest.raises(UserError, match=r"validation has a class .*'d', for example rows#1"):
        encode_labels(table(["b", "d"]), ["a", "b", "c"], "validation")


@pytest.mark.parametrize("labels", [[-1, -1, -1], [None, None]])
def test_split_without_labels_is_refused(labels):
    with pytest.raises(UserError, match=r"not labelled.*--test_split none"):
        encode_labels(table(labels, label=datasets.Value("int64")), ["0", "1"], "test")


def test_hold_out_is_by_class_complete_and_the_same_every_time():
    labels = [0] * 100 + [1] * 40 + [2] * 7 + [3]
    train, validation, digest = stratified_split(table(labels), 0.15, seed=3)
    counts = np.bincount(validation["label"], minlength=4)
    assert counts.sum() == round(0.15 * 148)
    assert np.abs(counts - 0.15 * np.array([100, 40, 7, 1])).max() < 1
    assert counts[3] == 0
    assert sorted([*train["id"], *validation["id"]]) == sorted(f"rows#{row}" for row in range(148))
    again = stratified_split(table(labels), 0.15, seed=3)
    assert list(again[1]["id"]) == list(validation["id"]) and again[2] == digest
    assert stratified_split(table(labels), 0.15, seed=4)[2] != digest
    rows = [int(id.split("#")[1]) for id in train["id"]]
    assert rows == sorted(rows)


def test_hold_out_does_not_change_from_release_to_release():
    _, validation, digest = stratified_split(table([0, 1] * 10), 0.2, seed=0)
    assert list(validation["id"]) == ["rows#3", "rows#10", "rows#13", "rows#18"]
    assert digest.startswith("9410138796743594")


def test_small_classes_share_what_is_held_out():
    train, validation, _ = stratified_split(table([c for c in range(20) for _ in range(3)]), 0.15, seed=0)
    assert len(validation) == 9 and np.bincount(validation["label"]).max() == 1
    assert np.bincount(train["label"]).min() >= 2


def test_split_leaves_every_class_an_image_to_train_on():
    train, validation, _ = stratified_split(table([0, 0, 1, 1, 2]), 0.9, seed=0)
    assert sorted(train["label"]) == [0, 1, 2] and sorted(validation["label"]) == [0, 1]


def test_split_without_images_to_hold_out_is_refused():
    for labels, fraction in (([0, 1, 2], 0.5), ([0, 0, 1], 0.1)):
        with pytest.raises(UserError, match="--train_val_split"):
            stratified_split(table(labels), fraction, seed=0)
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match="between 0 and 1"):
            stratified_split(table([0, 1] * 9), fraction, seed=0)


def test_limit_draws_by_class_and_keeps_the_order():
    rows = table([0] * 80 + [1] * 18 + [2] * 2)
    few = limit(rows, 10, seed=0)
    assert np.bincount(few["label"]).tolist() == [7, 2, 1]
    numbers = [int(id.split("#")[1]) for id in few["id"]]
    assert numbers == sorted(numbers)
    assert list(limit(rows, 10, seed=0)["id"]) == list(few["id"])
    assert list(limit(rows, 10, seed=1)["id"]) != list(few["id"])
    assert len(limit(rows, 2, seed=0)) == 2
    assert limit(rows, None, seed=0) is rows and len(limit(rows, 1000, seed=0)) == 100
    for value in (0, -5):
        with pytest.raises(UserError, match=f"--max_eval_samples {value}"):
            limit(rows, value, seed=0, flag="max_eval_samples")


def test_fingerprint_of_moved_files_is_the_same(tmp_path):
    prints = []
    for name in ("one", "two"):
        root = image_folder(tmp_path / name, {"cat": 3, "dog": 3})
        os.utime(root / "cat" / "0.png", (len(prints), len(prints)))
        rows = load_source(options(root, tmp_path / "cache")).tables["train"]
        prints.append(table_fingerprint(rows))
    assert prints[0] == prints[1]
    assert table_fingerprint(rows.select([1, 0, 2, 3, 4, 5])) != prints[0]
    assert table_fingerprint(rows.select(range(6))) == prints[0]
    with open(root / "cat" / "0.png", "ab") as file:
        file.write(b"more")
    assert table_fingerprint(rows) != prints[0]
    (root / "cat" / "0.png").unlink()
    assert table_fingerprint(rows) != prints[0]


def test_fingerprint_changes_with_embedded_content_and_labels():
    rows = table([0, 1, 0])
    same = rows.to_list()
    other = [dict(row) for row in same]
    other[1]["image"] = {"bytes": same[1]["image"]["bytes"][:-1] + b"x", "path": None}
    relabelled = [{**row, "label": 1} for row in same]

    def again(items: list[dict[str, Any]]) -> datasets.Dataset:
        return datasets.Dataset.from_list(items, features=rows.features)

    assert table_fingerprint(again(same)) == table_fingerprint(rows)
    assert table_fingerprint(again(other)) != table_fingerprint(rows)
    assert table_fingerprint(again(relabelled)) != table_fingerprint(rows)
    parts = datasets.concatenate_datasets([again(same[:1]), again(same[1:])])  # chunks do not matter
    assert table_fingerprint(parts) == table_fingerprint(rows)


def test_hash_of_classes_changes_with_their_order():
    assert classes_hash(["a", "b"]) == classes_hash(["a", "b"]) != classes_hash(["b", "a"])
    assert classes_hash(["a,b"]) != classes_hash(["a", "b"])


def test_another_process_holds_out_the_same_images(tmp_path):
    root = image_folder(tmp_path / "data", {"cat": 20, "dog": 12})
    code = (
        "from vit_dist.data.source import load_source\n"
        "from vit_dist.data.split import stratified_split, table_fingerprint\n"
        "rows = load_source(options).tables['train']\n"
        "print(stratified_split(rows, 0.2, 7)[2], table_fingerprint(rows))"
    )
    process = run_python(code, data_options=options(root, tmp_path / "other_cache"), env={"PYTHONHASHSEED": "123"})
    output, errors = process.communicate(timeout=60)
    rows = load_source(options(root, tmp_path / "cache")).tables["train"]
    assert output.split() == [stratified_split(rows, 0.2, 7)[2], table_fingerprint(rows)], errors
