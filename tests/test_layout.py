"""Folders that are splits, classes, or neither: one sensible reading is used, several are refused with the flags."""

from __future__ import annotations

from collections import Counter

import pytest

from vit_dist.data.layout import Layout, read_layout
from vit_dist.data.split_words import split_words
from vit_dist.errors import UserError
from vit_dist.options import DataOptions


def read(files: str, root: str = "D", **options: str) -> Layout:
    """The layout of a folder with these files, `*3` of some; `x/` is an empty folder."""
    images: Counter[str] = Counter()
    others: dict[str, dict[str, int]] = {}
    names: dict[str, set[str]] = {}
    directories: set[str] = set()
    for word in files.split():
        path, _, count = word.replace("%", " ").partition("*")
        folder, _, name = path.rpartition("/")
        parts = folder.split("/") if folder else []
        directories |= {"/".join(parts[: end + 1]) for end in range(len(parts))}
        suffix = name.rpartition(".")[2] if "." in name else ""
        number = int(count or 1)
        if suffix in ("jpg", "png"):
            images[folder] += number
            made = {name} if not count else {f"{k}.jpg" for k in range(number)}
            names.setdefault(folder, set()).update(made)
        elif name:
            counts = others.setdefault(folder, {})
            counts[suffix] = counts.get(suffix, 0) + number
    return read_layout(
        root,
        images,
        DataOptions(data=root, **options),
        directories=directories,
        others=others,
        file_names=lambda folder: names.get(folder, set()),
    )


def shape(layout: Layout) -> dict[str, str]:
    """Classes by role, as text."""
    return {role: " ".join(sorted(set(classes.values()))) for role, classes in layout.splits.items()}


def each(splits: str, classes: str = "a b") -> str:
    return " ".join(f"{split}/{name}/x.jpg*3" for split in splits.split() for name in classes.split())


AB = {"train": "a b"}
ABT = {"train": "a b", "test": "a b"}
ABV = {"train": "a b", "validation": "a b"}
ABVT = {"train": "a b", "validation": "a b", "test": "a b"}

READ: list[tuple[str, dict[str, str]]] = [
    # Splits in any common spelling
    (each("train validation test"), ABVT),
    (each("Train Val Test"), ABVT),
    (each("TRAIN TEST"), ABT),
    (each("training testing"), ABT),
    (each("training_set test_set"), ABT),
    (each("training_set validation_set test_set"), ABVT),
    (each("train_set val_set"), ABV),
    (each("trainset testset"), ABT),
    (each("train_data valid_data"), ABV),
    (each("train_images test_images"), ABT),
    (each("TrainImages TestImages"), ABT),
    (each("trainData testData"), ABT),
    (each("train2017 val2017"), ABV),
    (each("train-00 test-00"), ABT),
    (each("train test1"), ABT),
    (each("seg_train seg_test"), ABT),
    (each("seg_train seg_test seg_pred"), ABT),
    (each("imagenet_train imagenet_val"), ABV),
    (each("imagenet_train val"), ABV),
    (each("my-train my-dev"), ABV),
    (each("train valid"), ABV),
    (each("train dev"), ABV),
    (each("train eval"), ABV),
    (each("train holdout"), ABT),
    (each("train hold_out"), ABT),
    (each("train validation val"), ABV),
    (each("trainval test"), ABT),
    (each("train"), AB),
    (each("train val test extra"), ABVT),
    (each("train augmented"), AB),
    (each("entrainement test validation"), ABVT),
    (each("entraînement validation"), ABV),
    (each("entrenamiento validación prueba"), ABVT),
    (each("dados_de_treino dados_de_teste"), ABT),
    (each("Trainingsdaten Validierungsdaten Testdaten"), ABVT),
    (each("addestramento convalida"), ABV),
    (each("trening test"), ABT),
    (each("obuchenie test"), ABT),
    (each("训练集 测试集"), ABT),
    (each("tr te"), ABT),
    # Splits that are doubled, wrapped, or have more around them
    (each("seg_train/seg_train seg_test/seg_test"), ABT),
    (each("train/train test"), ABT),
    (each("train test/test"), ABT),
    (each("archive/train archive/test"), ABT),
    (each("archive/data/v2/train archive/data/v2/test") + " README.md archive/LICENSE", ABT),
    (each("images/train images/val") + " labels/train/1.txt*3 labels/val/1.txt", ABV),
    (each("train/images test/images"), ABT),
    (each("train test") + " docs/figure.png*2", ABT),
    (each("train test") + " preview.png", ABT),
    ("preview.png " + each("data/train data/test"), ABT),
    ("archive/a/x.jpg*3 archive/b/x.jpg*3", AB),
    ("data/a/x.jpg data/b/x.jpg docs/plan.png", AB),
    ("data/a/x.jpg data/b/x.jpg docs/readme.md", AB),
    ("images/a/x.jpg images/b/x.jpg masks/a/x.png masks/b/x.png", AB),
    ("images/a/x.jpg images/b/x.jpg ground_truth/x.png*2", AB),
    ("original/a/x.jpg original/b/x.jpg segmentation_masks/x.png*2", AB),
    ("Annotations/x.mat*9 Object_Categories/a/x.jpg Object_Categories/b/x.jpg README", AB),
    ("meta/train.txt meta/classes.json images/a/x.jpg images/b/x.jpg", AB),
    (each("asl_train/asl_train asl_test/asl_test"), ABT),
    (each("train test val train2/train train2/test".replace("train2", "chest")), ABVT),
    (each("Plants/Plants/train Plants/Plants/valid") + " test/test/x.jpg*4", ABV),
    (each("Plants/train Plants/valid") + " test/x.jpg*4", ABV),
    ("labeled/a/x.jpg labeled/b/x.jpg unlabeled/x.jpg", AB),
    (each("train/labeled") + " train/unlabeled/x.jpg", AB),
    (each("Train Vali Test"), ABVT),
    # Splits within the classes
    ("a/train/x.jpg a/test/x.jpg b/train/y.jpg b/test/y.jpg", ABT),
    ("D2/a/train/x.jpg D2/a/val/x.jpg D2/b/train/y.jpg D2/b/val/y.jpg", ABV),
    # Classes, whatever they are called
    ("a/x.jpg b/x.jpg", AB),
    ("car/x.jpg plane/x.jpg train/x.jpg", {"train": "car plane train"}),
    (
        "test_tube/x.jpg training_shoe/x.jpg dev_board/x.jpg eval_kit/x.jpg",
        {"train": "dev_board eval_kit test_tube training_shoe"},
    ),
    ("dev_board/x.jpg test_board/x.jpg", {"train": "dev_board test_board"}),
    ("0/x.jpg 1/x.jpg 2/x.jpg", {"train": "0 1 2"}),
    ("class_1/x.jpg class_2/x.jpg", {"train": "class_1 class_2"}),
    ("with_mask/x.jpg without_mask/x.jpg", {"train": "with_mask without_mask"}),
    ("mask/x.jpg no_mask/x.jpg", {"train": "mask no_mask"}),
    ("hats/x.jpg mask/x.jpg gloves/x.jpg", {"train": "gloves hats mask"}),
    ("masks/x.jpg no_masks/x.jpg", {"train": "masks no_masks"}),
    (
        "screenshots/x.jpg documents/x.jpg docs/x.jpg unknown/x.jpg other/x.jpg background/x.jpg none/x.jpg",
        {"train": "background docs documents none other screenshots unknown"},
    ),
    (
        "negative/x.jpg positive/x.jpg results/x.jpg".replace("results", "Photocopy"),
        {"train": "Photocopy negative positive"},
    ),
    ("floor%(1)/x.jpg floor%(2)/x.jpg roof/x.jpg", {"train": "floor (1) floor (2) roof"}),
    ("small/x.jpg large/x.jpg", {"train": "large small"}),
    ("photo/x.jpg drawing/x.jpg", {"train": "drawing photo"}),
    (each("train test", "train car"), {"train": "car train", "test": "car train"}),
    ("test/x.jpg train/x.jpg a/x.jpg b/x.jpg c/x.jpg d/x.jpg", {"train": "a b c d test train"}),
    # Class folders that hold folders
    ("cat/x.jpg cat/siamese/x.jpg dog/x.jpg", {"train": "cat dog"}),
    ("cat/2019/x.jpg*3 cat/2020/x.jpg*3 dog/2019/x.jpg*3 dog/2020/x.jpg*3", {"train": "cat dog"}),
    (each("cat dog", "indoor outdoor"), {"train": "cat dog"}),
    (each("cat dog", "2019 2020 2021"), {"train": "cat dog"}),
    (each("cat dog", "raw augmented cropped"), {"train": "cat dog"}),
    (each("benign malignant", "40X 100X 200X"), {"train": "benign malignant"}),
    ("cat/images/x.jpg dog/images/y.jpg", {"train": "cat dog"}),
    ("cat/images/x.jpg cat/masks/x.jpg dog/images/y.jpg dog/masks/y.jpg", {"train": "cat dog"}),
    ("cat/cat/x.jpg dog/dog/x.jpg", {"train": "cat dog"}),
    # Files that are no images
    ("a/x.jpg a/x.txt b/x.jpg notes.txt annotations/x.xml*9", AB),
    ("a/x.jpg b/x.jpg c/", AB),
    (each("train") + " test/", AB),
]


@pytest.mark.parametrize(("files", "classes"), READ, ids=[files[:60] for files, _ in READ])
def test_one_sensible_reading_is_used(files, classes):
    assert shape(read(files)) == classes


# fmt: off
NO_CLASSES = [
    "results", "Plots", "Ergebnisse", "résultats", "outputs", "logs", "predictions", "annotations", "masks",
    "unlabeled", "un_labelled", "unannotated", "unsorted", "pred", "New%folder", "dogs%-%Copy", "Copy%of%dogs",
    "dogs%(1)", "dogs_copy", "Dogs%copy%2",
]
# fmt: on

REFUSED: list[tuple[str, list[str]]] = [
    # No class folders
    ("x.jpg*4", ["4 images", "no class folder"]),
    ("x.jpg a/x.jpg b/x.jpg", ["1 image", "x.jpg"]),
    ("images/x.jpg*4", ["images", "no class folder"]),
    ("archive/images/x.jpg*4", ["archive/images", "no class folder"]),
    ("train/x.jpg*4 test/x.jpg*4", ["train", "no class folder"]),
    ("train_images/x.jpg*4 test_images/x.jpg*4", ["train_images", "no class folder"]),
    (
        "train/images/x.jpg*4 train/labels/x.txt*4 val/images/x.jpg val/labels/x.txt",
        ["train/images", "no class folder"],
    ),
    ("train/a/x.jpg train/b/x.jpg train/x.jpg", ["D/train", "1 image"]),
    (each("train") + " test/x.jpg*4", ["D/test", "--test_split none"]),
    (each("train") + " test/unknown/x.jpg", ["unknown", "--test_split none"]),
    (each("train") + " seg_test/seg_test/x.jpg", ["seg_test", "--test_split none"]),
    (each("train") + " val/x.jpg", ["D/val", "held out", "--data"]),
    ("images/x.jpg*4 masks/x.png*4", ["images, masks", "--class_folders top"]),
    ("images_001/x.jpg images_002/x.jpg", ["images_001, images_002", "--class_folders top"]),
    ("images_001/images/x.jpg images_002/images/y.jpg", ["images_001", "--class_folders top"]),
    ("HAM_images_part_1/x.jpg HAM_images_part_2/y.jpg", ["HAM_images_part_1", "--class_folders top"]),
    ("fold1/x.jpg fold2/x.jpg", ["fold1, fold2", "--class_folders top"]),
    ("224px/x.jpg 512px/x.jpg", ["224px, 512px", "--class_folders top"]),
    ("original/x.jpg augmented/x.jpg", ["augmented, original", "--class_folders top"]),
    ("images/x.jpg*9 annotations/trimaps/x.png*9", ["annotations, images"]),
    # Copies
    ("a/x.jpg b/x.jpg Plants/a/x.jpg Plants/b/x.jpg", ["D/Plants", "a copy?", "--data D/Plants"]),
    (
        each("casting/casting/train casting/casting/test") + " casting_512x512/a/x.jpg casting_512x512/b/x.jpg",
        ["casting/"],
    ),
    (each("flowers flowers_small"), ["flowers_small", "--data D/flowers"]),
    (each("fold1/train fold1/val fold2/train fold2/val"), ["2 data sets", "--data D/fold1"]),
    ("train/a/images/x.jpg train/b/images/x.jpg val/images/x.jpg", ["D/val", "only images"]),
    # Splits or classes
    ("train/x.jpg test/x.jpg sample/x.jpg", ["--train_split train", "--class_folders top"]),
    ("train/steam/x.jpg train/diesel/x.jpg car/x.jpg plane/x.jpg", ["--train_split train", "--class_folders top"]),
    (each("train test") + " car/x.jpg plane/x.jpg ship/x.jpg", ["--train_split train", "--class_folders top"]),
    (each("test val"), ["no split to train on", "--train_split"]),
    (each("fit dev test"), ["--train_split fit"]),
    (each("train2014 train2017 val2017"), ["2 folders for train", "--train_split"]),
    (each("train test_a test_b".replace("test_a", "test1").replace("test_b", "test2")), ["--test_split"]),
    # Splits within some classes
    ("a/train/x.jpg a/test/x.jpg b/train/x.jpg", ["b does not"]),
    ("a/train/x.jpg a/test/x.jpg b/x.jpg", ["b does not"]),
    # Several data sets
    (each("full/train full/test small/train small/test"), ["full/, small/", "--data D/full"]),
    (each("full/train full/test other"), ["full/", "--data D/full"]),
    (
        " ".join(f"{name}/{part}/good/x.jpg" for name in ("bottle", "cable") for part in ("train", "test")),
        ["2 data sets", "--data D/bottle"],
    ),
    (each("224px 512px"), ["224px, 512px", "--data D/224px", "--class_folders top"]),
    (each("original augmented"), ["--data D/augmented"]),
    (each("fold_1 fold_2 fold_3 fold_4 fold_5"), ["--train_split fold_1 --validation_split fold_2"]),
    (each("color grayscale segmented"), ["--data D/color"]),
    (each("v1 v2"), ["--data D/v1"]),
    ("left/a/IMG_7.jpg left/b/IMG_9.jpg right/a/IMG_7.jpg right/b/IMG_9.jpg", ["--data D/left"]),
    ("animals/cat/x.jpg animals/dog/x.jpg masks/x.png", ["--data D/animals"]),
    # Class folders that hold folders
    ("fruit/apple/x.jpg fruit/pear/x.jpg milk/oat/x.jpg milk/soy/x.jpg", ["leaf", "top", "4 leaf folders", "fruit"]),
    (each("train/fruit test/fruit", "apple pear") + " " + each("train/milk test/milk", "oat soy"), ["--class_folders"]),
    (each("8863 8864 8865", "0 1"), ["8863, 8864, 8865", "0, 1", "leaf", "top", "--train_split"]),
    (each("patient_01 patient_02", "benign malignant"), ["patient_01", "benign, malignant", "leaf", "top"]),
    ("p1/sick/x.jpg p2/well/x.jpg p3/sick/x.jpg p4/well/x.jpg", ["p1, p2, p3, p4", "sick, well", "leaf", "top"]),
    (each("amazon/images dslr/images webcam/images", "bike desk mug pen"), ["amazon, dslr", "bike, desk", "leaf"]),
    (each("site_a site_b", "0 1 2 3"), ["site_a, site_b", "0, 1, 2, 3", "leaf", "top"]),
    (each("train/art train/photo test/art test/photo", "bike mug pen"), ["D/train", "art, photo", "leaf", "top"]),
    # Folders beside classes that are none
    *(
        (f"cats/x.jpg dogs/x.jpg {name}/x.jpg", [name.replace("%", " "), "move", "--class_folders top"])
        for name in NO_CLASSES
    ),
    (each("train test", "cats dogs results"), ["D/train", "results"]),
    # Splits beside a test folder
    (each("Plants/Plants/train Plants/Plants/valid") + " " + each("test"), ["move it there", "--data D/Plants/Plants"]),
    ("chats/x.jpg chiens/x.jpg test/chats/x.jpg test/chiens/x.jpg", ["D: test holds the same", "into a folder train"]),
    ("animals/cat/x.jpg animals/dog/x.jpg results/x.jpg", ["animals, results", "--data D/animals"]),
    ("pets/cat/x.jpg pets/dog/x.jpg unlabeled/x.jpg", ["pets, unlabeled", "--data D/pets"]),
    ("a/abbey/x.jpg b/bar/outdoor/x.jpg b/bar/indoor/x.jpg h/hall/outdoor/x.jpg", ["a, b, h", "leaf", "top"]),
    # Names that join a split and a class
    ("trainA/x.jpg trainB/x.jpg testA/x.jpg testB/x.jpg", ["move trainA to train/A", "--class_folders top"]),
    ("cat_train/x.jpg dog_train/x.jpg cat_test/x.jpg dog_test/x.jpg", ["move cat_train to train/cat"]),
    (each("train_clean train_noisy val_clean val_noisy"), ["--train_split train_clean"]),
    # Classes that would vanish
    ("a/x.jpg b/x.jpg c/x.svg*12", ["D/c", "12 .svg"]),
    ("a/x.jpg b/x.jpg c/x.cr2*3 ", ["D/c", "3 .cr2"]),
    ("a/x.jpg c/x.psd", ["D/c", "1 .psd"]),
    ("a/x.jpg b/x.jpg clips/x.mp4*2", ["D/clips", "2 .mp4"]),
    ("a/x.jpg b/x.jpg c/x*7", ["D/c", "7 without a suffix"]),
    ("cats/a/x.jpg cats/b/x.jpg dogs/x.nef*2", ["D/dogs", "2 .nef"]),
    (each("train test") + " train/c/x.raw*3", ["D/train/c", "3 .raw"]),
    (each("train") + " test/a/x.raw*3", ["D/test", "3 .raw"]),
    ("/".join(["a"] * 300) + "/x.jpg", ["200 deep"]),
]


@pytest.mark.parametrize(("files", "said"), REFUSED, ids=[files[:60] for files, _ in REFUSED])
def test_several_readings_or_none_are_refused_with_the_way_out(files, said):
    with pytest.raises(UserError) as caught:
        read(files)
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert len(message) < 500


CHOSEN: list[tuple[str, dict[str, str], dict[str, str]]] = [
    (each("train") + " test/x.jpg*4", {"test_split": "none"}, AB),
    (each("fit dev test"), {"train_split": "fit"}, ABVT),
    ("cats/x.jpg dogs/x.jpg results/x.jpg", {"class_folders": "top"}, {"train": "cats dogs results"}),
    (
        each("amazon webcam", "bike mug pen"),
        {"train_split": "amazon", "test_split": "webcam"},
        {"train": "bike mug pen", "test": "bike mug pen"},
    ),
    (each("train2014 train2017 val2017"), {"train_split": "train2017"}, ABV),
    (each("fold_1 fold_2 fold_3"), {"train_split": "fold_1", "validation_split": "fold_2"}, ABV),
    (each("archive/fit archive/rest"), {"train_split": "fit", "test_split": "rest"}, ABT),
    ("a/fit/x.jpg a/rest/x.jpg b/fit/y.jpg b/rest/y.jpg", {"train_split": "fit", "test_split": "rest"}, ABT),
    (
        each("train/fruit", "apple pear") + " " + each("train/milk", "oat soy"),
        {"class_folders": "top"},
        {"train": "fruit milk"},
    ),
    (
        each("train/fruit", "apple pear") + " " + each("train/milk", "oat soy"),
        {"class_folders": "leaf"},
        {"train": "apple oat pear soy"},
    ),
    (
        each("fruit", "apple other") + " " + each("milk", "oat other"),
        {"class_folders": "leaf"},
        {"train": "apple fruit/other milk/other oat"},
    ),
    ("cat/x.jpg cat/siamese/x.jpg dog/x.jpg", {"class_folders": "leaf"}, {"train": "cat dog siamese"}),
    (each("8863 8864", "0 1"), {"class_folders": "leaf"}, {"train": "0 1"}),
    (
        each("train/art train/photo test/art test/photo", "bike mug"),
        {"class_folders": "leaf"},
        {"train": "bike mug", "test": "bike mug"},
    ),
    (each("8863 8864", "0 1"), {"class_folders": "top"}, {"train": "8863 8864"}),
    (
        "trainA/x.jpg trainB/x.jpg testA/x.jpg testB/x.jpg",
        {"class_folders": "top"},
        {"train": "testA testB trainA trainB"},
    ),
    ("original/x.jpg augmented/x.jpg", {"class_folders": "top"}, {"train": "augmented original"}),
    (each("224px 512px"), {"class_folders": "top"}, {"train": "224px 512px"}),
    ("train/steam/x.jpg car/x.jpg plane/x.jpg", {"class_folders": "top"}, {"train": "car plane train"}),
    (each("train test", "x/a x/b"), {"class_folders": "leaf"}, ABT),
]


@pytest.mark.parametrize(("files", "options", "classes"), CHOSEN)
def test_flags_choose_between_readings(files, options, classes):
    assert shape(read(files, **options)) == classes


@pytest.mark.parametrize(
    ("files", "note"),
    [
        ("archive/a/x.jpg archive/b/x.jpg", "reads archive/"),
        (each("training_set test_set"), "train from training_set/, test from test_set/"),
        (each("train test") + " preview.png", "1 image directly"),
        ("a/train/x.jpg a/test/x.jpg b/train/y.jpg b/test/y.jpg", "CLASS/train/"),
        ("cat/x.jpg cat/siamese/x.jpg dog/x.jpg", "class folders hold folders"),
        (each("cat dog", "indoor outdoor"), "classes are the 2 top folders (cat, dog)"),
        ("a/x.jpg b/x.jpg c/ d/", "2 empty folders, no class: c, d"),
        ("a/x.jpg b/x.jpg notes/x.txt*3", "notes (3 .txt)"),
        (each("train") + " test/", "no images in test/"),
        (each("Plants/train Plants/valid") + " test/x.jpg", "reads Plants/, which holds the splits"),
    ],
)
def test_what_was_decided_is_said(files, note):
    assert any(note in one for one in read(files).notes)


def test_leaf_folders_of_one_name_are_merged_and_the_note_says_so():
    notes = read(each("8863 8864", "0 1"), class_folders="leaf").notes
    assert any("2 leaf folders (0, 1), merged over 2 top folders (8863, 8864)" in note for note in notes)


def test_folders_that_are_left_out_are_named():
    assert read(each("train val extra")).unused == ["extra"]
    assert read("images/a/x.jpg images/b/x.jpg masks/a/x.png").unused == ["masks"]
    layout = read("cat/images/x.jpg cat/masks/x.jpg dog/images/y.jpg dog/masks/y.jpg")
    assert layout.unused == ["cat/masks", "dog/masks"] and set(layout.splits["train"]) == {"cat/images", "dog/images"}


def test_names_beside_a_split_word_count_only_together():
    assert split_words(["seg_train", "seg_test"]) == {"seg_train": "train", "seg_test": "test"}
    assert split_words(["seg_train", "other_test"]) == {}
    assert split_words(["test_tube", "training_shoe", "train"]) == {"train": "train"}
    assert split_words(["contest", "attest", "trainer", "latest"]) == {}


def test_messages_stay_short_with_many_and_long_names():
    long = [f"{'x' * 180}{number:04}" for number in range(1000)]
    nested = " ".join(f"{name}/{name}{leaf}/x.jpg" for name in long for leaf in "ab")
    with pytest.raises(UserError) as caught:
        read(nested)
    assert len(str(caught.value)) < 500 and "999 more" in str(caught.value)
    flat = read(" ".join(f"{name}/x.jpg" for name in long) + " " + " ".join(f"{name}e/" for name in long))
    assert max(map(len, flat.notes)) < 300


@pytest.mark.parametrize(
    "folders",
    [
        each("fold_1{x} fold_2{x}", "cat{x} dog{x}"),
        each("site{x} other{x}", "bike{x} mug{x} pen{x}"),
        each("8863 8864", "cat{x} dog{x} emu{x}"),
        "cat{x}/x.jpg dog{x}/x.jpg cat{x}_copy/x.jpg",
        "trainA{x}/x.jpg trainB{x}/x.jpg testA{x}/x.jpg testB{x}/x.jpg",
        each("Plants{x}/train Plants{x}/val test", "cat{x} dog{x}"),
        each("a{x}/train a{x}/val b{x}/train b{x}/val", "cat{x} dog{x}"),
        each("train test", "cat{x} dog{x}") + " car{x}/x.jpg bus{x}/x.jpg van{x}/x.jpg",
    ],
)
def test_messages_about_long_paths_and_names_stay_short(folders):
    with pytest.raises(UserError) as caught:
        read(folders.replace("{x}", "x" * 180), root="/" + "long/" * 78)
    assert len(str(caught.value)) < 500
