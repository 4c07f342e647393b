"""Folders as users have them: tables beside class folders, system folders, odd files, names in two normal forms."""

from __future__ import annotations

import json
import os
import re
import struct
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_fixtures import encoded, image_folder, noise, options, png, run_python, settle
from PIL import Image

from vit_dist.data.decode import BadImage, DecodeRules, decode, encoded_bytes
from vit_dist.data.describe import class_lines, sample_sizes, size_line
from vit_dist.data.duplicates import find_duplicates
from vit_dist.data.index import folder_index
from vit_dist.data.pipeline import ImageData, build_data
from vit_dist.data.source import load_source
from vit_dist.data.verify import BadRow, Seen, apply_policy, judge_levels, verify
from vit_dist.errors import UserError
from vit_dist.listing import counted, listed, shortened
from vit_dist.options import ModelOptions

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.fixture
def load(tmp_path):
    return lambda data, **values: load_source(options(data, tmp_path / "cache", **values))


@pytest.fixture
def build(tmp_path):
    def built(data: Path, **values: Any) -> ImageData:
        quiet = lambda what: lambda done, total: None  # noqa: E731
        most = values.pop("most_verified", None)
        return build_data(options(data, tmp_path / "cache", **values), ModelOptions(model="tiny"), 0, quiet, most)

    return built


def refusal(act, *args, **values) -> str:
    with pytest.raises(UserError) as caught:
        act(*args, **values)
    assert len(str(caught.value)) < 500
    return str(caught.value)


# Ordinary folders stay as they were


def test_the_fingerprint_of_an_ordinary_folder_never_changes(build, tmp_path):
    folders = {"train/ant": 5, "train/bee": 4, "val/ant": 2, "val/bee": 1, "test/ant": 2, "test/bee": 2}
    record = build(image_folder(tmp_path / "ordinary", folders)).record
    assert record["fingerprint"] == FINGERPRINTS["splits"], record
    record = build(image_folder(tmp_path / "flat", {"ant": 9, "bee": 7, "cat/deep": 1, "cat": 6})).record
    assert (record["fingerprint"], record["validation_indices"]) == FINGERPRINTS["held out"], record


# Made by the version before layouts were read.
FINGERPRINTS = {
    "splits": "f3b4a1f59e8051e00c92bff14847be74038252d802fc8ee437ac3b2e170dafd6",
    "held out": (
        "5959d67c2033d3a3ef8fa75d50f5da45645cf2156260ddf9bc169b3e6db058ab",
        "c2d68d107e7b6c3bf218b7dd6637eac5cb21a44834fc82c4978c80d91203c6f9",
    ),
}


# Tables beside class folders


def test_a_table_that_covers_part_of_the_class_folders_is_refused_until_one_is_chosen(load, tmp_path):
    root = image_folder(tmp_path / "data", {"a": 6, "b": 6, "c": 6})
    (root / "review.csv").write_text("filename,label\na/0.png,a\na/1.png,b\nb/0.png,b\nb/1.png,a\n")
    message = refusal(load, root)
    assert "review.csv labels 4 of 18 images" in message and "--class_folders top" in message
    assert f"--data {root / 'review.csv'}" in message
    source = load(root, class_folders="top")
    assert len(source.tables["train"]) == 18 and "review.csv" in source.description
    assert len(load(root / "review.csv").tables["train"]) == 4


def test_a_table_that_covers_all_images_wins_over_their_folders(load, tmp_path):
    root = image_folder(tmp_path / "data", {"batch_a": 2, "batch_b": 2})
    rows = "".join(f"batch_{folder}/{k}.png,{label}\n" for folder in "ab" for k, label in enumerate("xy"))
    (root / "labels.csv").write_text("filename,label\n" + rows)
    assert set(load(root).tables["train"]["label"]) == {"x", "y"}


def test_a_table_without_labels_is_named_and_not_used(load, tmp_path):
    root = image_folder(tmp_path / "data", {"a": 2, "b": 2})
    (root / "metadata.csv").write_text("file_name,width\na/0.png,32\n")
    source = load(root)
    assert len(source.tables["train"]) == 4 and "not used: metadata.csv" in source.description


def test_images_without_class_folders_beside_a_table_are_refused_naming_the_table(load, tmp_path):
    root = image_folder(tmp_path / "data", {"train_images": 4, "test_images": 2})
    (root / "train.csv").write_text("key,answer\n0.png,a\n")
    message = refusal(load, root)
    assert "train_images" in message and "train.csv" in message


def test_a_folder_without_images_that_are_read_names_what_it_holds(load, tmp_path):
    (tmp_path / "raw" / "a").mkdir(parents=True)
    (tmp_path / "raw" / "a" / "1.cr2").touch()
    assert "no images" in refusal(load, tmp_path / "raw") and "1 .cr2" in refusal(load, tmp_path / "raw")


def test_images_that_no_row_of_the_table_names_are_counted(load, tmp_path):
    root = image_folder(tmp_path / "data", {"images": 4})
    (root / "labels.csv").write_text("filename,label\nimages/0.png,a\nimages/1.png,b\n")
    assert "2 of 4 images in the folder are in no row" in load(root).description


def test_a_tar_of_class_folders_is_refused_with_the_way_out(load, tmp_path):
    image_folder(tmp_path / "t", {"cat": 2, "dog": 2})
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "train-0.tar", "w") as shard:
        shard.add(tmp_path / "t", arcname=".")
    for data in (tmp_path / "s", tmp_path / "s" / "train-0.tar"):
        message = refusal(load, data)
        assert ".cls" in message and "unpack" in message


# Folders and files of the system


def test_folders_of_the_system_are_left_out_and_named(load, tmp_path):
    system = [
        "@eaDir/cat",
        "$RECYCLE.BIN/S-1",
        "System Volume Information",
        "lost+found",
        ".Trash-1000",
        "__MACOSX/cat",
    ]
    root = image_folder(tmp_path / "data", dict.fromkeys(["cat", "dog", "cat/.ipynb_checkpoints", *system], 2))
    source = load(root)
    assert set(source.tables["train"]["label"]) == {"cat", "dog"} and len(source.tables["train"]) == 4
    assert all(name in source.description for name in ("@eaDir", "$RECYCLE.BIN", "lost+found"))


def test_a_folder_that_two_paths_lead_to_is_read_once(load, tmp_path):
    root = image_folder(tmp_path / "data", {"a": 2, "b": 2})
    (root / "a" / "other").symlink_to(root / "b")
    (root / "b" / "other").symlink_to(root / "a")
    (root / "above").symlink_to(tmp_path)
    source = load(root)
    assert list(source.tables["train"]["id"]) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert "links left out" in source.description and "a/other" in source.description


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_link_to_proc_is_not_followed(tmp_path):
    root = image_folder(tmp_path / "data", {"a": 1, "b": 1})
    (root / "a" / "system").symlink_to("/proc")
    index = folder_index(root, tmp_path)
    assert len(index.images) == 2 and index.links == ["a/system"]


def test_what_is_no_file_is_reported_and_not_read(load, tmp_path):
    root = image_folder(tmp_path / "data", {"a": 2, "b": 2})
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "table.csv")
    for name, target in (("fifo", root / "pipe"), ("zero", "/dev/zero"), ("self", "self.png"), ("folder", root / "b")):
        (root / "a" / f"{name}.png").symlink_to(target)
    table = load(root).tables["train"]
    bad = verify(table, DecodeRules(), cache_dir=str(tmp_path / "cache")).bad
    assert {row.id: row.reason.split(":")[0].split(",")[0] for row in bad} == {
        "a/fifo.png": "a pipe",
        "a/self.png": "Too many levels of symbolic links",
        "a/zero.png": "a pipe",
    }


def test_a_file_of_more_than_two_gibibytes_is_refused_unread(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(2**31 + 1)
    with pytest.raises(BadImage, match="2,147,483,649 bytes"):
        encoded_bytes(tmp_path / "huge.png")


def test_a_locale_that_is_not_utf8_is_named_instead_of_the_file(tmp_path):
    root = image_folder(tmp_path / "data", {"café": 1, "b": 1})
    code = (
        "from pathlib import Path; from vit_dist.data.index import folder_index\n"
        "from vit_dist.errors import UserError\n"
        "try: folder_index(Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "except UserError as error: print(error)"
    )
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    output, errors = run_python(code, root, tmp_path, data_options=options("x", tmp_path), env=env).communicate()
    assert "PYTHONUTF8=1" in output and "rename" not in output, output + errors


# Damaged caches


def test_a_flipped_bit_in_a_cached_index_is_noticed(tmp_path):
    root = image_folder(tmp_path / "data", {"a": 3, "b": 3})
    settle(root)
    expected = folder_index(root, tmp_path).images.to_pylist()
    (path,) = tmp_path.glob("index-*.sealed")
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        assert folder_index(root, tmp_path).images.to_pylist() == expected and path.read_bytes() != bytes(damaged)
    path.write_bytes(b"")
    assert folder_index(root, tmp_path).images.to_pylist() == expected


def test_a_flipped_bit_in_a_remembered_verification_is_noticed(build, load, tmp_path):
    root = image_folder(tmp_path / "data", {"a": 3, "b": 3})
    (root / "a" / "0.png").write_bytes(b"broken")
    table = load(root).tables["train"]
    expected = verify(table, DecodeRules(), cache_dir=str(tmp_path))
    (path,) = (tmp_path / "vit_dist").glob("verified-*.sealed")
    whole = path.read_bytes()
    for place in range(0, len(whole), 29):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        again = verify(table, DecodeRules(), cache_dir=str(tmp_path))
        assert again.bad == expected.bad and (again.digests == expected.digests).all() and again.seen == expected.seen


# Names of classes


def test_one_class_in_two_normal_forms_is_one_class_across_splits(build, tmp_path):
    root = image_folder(tmp_path / "data", {"train/b": 2, f"train/{NFD}": 2, "val/b": 2, f"val/{NFC}": 2})
    data = build(root)
    assert data.classes == ["b", NFC]
    assert f"train/{NFD}/0.png" in data.train.ids  # paths stay as they are on the disk
    assert list(data.validation.table["label"]) == [0, 0, 1, 1]


@pytest.mark.parametrize(("one", "two"), [("Tea", "tea"), (NFC, NFD), ("tea", "tea "), ("Straße", "STRASSE")])
def test_classes_whose_names_look_alike_are_refused(build, tmp_path, one, two):
    message = refusal(build, image_folder(tmp_path / "data", {one: 2, two: 2, "other": 2}))
    assert "look alike" in message
    shown = (NFC, ascii(NFC), ascii(NFD)) if NFC in (one, two) else (f"'{one}'", f"'{two}'")
    assert all(name in message for name in shown)


def test_all_pairs_of_classes_whose_names_look_alike_are_counted(build, tmp_path):
    names = [f"{first}{number}" for first in ("cow ", "Cow ") for number in range(4)]
    message = refusal(build, image_folder(tmp_path / "data", dict.fromkeys(names, 2)))
    assert "'Cow 0' and 'cow 0'; 'Cow 1' and 'cow 1' (and 2 more pairs)" in message


def test_sizes_by_headers_and_by_decoding_are_those_of_upright_images(build, tmp_path):
    root = image_folder(tmp_path / "data", {"a": 0, "b": 0})
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by 90 degrees
    for number in range(20):
        noise(number, (40, 20)).save(root / "ab"[number % 2] / f"{number}.jpg", exif=exif)
    for verify_images in (True, False):
        sizes = [line for line in build(root, verify_images=verify_images).description if "image sizes" in line]
        assert len(sizes) == 1 and "all 20 x 40 pixels" in sizes[0]


def test_labels_of_a_table_that_look_alike_are_refused(build, tmp_path):
    root = image_folder(tmp_path / "data", {"images": 4})
    rows = [f"images/{k}.png,{label}" for k, label in enumerate(["Tea", "tea", "b", "b"])]
    (root / "labels.csv").write_text("filename,label\n" + "\n".join(rows) + "\n")
    assert "look alike" in refusal(build, root / "labels.csv")


def test_letters_are_classes_of_their_own(build, tmp_path):
    assert build(image_folder(tmp_path / "data", {"A": 3, "a": 3, "b": 3})).classes == ["A", "a", "b"]


# Causes


def test_missing_files_are_another_error_than_broken_ones(load, tmp_path):
    root = image_folder(tmp_path / "data", {"a": 3, "b": 3})
    (root / "a" / "0.png").unlink()
    (root / "a" / "0.png").symlink_to("nowhere.png")
    (root / "b" / "0.png").write_bytes(b"broken")
    table = load(root).tables["train"]
    bad = verify(table, DecodeRules(), cache_dir=str(tmp_path)).bad
    assert [row.missing for row in bad] == [True, False]
    message = refusal(apply_policy, table, bad, options(root, tmp_path), "train")
    assert "1 of 6 image files of train are not there" in message and "do not decode" not in message
    assert "--on_bad_image skip" in refusal(apply_policy, table, bad[1:], options(root, tmp_path), "train")


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, DecodeRules())
    return caught.value.reason


def test_git_lfs_pointers_are_named():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    assert "git lfs pull" in reason(pointer)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_more_than_four_bands_is_named(order):
    entry = lambda tag, kind, value: struct.pack(  # noqa: E731
        order + "HHI" + ("HH" if kind == 3 else "I"), tag, kind, 1, *((value, 0) if kind == 3 else (value,))
    )
    tags = [(256, 2), (257, 2), (258, 8), (259, 1), (262, 1), (273, 200), (277, 6), (278, 2), (279, 24)]
    directory = struct.pack(order + "H", len(tags)) + b"".join(entry(tag, 3, value) for tag, value in tags) + bytes(4)
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    data = (head + directory).ljust(200, b"\0") + bytes(24)
    assert "TIFF of 6 bands" in reason(data)


def gray16(path: Path, brightest: int, seed: int = 0) -> None:
    levels = np.random.default_rng(seed).integers(0, brightest + 1, (8, 8)).astype(np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)


def test_16_bit_images_that_would_be_black_are_refused(build, tmp_path):
    for number in range(8):
        gray16(tmp_path / "data" / "ab"[number % 2] / f"{number}.png", 4095, number)
    message = refusal(build, tmp_path / "data")
    assert "16-bit images of train use less than an eighth" in message and "multiply by 16" in message


def test_some_dark_16_bit_images_are_a_note(build, tmp_path):
    for number in range(8):
        gray16(tmp_path / "data" / "ab"[number % 2] / f"{number}.png", 4095 if number == 2 else 65535, number)
    data = build(tmp_path / "data")
    assert any("1 of " in line and "16-bit images of train" in line for line in data.description)
    assert judge_levels(Seen(images=9), "train") is None


def test_transparent_images_larger_than_a_strip_are_what_they_were(monkeypatch):
    from vit_dist.data import decode as module

    pixels = np.random.default_rng(0).integers(0, 256, (37, 23, 4)).astype(np.uint8)
    deep = np.random.default_rng(1).integers(0, 65536, (37, 23)).astype(np.uint16)
    files = [encoded(Image.fromarray(pixels)), encoded(Image.fromarray(deep))]
    whole = [np.asarray(decode(file, DecodeRules(background=(9, 200, 30)))) for file in files]
    monkeypatch.setattr(module, "_STRIP_PIXELS", 100)
    strips = [np.asarray(decode(file, DecodeRules(background=(9, 200, 30)))) for file in files]
    assert all((one == two).all() for one, two in zip(whole, strips, strict=True))
    behind = Image.new("RGBA", (23, 37), (9, 200, 30, 255))
    assert (whole[0] == np.asarray(Image.alpha_composite(behind, Image.fromarray(pixels)).convert("RGB"))).all()


# Duplicates


def duplicated(root: Path) -> Path:
    image_folder(root, {"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2, "val/a": 1, "val/b": 1})
    same = encoded(noise(1))
    for path in ("train/a/x.png", "test/a/y.png", "test/a/z.png"):  # in two splits
        (root / path).write_bytes(same)
    for path in ("train/a/q.png", "train/b/q.png"):  # under two labels
        (root / path).write_bytes(encoded(noise(2)))
    for path in ("train/b/1c.png", "train/b/2c.png", "train/b/3c.png"):  # copies
        (root / path).write_bytes(encoded(noise(3)))
    return root


def test_equal_images_are_counted_and_shown(build, tmp_path):
    data = build(duplicated(tmp_path / "data"))
    assert data.duplicates == {
        "duplicates_across_splits": 2,
        "duplicates_across_labels": 2,
        "duplicates_within_splits": 3,
    }
    (line,) = [line for line in data.description if "byte for byte" in line]
    assert "train/a/x.png = test/a/z.png" in line and "train/a/q.png = train/b/q.png" in line and len(line) < 300
    assert build(tmp_path / "data").duplicates == data.duplicates  # remembered
    assert build(tmp_path / "data", verify_images=False).duplicates == {}


def test_advice_for_missing_files_names_the_fraction_that_every_split_needs(build, tmp_path):
    """A third of a table's files is gone; the flags of each message lead on, and the last one runs."""
    names = [f"{number}.png" for number in range(60)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(noise(number)))
    lines = [f"{name},{'ab'[number % 2]}" for number, name in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(["image,label", *lines]))
    for number in range(0, 60, 3):
        (tmp_path / names[number]).unlink()
    flags: dict[str, Any] = {}
    for _ in range(3):
        try:
            data = build(tmp_path / "t.csv", **flags)
        except UserError as error:
            found = re.search(r"(--on_bad_image skip )?--max_bad_fraction ([\d.]+)( to leave|:)", str(error))
            assert found, error
            flags = {"on_bad_image": "skip", "max_bad_fraction": float(found[2])}
        else:
            break
    assert sum(data.skipped.values()) == 20 and len(data.train) + len(data.validation) == 40


def test_images_in_two_splits_and_classes_without_images_are_warnings(build, tmp_path):
    assert "in validation or test and in another split too: 2" in build(duplicated(tmp_path / "d")).warnings[0]
    root = image_folder(tmp_path / "e", {"a": 20, "b": 20, "rare": 1})
    warnings = build(root).warnings
    assert warnings == ["no images in validation of rare: the validation accuracy does not cover them"]


def test_of_more_images_than_asked_for_a_sample_is_decoded(build, tmp_path):
    root = image_folder(tmp_path / "d", {"a": 20, "b": 20})
    assert "20 of 40 images decoded here; train decodes all" in build(root, most_verified=20).description
    assert not any("decoded here" in line for line in build(root, most_verified=40).description)
    for name in ("a", "b"):
        for path in (root / name).iterdir():
            path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(UserError, match="images of train do not decode"):
        build(root, most_verified=20)
    data = build(root, most_verified=20, on_bad_image="skip")
    assert len(data.train) == 34 and any("17 of 17 images of train do not decode" in line for line in data.description)


def test_a_data_set_without_duplicates_has_no_line_about_them(build, tmp_path):
    data = build(image_folder(tmp_path / "data", {"a": 5, "b": 5}))
    assert set(data.duplicates.values()) == {0} and not any("byte for byte" in line for line in data.description)


def test_equal_first_halves_of_digests_are_not_duplicates(load, tmp_path):
    table = load(image_folder(tmp_path / "data", {"a": 2, "b": 2})).tables["train"]
    import datasets

    encoded_table = datasets.Dataset.from_dict({"id": table["id"], "label": [0, 0, 1, 1]})
    digests = np.zeros((4, 16), np.uint8)
    digests[:, 15] = range(4)
    assert not find_duplicates({"train": encoded_table}, {"train": digests})
    digests[3] = digests[0]
    assert find_duplicates({"train": encoded_table}, {"train": digests}).across_labels == 2


# What is printed


def test_classes_and_sizes_are_shown(build, tmp_path):
    root = tmp_path / "data"
    for number in range(81):
        for k in range(number % 7 + 2):
            path = root / f"class{number:02}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png((number, k, 0), (4 + number, 90 - number)))
    for verified, of in ((True, "all 399"), (False, "399")):
        lines = build(root, verify_images=verified).description
        (classes,) = [line for line in lines if line.startswith("images by class")]
        assert "class00 2, class01 2" in classes and classes.endswith("and 71 more")
        assert any(line.startswith("smallest class: class00 2; largest: class06 7") for line in lines)
        (sizes,) = [line for line in lines if line.startswith("image sizes")]
        assert "4 to 84 x 10 to 90 pixels" in sizes and of in sizes
        assert max(map(len, lines[1:])) < 200


def test_many_classes_with_long_names_stay_readable():
    import datasets

    names = [f"{number:05}{'n' * 200}" for number in range(21843)]
    train = datasets.Dataset.from_dict({"label": list(range(21843))})
    assert max(map(len, class_lines(train, names))) < 200
    assert class_lines(train, names)[0].endswith("more")


def test_sizes_are_sampled_over_the_classes(load, tmp_path):
    import datasets

    image = [{"bytes": png((1, 2, 3), (4, 4)), "path": None}] * 3000
    image[-1] = {"bytes": png((1, 2, 3), (40, 30)), "path": None}
    table = datasets.Dataset.from_dict({"image": image, "label": [0] * 2990 + [1] * 10})
    seen = sample_sizes([table])
    assert seen.images == 1000 and (seen.widest, seen.highest) == (40, 30)
    assert "1,000 of 3,000 images" in size_line(seen, 3000)


def test_doctor_shows_classes_and_sizes(tmp_path):
    from types import SimpleNamespace

    from vit_dist.commands.checks import check_data

    data = options(image_folder(tmp_path / "data", {"cat": 13, "dog": 15}), tmp_path / "cache")
    config = SimpleNamespace(data=data, model=ModelOptions(model="tiny"), data_seed=0)
    found = check_data(SimpleNamespace(config=config))  # type: ignore[arg-type]
    text = "\n".join(found.lines)
    assert "images by class in train: cat" in text and "image sizes" in text


# Messages


def test_lists_show_ten_names_and_say_how_many_are_left():
    names = [f"n{number}" for number in range(5000)]
    assert listed(names) == "n0, n1, n2, n3, n4, n5, n6, n7, n8, n9 and 4,990 more"
    assert len(listed(["x" * 200] * 30)) < 300 and listed([]) == "" and listed(["a"]) == "a"
    assert len(shortened("y" * 500)) == 60 and shortened("short") == "short"
    assert counted({"txt": 2, "cr2": 12, "": 1}) == "12 .cr2, 2 .txt, 1 without a suffix"


def test_messages_about_ten_thousand_bad_images_are_short(load, tmp_path):
    table = load(image_folder(tmp_path / "data", {"a": 2, "b": 2})).tables["train"]
    long = "f" * 250
    for missing in (False, True):
        bad = [BadRow(k % 4, f"{long}/{k}.png", "r" * 300, missing) for k in range(10_000)]
        for values in ({}, {"on_bad_image": "skip"}):
            assert "more" in refusal(apply_policy, table, bad, options("x", tmp_path, **values), "train")


def test_messages_about_a_thousand_classes_are_short(build, tmp_path):
    long = "c" * 200
    root = tmp_path / "data"
    counts = {"train/one": 1, "train/two": 1, "test/one": 1}
    image_folder(root, counts | {f"test/{long}{number:04}": 1 for number in range(1000)})
    assert "991 more" in refusal(build, root) or "more" in refusal(build, root)
    assert json.dumps(listed([long] * 3))
