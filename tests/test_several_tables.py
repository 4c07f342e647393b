"""Tables in several files, and images of one table in several folders: parts are joined, two tables are not mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_fixtures import png
from test_table_files import table
from test_tables import load, refusal

from vit_dist.data.split import class_list, encode_labels

NAMES = [f"n{number}.png" for number in range(8)]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(png((number, len(folder.name), 9)))


def rows(names: list[str], header: str = "image,label", more: str = "") -> str:
    lines = [f"{name},{('cat', 'dog')[number % 2]}{more}" for number, name in enumerate(names)]
    return "\n".join([header, *lines]) + "\n"


def paths(root: Path, role: str = "train", **options: str) -> list[str]:
    source = load(root, **options)
    return [Path(image["path"]).relative_to(root).as_posix() for image in source.tables[role]["image"]]


# Several tables


def test_table_beside_one_with_folds_of_the_same_images_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "d" / "train.csv", NAMES)
    write(tmp_path / "d" / "train_folds.csv", rows(NAMES, "image,label,fold", ",1"))
    said = refusal(tmp_path / "d")
    assert "train_folds.csv has a column fold, train.csv has not: pass one of them with --data" in said


def test_tables_that_name_the_same_images_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "d" / "labels_v1.csv", NAMES)
    write(tmp_path / "d" / "labels_final.csv", rows(NAMES[:3]))
    said = refusal(tmp_path / "d")
    assert "3 images are named in several tables" in said and "labels_final.csv and labels_v1.csv" in said


def test_tables_of_different_images_are_joined_and_named(tmp_path: Path) -> None:
    table(tmp_path / "d" / "cats.csv", NAMES[:4])
    table(tmp_path / "d" / "dogs.csv", NAMES[4:])
    source = load(tmp_path / "d")
    assert len(source.tables["train"]) == 8
    assert "read as one table: cats.csv, dogs.csv" in source.description


def test_shards_may_differ_in_columns_of_other_things(tmp_path: Path) -> None:
    table(tmp_path / "d" / "part-0.csv", NAMES[:4])
    write(tmp_path / "d" / "part-1.csv", rows(NAMES[4:], "image,label,source", ",web"))
    images(tmp_path / "d", NAMES[4:])
    source = load(tmp_path / "d")
    assert len(source.tables["train"]) == 8 and "read as one table" not in source.description


# Several folders


def test_images_in_two_folders_beside_their_table_are_found_in_both(tmp_path: Path) -> None:
    """As in HAM10000: images_part_1, images_part_2 and one table of names without suffixes."""
    root = tmp_path / "d"
    write(root / "metadata.csv", rows([Path(name).stem for name in NAMES], "image_id,dx"))
    images(root / "images_part_1", NAMES[:5])
    images(root / "images_part_2", NAMES[5:])
    expected = [f"images_part_1/{name}" for name in NAMES[:5]] + [f"images_part_2/{name}" for name in NAMES[5:]]
    assert paths(root) == expected
    assert f"image files in {root}/images_part_1 and {root}/images_part_2" in load(root).description


def test_name_in_two_folders_that_the_checked_rows_miss_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "d"
    names = [f"n{number}.png" for number in range(1000)]
    write(root / "labels.csv", rows(names))
    images(root / "part_a", names[:500])
    images(root / "part_b", [*names[500:], names[105]])  # of 1,000 rows, 100 at the start and every tenth are checked
    assert "part_a/n105.png and " in refusal(root) and "have the same name" in refusal(root)


def test_tables_of_two_splits_find_equal_names_in_the_folder_of_their_split(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for split in ("train", "test"):
        write(root / f"{split}.csv", rows(NAMES[:4]))
        images(root / split, NAMES[:4])
    assert paths(root) == [f"train/{name}" for name in NAMES[:4]]
    assert paths(root, "test") == [f"test/{name}" for name in NAMES[:4]]


def test_file_with_different_labels_in_two_splits_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "d"
    table(root / "train.csv", NAMES[:4])
    write(root / "test.csv", f"image,label\n{NAMES[0]},dog\n{NAMES[1]},dog\n")
    said = refusal(root)
    assert f"{NAMES[0]} has the label cat in train and dog in test (images with two labels: 1)" in said


# Columns


def test_column_of_file_names_counts_before_a_number_that_may_be_a_name(tmp_path: Path) -> None:
    root = tmp_path / "d"
    images(root, ["1.png", "2.png", "3.png", "4.png"])
    write(root / "labels.csv", "id,slika,label\n1,4.png,cat\n2,3.png,dog\n3,2.png,cat\n4,1.png,dog\n")
    assert paths(root) == ["4.png", "3.png", "2.png", "1.png"]


def test_column_of_mask_files_is_not_the_column_of_images(tmp_path: Path) -> None:
    root = tmp_path / "d"
    images(root, ["a.png", "b.png", "a_m.png", "b_m.png"])
    write(root / "labels.csv", "image_id,mask_file,label\na,a_m.png,cat\nb,b_m.png,dog\n")
    assert paths(root) == ["a.png", "b.png"]


# Labels


@pytest.mark.parametrize("labels", [("16 0", "5", "7 1 2"), ("scab", "rust", "scab rust"), ("1,5", "2,0", "1,5")])
def test_labels_of_several_classes_or_fractions_are_refused(tmp_path: Path, labels: tuple[str, ...]) -> None:
    root = tmp_path / "d"
    images(root, NAMES[:3])
    lines = [f'{name},"{label}"' for name, label in zip(NAMES, labels, strict=False)]
    write(root / "labels.csv", "\n".join(["image,label", *lines]) + "\n")
    assert "holds several classes per image" in refusal(root)


def test_names_of_classes_with_spaces_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "d"
    images(root, NAMES[:3])
    lines = [f"{name},{label}" for name, label in zip(NAMES, ("bear", "black bear", "10 euro"), strict=False)]
    write(root / "labels.csv", "\n".join(["image,label", *lines]) + "\n")
    assert load(root).tables["train"]["label"] == ["bear", "black bear", "10 euro"]


@pytest.mark.parametrize(("no", "yes"), [(" 0", " 1"), ("0.0", "1.0"), ("0", "1")])
def test_one_hot_columns_of_text_or_numbers_are_refused(tmp_path: Path, no: str, yes: str) -> None:
    root = tmp_path / "d"
    images(root, NAMES[:3])
    write(root / "_classes.csv", f"filename,cat,dog\n{NAMES[0]},{yes},{no}\n{NAMES[1]},{no},{yes}\n")
    assert f"columns cat, dog hold {no.strip()} and {yes.strip()} (one-hot)" in refusal(root)


def test_note_on_an_old_encoding_shows_a_word_of_it(tmp_path: Path) -> None:
    root = tmp_path / "d"
    images(root, NAMES[:2])
    (root / "labels.csv").write_bytes(f"image,label\n{NAMES[0]},Čáp\n{NAMES[1]},pes\n".encode("cp1250"))
    assert "encoding cp1252 (reads Èáp; save the table as UTF-8 if that is garbled)" in load(root).description


@pytest.mark.parametrize(
    ("names", "encoding"),
    [(("été", "noël"), "mac_roman"), (("żółw", "łoś"), "cp1250"),
     (("犬", "猫"), "shift_jis"), (("Bär", "Kätzchen"), "cp437")],
)  # fmt: skip
def test_text_in_another_encoding_than_cp1252_is_refused(tmp_path: Path, names: tuple[str, str], encoding: str) -> None:
    root = tmp_path / "d"
    images(root, NAMES[:2])
    (root / "labels.csv").write_bytes(f"image,label\n{NAMES[0]},{names[0]}\n{NAMES[1]},{names[1]}\n".encode(encoding))
    assert "so it is in another encoding: save it as CSV UTF-8" in refusal(root / "labels.csv")


def test_western_text_in_cp1252_is_read(tmp_path: Path) -> None:
    root = tmp_path / "d"
    names = (
        "l\u2019\u00e9t\u00e9",
        "na\u00efve \u201cno\u00ebl\u201d",
        "Bewick\u2019s",
        "c\u0153ur",
        "\u20ac 5",
        "25 m\u00b2",
    )
    images(root, NAMES[:6])
    lines = "\n".join(f"{name};{label}" for name, label in zip(NAMES, names, strict=False))
    (root / "labels.csv").write_bytes(f"image;label\n{lines}\n".encode("cp1252"))
    assert load(root).tables["train"]["label"] == list(names)


def test_message_about_a_table_with_a_long_path_stays_short(tmp_path: Path) -> None:
    root = tmp_path
    while len(str(root)) < 390:
        root = root / ("long" * min(10, max(1, (390 - len(str(root))) // 4)))
    write(root / "labels.csv", rows(NAMES))
    said = refusal(root / "labels.csv")
    assert "none of the 8 files is there" in said and len(said) < 500


def test_refusal_of_images_in_no_class_folder_names_the_columns_of_the_table_beside_them(tmp_path: Path) -> None:
    root = tmp_path / "d"
    images(root / "Bilder", NAMES)
    write(root / "tabelle.csv", rows([f"Bilder\\{name}" for name in NAMES], "Kuvatiedosto,Luokka"))
    said = refusal(root)
    assert "tabelle.csv may label them, but " in said and "tabelle.csv: no column looks like it holds labels" in said
    assert "name one with --label_column_name. Columns: Luokka (string)" in said
    assert paths(root, label_column_name="Luokka") == [f"Bilder/{name}" for name in NAMES]


def test_refusal_of_a_table_without_known_columns_names_both_flags(tmp_path: Path) -> None:
    images(tmp_path, [f"{number}.png" for number in range(8)])
    write(tmp_path / "t.csv", rows([str(number) for number in range(8)], "Kuva,Luokka"))
    assert "name one with --image_column_name, and the one with labels with --label_column_name" in refusal(
        tmp_path / "t.csv"
    )


@pytest.mark.parametrize("header", ["Dateiname;Klasse", "fichier;catégorie", "Nombre_archivo;clase", "Arquivo;Rótulo"])
def test_header_in_another_language_is_read_as_a_guess(tmp_path: Path, header: str) -> None:
    root = tmp_path / "d"
    images(root, NAMES)
    write(root / "tabelle.csv", rows(NAMES, header.replace(";", ",")).replace(",", ";"))
    source = load(root)
    assert f"{header.split(';')[1]} is a guess: --label_column_name" in source.description
    assert set(source.tables["train"]["label"]) == {"cat", "dog"}


def test_refusal_of_images_in_no_class_folder_says_why_the_table_beside_them_is_not_read(tmp_path: Path) -> None:
    root = tmp_path / "d"
    images(root / "photos", NAMES)
    (root / "labels.csv").write_bytes("\n".join(["image,label", *(f"{n},кошка" for n in NAMES)]).encode("cp1251"))
    assert "labels.csv may label them, but" in refusal(root) and "save it as CSV UTF-8" in refusal(root)


KINDS = ("healthy", "rust", "scab")


def one_hot(header: str = ",".join(KINDS), more: str = "") -> str:
    """A row for each of NAMES: 0 and 1 in the columns of KINDS, and `more` in each."""
    lines = [
        f"{Path(name).stem},{','.join(str(int(kind == row % 3)) for kind in range(3))}{more}"
        for row, name in enumerate(NAMES)
    ]
    return "\n".join([f"image_id,{header}", *lines]) + "\n"


def test_one_hot_table_beside_images_is_refused_and_no_flag_is_advised(tmp_path: Path) -> None:
    images(tmp_path, NAMES)
    write(tmp_path / "train.csv", one_hot())
    said = refusal(tmp_path)
    assert "columns healthy, rust, scab hold 0 and 1 (one-hot): write one column label" in said
    assert "_column_name" not in said


@pytest.mark.parametrize("label", KINDS)
def test_one_column_of_a_one_hot_table_as_labels_is_refused(tmp_path: Path, label: str) -> None:
    images(tmp_path, NAMES)
    write(tmp_path / "train.csv", one_hot(f"{','.join(KINDS)},male", ",1").replace(",1\n", ",0\n", 3))
    said = refusal(tmp_path, image_column_name="image_id", label_column_name=label)
    others = ", ".join(kind for kind in KINDS if kind != label)
    assert f"column {label} is part of a one-hot encoding with {others}: its classes would be 0 and 1" in said


@pytest.mark.parametrize(("no", "yes"), [("0", "1"), ("-1", "1"), ("False", "True"), ("no", "yes"), ("0.0", "1.0")])
def test_one_attribute_of_several_is_used_if_named_and_the_others_are_said_to_be_unused(
    tmp_path: Path, no: str, yes: str
) -> None:
    images(tmp_path, NAMES)
    values = [(yes if row % 2 else no, yes if row % 3 else no, yes if row > 4 else no) for row in range(len(NAMES))]
    lines = [f"{name},{','.join(flags)}" for name, flags in zip(NAMES, values, strict=True)]
    write(tmp_path / "t.csv", "\n".join(["image,Smiling,Young,Male", *lines]) + "\n")
    held = " and ".join(sorted([no, yes]))
    said = refusal(tmp_path / "t.csv")
    assert f"columns Smiling, Young, Male hold {held} (several classes per image, of which one is supported)" in said
    assert said.endswith("write one column label, or take one with --label_column_name Smiling")
    source = load(tmp_path / "t.csv", label_column_name="Smiling")
    assert f"not used: Young, Male ({held}, as in Smiling)" in source.description
    train = source.tables["train"]
    assert len(class_list(train, source.names)) == len(set(train["label"])) == 2
    encode_labels(train, class_list(train, source.names), "train")


def test_one_hot_columns_beside_the_labels_are_named_unless_they_say_the_same(tmp_path: Path) -> None:
    images(tmp_path, NAMES)
    for label, is_told in (("kind", False), ("species", True)):
        values = [KINDS[row % 3] if label == "kind" else ("apple", "pear")[row % 2] for row in range(len(NAMES))]
        lines = [f"{line},{value}" for line, value in zip(one_hot().splitlines()[1:], values, strict=True)]
        write(tmp_path / "t.csv", "\n".join([f"image_id,{','.join(KINDS)},{label}", *lines]) + "\n")
        description = load(tmp_path / "t.csv", label_column_name=label).description
        assert ("not used: healthy, rust, scab (0 and 1, one-hot)" in description) == is_told


def test_table_without_a_name_of_labels_beside_images_is_refused_with_its_columns(tmp_path: Path) -> None:
    images(tmp_path, NAMES)
    write(tmp_path / "t.csv", "\n".join(["image,Smiling", *(f"{name},{row % 2}" for row, name in enumerate(NAMES))]))
    assert "looks like labels (image, Smiling): name one with --label_column_name" in refusal(tmp_path)
    assert len(set(load(tmp_path, label_column_name="Smiling").tables["train"]["label"])) == 2


def kaggle(root: Path, table: str, label: str = "label", test: str = "test", stems: bool = True) -> Path:
    """Class folders to train on, images without classes to test on, and a table that names the latter."""
    for kind in ("cat", "dog"):
        images(root / "train" / kind, [f"{kind}.{row}.png" for row in range(6)])
    images(root / test, [f"{row}.png" for row in range(4)])
    rows = [f"{row}{'' if stems else '.png'},{('cat', 'dog')[row % 2]}" for row in range(4)]
    write(root / table, "\n".join([f"id,{label}", *rows]) + "\n")
    return root


@pytest.mark.parametrize(
    "table",
    ["sample_submission.csv", "sampleSubmission.csv", "predictions.csv", "submission_v2.csv", "test_results.csv"],
)
@pytest.mark.parametrize("test", ["test", "test1"])
def test_submission_beside_class_folders_gives_no_labels(tmp_path: Path, table: str, test: str) -> None:
    root = kaggle(tmp_path / "d", table, test=test)
    said = refusal(root)
    assert "4 images lie directly in it" in said and "--test_split none" in said
    assert f"{table} is not read for labels, by its name" in said
    source = load(root, test_split="none")
    assert len(source.tables["train"]) == 12 and f"not used: {table}" in source.description


@pytest.mark.parametrize("table", ["labels.csv", "test_labels.csv", "test.csv"])
def test_table_of_images_outside_the_class_folders_is_refused_with_flags_that_work(tmp_path: Path, table: str) -> None:
    root = kaggle(tmp_path / "d", table)
    assert "--class_folders top --test_split none" in refusal(root)
    assert len(load(root, class_folders="top", test_split="none").tables["train"]) == 12


def test_list_of_test_images_without_labels_needs_no_second_flag(tmp_path: Path) -> None:
    root = kaggle(tmp_path / "d", "test.csv", label="width")
    assert "--test_split none" in refusal(root)
    assert len(load(root, test_split="none").tables["train"]) == 12


def test_names_that_lie_in_several_class_folders_are_no_reason_for_an_image_root(tmp_path: Path) -> None:
    root = kaggle(tmp_path / "d", "x.csv")
    (root / "x.csv").unlink()
    rows = [f"{kind}.{row}.png,{kind}" for kind in ("cat", "dog") for row in range(6)]
    write(root / "train.csv", "\n".join(["file,label", *rows]))
    said = refusal(root)
    assert "they lie in several folders" in said and "--image_root" not in said


def test_table_for_training_reads_the_training_folder_of_two_that_have_its_names(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 4)):
        images(tmp_path / split, [f"{row}.png" for row in range(count)])
    write(tmp_path / "train.csv", "\n".join(["id,breed", *(f"{row},{'ab'[row % 2]}" for row in range(6))]))
    source = load(tmp_path)
    assert len(source.tables["train"]) == 6 and f"image files in {tmp_path / 'train'}" in source.description


def test_table_of_unlabelled_images_beside_the_labelled_ones_is_named_as_not_used(tmp_path: Path) -> None:
    images(tmp_path / "images", NAMES)
    write(tmp_path / "train.csv", rows([Path(name).stem for name in NAMES[:5]], "image_id,label"))
    write(tmp_path / "test.csv", "\n".join(["image_id", *(Path(name).stem for name in NAMES[5:])]) + "\n")
    source = load(tmp_path)
    assert "not used: test.csv" in source.description and "3 of 8 images in the folder are in no row" in (
        source.description
    )


@pytest.mark.parametrize("agree", [True, False])
def test_guessed_label_column_beside_class_folders_of_other_classes_is_refused(tmp_path: Path, agree: bool) -> None:
    rows = []
    for number, kind in enumerate(("cat", "dog")):
        images(tmp_path / "d" / kind, [f"{row}.png" for row in range(4)])
        rows += [f"{kind}/{row}.png,{('Katze', 'Hund')[number if agree else row % 2]}" for row in range(4)]
    write(tmp_path / "d" / "t.csv", "\n".join(["Dateiname,Klasse", *rows]) + "\n")
    if agree:
        assert set(load(tmp_path / "d").tables["train"]["label"]) == {"Katze", "Hund"}
        return
    said = refusal(tmp_path / "d")
    assert "column Klasse of t.csv, or the folders (cat, dog): pass --label_column_name Klasse" in said
    assert set(load(tmp_path / "d", label_column_name="Klasse").tables["train"]["label"]) == {"Katze", "Hund"}
    assert set(load(tmp_path / "d", class_folders="top").tables["train"]["label"]) == {"cat", "dog"}


def test_guessed_label_column_of_images_in_folders_of_patients_is_read(tmp_path: Path) -> None:
    rows = []
    for patient in ("1001", "1002", "1003"):
        images(tmp_path / "d" / patient, [f"{row}.png" for row in range(4)])
        rows += [f"{patient}/{row}.png,{('benign', 'malignant')[row % 2]}" for row in range(4)]
    write(tmp_path / "d" / "t.csv", "\n".join(["file,diagnosis", *rows]) + "\n")
    assert set(load(tmp_path / "d").tables["train"]["label"]) == {"benign", "malignant"}


def test_masks_beside_the_images_of_a_table_are_no_class_folders(tmp_path: Path) -> None:
    images(tmp_path / "d" / "images", NAMES)
    for kind in ("lung", "heart"):
        images(tmp_path / "d" / "masks" / kind, NAMES)
    rows = [f"images/{name},{'ab'[row % 2]}" for row, name in enumerate(NAMES)]
    write(tmp_path / "d" / "t.csv", "\n".join(["image,label", *rows]) + "\n")
    assert len(load(tmp_path / "d").tables["train"]) == len(NAMES)


@pytest.mark.parametrize("name", ["results.csv", "my_labels.csv"])
def test_table_that_gives_the_classes_of_the_folders_to_other_images_is_refused(tmp_path: Path, name: str) -> None:
    rows = []
    for kind in ("cat", "dog"):
        images(tmp_path / "d" / "train" / kind, [f"{kind}{row}.png" for row in range(4)])
        rows += [f"train/{kind}/{kind}{row}.png,{('cat', 'dog')[row % 2]}" for row in range(4)]
    write(tmp_path / "d" / name, "\n".join(["id,label", *rows]) + "\n")
    assert "--class_folders top" in refusal(tmp_path / "d")
    found = load(tmp_path / "d", class_folders="top").tables["train"]
    assert [row["label"] for row in found] == [Path(row["id"]).parent.name for row in found]


def test_table_of_samples_beside_splits_advises_no_flag_that_makes_splits_classes(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        images(tmp_path / "d" / "train" / kind, [f"{kind}{row}.png" for row in range(4)])
    images(tmp_path / "d" / "samples", ["0.png", "1.png"])
    write(tmp_path / "d" / "labels.csv", "image,label\nsamples/0.png,cat\nsamples/1.png,dog\n")
    said = refusal(tmp_path / "d")
    assert "and none in train/cat, train/dog" in said and "--class_folders" not in said


def test_label_column_of_0_and_1_names_the_other_such_columns(tmp_path: Path) -> None:
    images(tmp_path, NAMES)
    lines = [f"{name},{row % 2},{int(row % 3 == 0)},{int(row > 1)}" for row, name in enumerate(NAMES)]
    write(tmp_path / "t.csv", "\n".join(["image,label,rust,is_train", *lines]) + "\n")
    assert "not used: rust (0 and 1, as in label)" in load(tmp_path / "t.csv").description


@pytest.mark.parametrize("loose", [True, False])
def test_table_without_a_split_column_for_images_of_two_splits_is_refused(tmp_path: Path, loose: bool) -> None:
    rows = []
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            folder = split if loose else f"{split}/{kind}"
            names = [f"{split}_{kind}{row}.png" for row in range(3)]
            images(tmp_path / "d" / folder, names)
            rows += [f"{folder}/{name},{kind}" for name in names]
    write(tmp_path / "d" / "meta.csv", "\n".join(["path,label", *rows]) + "\n")
    for data in (tmp_path / "d", tmp_path / "d" / "meta.csv"):
        assert "name images in test and train, and no column says which split" in refusal(data)
    assert len(load(tmp_path / "d" / "meta.csv", split_column_name="none").tables["train"]) == 12
    if not loose:
        found = load(tmp_path / "d", class_folders="top").tables
        assert {role: len(table) for role, table in found.items()} == {"train": 6, "test": 6}
