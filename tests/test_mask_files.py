"""Masks beside their images in class folders are left out, and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_fixtures import options, png

from vit_dist.data.index import make_index
from vit_dist.data.mask_files import without_masks
from vit_dist.data.source import load_source


def kept(*names: str) -> list[str]:
    return without_masks(make_index(sorted(names)))[0].images.to_pylist()


@pytest.mark.parametrize(
    "mask",
    ["x_mask.png", "x_mask_1.png", "x_mask.gif", "x-gt.png", "x_seg.png", "x_segmentation.png", "x_label.png",
     "x_annotation.png", "x_depth.png", "x_Mask.PNG"],
)  # fmt: skip
def test_image_with_the_ending_of_a_mask_beside_its_image_is_left_out(mask):
    assert kept("a/x.jpg", f"a/{mask}") == ["a/x.jpg"]


@pytest.mark.parametrize(
    "names",
    [
        ["a/x_mask.png"],
        ["a/x.png", "b/x_mask.png"],
        ["a/with_mask.png", "a/without_mask.png"],
        ["a/x.png", "a/unmask.png", "a/xmask.png"],
        ["a/x.png", "a/x_2.png", "a/x_flip.png"],
    ],
)
def test_image_without_an_image_of_the_rest_of_its_name_stays(names):
    assert kept(*names) == sorted(names)


def test_masks_in_class_folders_are_counted_with_an_example(tmp_path: Path):
    names = ["x (1).png", "x (1)_mask.png", "x (2).png", "x (2)_mask.png", "x (2)_mask_1.png"]
    for folder in ("benign", "malignant"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "data" / folder / name.replace("x", folder)).write_bytes(png())
    source = load_source(options(tmp_path / "data", tmp_path / "cache"))
    assert source.tables["train"]["id"][:] == [f"{c}/{c} ({k}).png" for c in ("benign", "malignant") for k in (1, 2)]
    assert "not used: 6 masks beside their images, for example benign/benign (1)_mask.png" in source.notes


def test_rows_keep_their_folders_where_masks_are_left_out():
    index, note = without_masks(make_index(["a/x.png", "a/x_mask.png", "b/y.png", "c/z.png", "c/z_gt.png"]))
    assert [index.folders[k] for k in index.folder_of] == ["a", "b", "c"] and note is not None
