"""Lists and tables beside class folders that are not read: refused if they name images of the folders."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_fixtures import image_folder, options

from vit_dist.data.source import load_source
from vit_dist.errors import UserError

IDS = [f"im{k}" for k in range(4)]
PATHS = [f"{'ab'[k % 2]}/{name}" for k, name in enumerate(IDS)]


def folders(root, names=IDS, below=""):
    """Classes a and b, with images of these names in turn."""
    made = image_folder(root, {f"{below}a": 1, f"{below}b": 1})
    for k, name in enumerate(names):
        folder = made / f"{below}{'ab'[k % 2]}"
        (folder / f"{name}.png").write_bytes((folder / "0.png").read_bytes())
    for folder in "ab":
        (made / f"{below}{folder}" / "0.png").unlink()
    return made


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_text(content)
    return path


def parquet(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


LISTS = {
    "labels.txt": "\n".join(f"{name}.png" for name in IDS),
    "list_train.txt": "\n".join(PATHS),
    "splits/train.txt": "\n".join(f"{path}.png" for path in PATHS),
    "meta/train.txt": "\n".join(PATHS),
    "ImageSets/Main/train.txt": "\n".join(f"{name}  1" for name in IDS),
    "meta/train.json": json.dumps({"a": PATHS[::2], "b": PATHS[1::2]}),
    "coco.json": json.dumps({"info": {}, "images": [{"id": k, "file_name": f"{n}.png"} for k, n in enumerate(IDS)]}),
    "x.jsonl": "\n".join(json.dumps({"pic": f"{name}.png", "kind": "x"}) for name in IDS),
    "key.csv": "key,answer\n" + "\n".join(f"{name}.png,x" for name in IDS),
    "windows.txt": "\n".join(f"C:\\data\\{path.replace('/', chr(92))}.png" for path in PATHS),
    "keys.parquet": parquet(pic=[f"{name}.png" for name in IDS], kind=list("xyxy")),
}


@pytest.mark.parametrize("file", LISTS)
def test_unread_list_that_names_images_is_refused_until_a_flag_chooses(file, tmp_path):
    root = folders(tmp_path / "data")
    put(root / file, LISTS[file])
    with pytest.raises(UserError) as caught:
        load_source(options(root, tmp_path / "cache"))
    message = str(caught.value)
    assert file in message and "--class_folders top" in message and len(message) < 500, message
    assert set(load_source(options(root, tmp_path / "cache", class_folders="top")).tables["train"]["label"]) == {
        "a",
        "b",
    }


def test_unread_list_names_images_with_spaces_two_folders_deep(tmp_path):
    root = folders(tmp_path / "data", [f"a photo ({k})" for k in range(4)], "archive/images/")
    put(root / "archive" / "labels.txt", "a photo (0).png\nb/a photo (1).png\n")
    with pytest.raises(UserError, match=r"archive/labels\.txt"):
        load_source(options(root, tmp_path / "cache"))


def test_unread_table_with_numbers_counts_only_under_the_header_of_an_image(tmp_path):
    root = folders(tmp_path / "data", list("1234"))
    put(root / "notes.parquet", parquet(patient=[1, 2, 3, 4], age=[31, 32, 33, 34]))
    assert len(load_source(options(root, tmp_path / "cache")).tables["train"]) == 4
    put(root / "notes.parquet", parquet(image_id=[1, 2, 3, 4], grade=[31, 32, 33, 34]))
    with pytest.raises(UserError, match=r"notes\.parquet"):
        load_source(options(root, tmp_path / "cache"))


HARMLESS = {
    "md5sums.txt": "\n".join(f"{k:032x}  {path}.png" for k, path in enumerate(PATHS)),
    "checksums_of_files.txt": "\n".join(f"{k:064x} *{path}.png" for k, path in enumerate(PATHS)),
    "README.txt": "im0.png and im1.png are the best images",
    "LICENSE.txt": "im0.png im1.png",
    "notes.txt": "im2.png is blurred,\nlook again",
    "classes.txt": "a\nb\n",
    "class_names.txt": "0 a\n1 b\n",
    "classes.csv": "id,label\n0,a\n1,b\n2,c\n3,d\n",
    "meta/classes.json": json.dumps({"0": "a", "1": "b"}),
    "numbers.txt": "1\n2\n3\n4\n",
    "labels/im0.txt": "0 0.5 0.5 1 1\nim1.png im2.png",
    "annotations/im0.json": json.dumps({"imagePath": "im0.png"}),
}


@pytest.mark.parametrize("file", HARMLESS)
@pytest.mark.parametrize("names", [IDS, list("1234")], ids=["im0", "numbers"])
def test_file_that_is_no_list_of_images_is_no_alarm(file, names, tmp_path):
    root = folders(tmp_path / "data", names)
    put(root / file, HARMLESS[file])
    assert set(load_source(options(root, tmp_path / "cache")).tables["train"]["label"]) == {"a", "b"}


def test_images_named_by_checksums_are_found_in_a_list(tmp_path):
    names = [f"{k:031x}f" for k in range(4)]
    root = folders(tmp_path / "data", names)
    put(root / "labels.txt", "\n".join(f"{name} {'xy'[k % 2]}" for k, name in enumerate(names)))
    with pytest.raises(UserError, match=r"labels\.txt"):
        load_source(options(root, tmp_path / "cache"))


def test_table_without_labels_is_printed_with_its_columns(tmp_path):
    root = folders(tmp_path / "data")
    put(root / "metadata.csv", "file_name,width\n" + "\n".join(f"{path}.png,32" for path in PATHS))
    notes = load_source(options(root, tmp_path / "cache")).notes
    assert "not used: metadata.csv with the columns file_name, width" in notes


@pytest.mark.parametrize("tables", [("train", "test"), ("split",)])
def test_tables_of_splits_without_labels_are_refused_beside_class_folders(tables, tmp_path):
    root = folders(tmp_path / "data")
    for name in tables:
        rows = [f"{path}.png,{'train' if k < 2 else 'test'}" for k, path in enumerate(PATHS)]
        put(root / f"{name}.csv", "path,split\n" + "\n".join(rows))
    with pytest.raises(UserError, match="assigns images to splits"):
        load_source(options(root, tmp_path / "cache"))


def test_images_without_class_folders_are_named_where_their_table_has_no_labels(tmp_path):
    root = image_folder(tmp_path / "data", {"jpg": 4})
    put(root / "sizes.csv", "file_name,width\n" + "\n".join(f"jpg/{k}.png,32" for k in range(4)))
    with pytest.raises(
        UserError, match=r"4 images lie directly in it.*sizes\.csv has no column that looks like labels"
    ):
        load_source(options(root, tmp_path / "cache"))


def test_predictions_beside_class_folders_are_refused_not_learned(tmp_path):
    root = folders(tmp_path / "data")
    put(root / "predictions.csv", "image,label\n" + "\n".join(f"{path}.png,c" for path in PATHS))
    with pytest.raises(UserError, match=r"predictions\.csv names images"):
        load_source(options(root, tmp_path / "cache"))
