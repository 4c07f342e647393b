"""What the name of a folder says: a split in any common spelling, a variant of the same images, masks of images."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass

# fmt: off
_ROLE_WORDS = {
    "train": "train", "training": "train", "trn": "train", "trainval": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "validate": "validation",
    "vali": "validation",
    "dev": "validation", "devel": "validation", "development": "validation", "eval": "validation",
    "evaluation": "validation",
    "test": "test", "testing": "test", "tst": "test", "holdout": "test", "heldout": "test",
    # Other languages, without accents; none of them names a thing that people photograph.
    "entrainement": "train", "apprentissage": "train", "entrenamiento": "train", "treino": "train",
    "treinamento": "train", "trainings": "train", "addestramento": "train", "allenamento": "train",
    "trening": "train", "traning": "train", "træning": "train", "traening": "train", "treningowe": "train",
    "treningowy": "train", "trenovaci": "train", "egitim": "train", "latih": "train", "pelatihan": "train",
    "obuchenie": "train", "обучение": "train", "训练": "train", "訓練": "train", "学習": "train", "훈련": "train",
    "학습": "train",
    "prueba": "test", "pruebas": "test", "teste": "test", "testes": "test", "testowe": "test", "testowy": "test",
    "testovaci": "test", "uji": "test", "pengujian": "test", "тест": "test", "测试": "test", "測試": "test",
    "テスト": "test", "테스트": "test",
    "validacion": "validation", "validacao": "validation", "validierung": "validation", "validierungs": "validation",
    "validazione": "validation", "convalida": "validation", "validering": "validation", "validatie": "validation",
    "walidacja": "validation", "walidacyjne": "validation", "validacni": "validation", "dogrulama": "validation",
    "validasi": "validation", "валидация": "validation", "验证": "validation", "驗證": "validation",
    "検証": "validation", "검증": "validation",
}
_SHORT_ROLES = {"tr": "train", "va": "validation", "vl": "validation", "te": "test", "ts": "test"}  # only together
_NEUTRAL_WORDS = frozenset([
    "set", "sets", "data", "dataset", "datasets", "image", "images", "img", "imgs", "pic", "pics", "picture",
    "pictures", "photo", "photos", "file", "files", "split", "splits", "folder", "folders", "dir", "sample", "samples",
    "jpg", "jpeg", "png",
    "daten", "bilder", "fotos", "datensatz", "menge", "datos", "imagenes", "dados", "imagens", "donnees", "dati",
    "immagini", "afbeeldingen", "集", "图片", "数据", "데이터",
])
_LINKING_WORDS = frozenset(["of", "for", "de", "di", "do", "da", "du"])  # `dados de treino`
_CONTAINERS = _NEUTRAL_WORDS | frozenset([
    "archive", "class", "classes", "category", "categories", "content", "contents", "download", "downloads", "input",
    "inputs", "jpegimages", "root", "rgb", "unzipped", "extracted", "labeled", "labelled", "annotated", "sorted",
])
_MASKS = frozenset([
    "mask", "masks", "groundtruth", "gt", "segmentation", "segmentations", "segmentationclass", "segmentationobject",
    "seg", "annotation", "annotations", "label", "labels", "depth", "bbox", "bboxes", "heatmap", "heatmaps",
])
_ASIDE = frozenset([
    "docs", "doc", "documentation", "assets", "screenshots", "thumbnails", "thumbs", "previews", "notebooks", "scripts",
    "logs", "runs", "output", "outputs", "results", "plots", "checkpoints", "unlabeled", "unlabelled", "unannotated",
    "unsorted", "untagged",
])
_NO_CLASSES = frozenset([
    "results", "plots", "output", "outputs", "logs", "predictions", "preds", "annotations", "masks", "groundtruth",
    "segmentations", "heatmaps", "checkpoints", "thumbnails", "unlabeled", "unlabelled", "unannotated", "unsorted",
    "untagged", "tosort", "pred", "predict", "prediction", "newfolder", "untitledfolder", "neuerordner",
    "nouveaudossier", "nuevacarpeta", "novapasta", "nuovacartella",
    "ergebnis", "ergebnisse", "auswertung", "auswertungen", "diagramme", "vorhersagen", "unsortiert",
    "resultat", "resultats", "graphiques", "nontrie", "resultado", "resultados", "graficos", "predicciones",
    "sinclasificar", "previsoes", "semrotulo", "risultato", "risultati", "grafici", "previsioni", "resultaten",
    "grafieken", "voorspellingen", "wyniki", "wykresy",
])
_VARIANTS = frozenset([
    "original", "originals", "orig", "raw", "augmented", "augmentation", "augmentations", "aug", "processed",
    "preprocessed", "cropped", "crops", "resized", "full", "complete", "small", "medium", "large", "mini", "tiny",
    "subset", "color", "colour", "grayscale", "greyscale", "gray", "grey", "segmented", "rgb", "infrared", "ir",
    "clean", "noisy", "balanced", "unbalanced", "imbalanced", "compressed", "uncompressed", "unprocessed",
])
# fmt: on
_CLASS_WORDS = frozenset(["class", "classe", "clase", "klasse", "label", "category", "type", "grade", "stage", "level"])
_SUFFIX_WORDS = tuple(sorted(_NEUTRAL_WORDS, key=len, reverse=True))
_PARTS = frozenset([
    "fold", "folds", "kfold", "cv", "split", "batch", "shard", "chunk", "part", "data", "dataset", "set", "image",
    "images", "img", "imgs", "pics", "photos", "pictures",
])  # fmt: skip
_COPY_WORD = "(?:copy|kopie|kopia|copie|copia|kopi)"
_COPIES = [
    re.compile(rf"(.+?)[ _]*[-\u2013_ ] *{_COPY_WORD}(?:[ _]*\(?\d+\)?)?", re.IGNORECASE),
    re.compile(rf"{_COPY_WORD} (?:of|von|de|di|van|av) (.+)", re.IGNORECASE),
    re.compile(r"(.+?) ?\(\d+\)"),
]
_RESOLUTION = re.compile(r"(\D{0,12}[-_ ])?\d{2,4}(px|p|x\d{2,4}(px)?)|(size|res|resolution|px)[-_ ]?\d{2,4}")
_SIZE = re.compile(r"\d{2,4}x\d{2,4}|\d{2,4}px")


@dataclass(frozen=True)
class SplitWord:
    """A name that has one word for a split: which one, and the words that are neither that nor neutral."""

    role: str
    rest: tuple[str, ...]


def split_word(name: str) -> SplitWord | None:
    """What `training_set`, `Train2017` or `seg_train` stands for; None for names of other things."""
    roles, rest = [], []
    for word in _words(name):
        role = _ROLE_WORDS.get(word) or _ROLE_WORDS.get(_without_suffix(word))
        if role is not None:
            roles.append(role)
        elif word not in _NEUTRAL_WORDS and word not in _LINKING_WORDS:
            rest.append(word)
    if set(roles) == {"train", "validation"}:  # `train_val`: both, to train on
        roles = ["train"]
    return SplitWord(roles[0], tuple(rest)) if len(set(roles)) == 1 else None


def split_words(names: Collection[str]) -> dict[str, str]:
    """The split role of each sibling folder whose name has one.

    `seg_train` is a split only beside `seg_test`; `test_tube` and `training_shoe` are not.
    """
    short = {name: _SHORT_ROLES[name.lower()] for name in names if name.lower() in _SHORT_ROLES}
    if len(short) == len(names) > 1 and "train" in short.values():
        return short
    found = {name: word for name in names if (word := split_word(name)) is not None}
    plain = {name: word.role for name, word in found.items() if not word.rest}
    weak = {name: word for name, word in found.items() if word.rest}
    together = {**plain, **{name: word.role for name, word in weak.items()}}
    one_rest = len({word.rest for word in weak.values()}) == 1
    new = not {word.role for word in weak.values()} & set(plain.values())
    if one_rest and new and "train" in together.values() and len(set(together.values())) > 1:
        return together
    return plain


def is_container(name: str) -> bool:
    """Whether the name says no more than that data lie in it (`archive`, `images`, `dataset`)."""
    words = _words(name)
    return bool(words) and all(word in _CONTAINERS for word in words)


def is_mask(name: str) -> bool:
    """Whether a folder of this name beside images holds no images to classify, but masks or labels of them."""
    words = [word for word in _words(name) if word not in _NEUTRAL_WORDS]
    return bool(words) and ("".join(words) in _MASKS or all(word in _MASKS for word in words))


def has_mask_word(name: str) -> bool:
    """Whether a part of the name speaks of masks or labels of images: `mask_path`."""
    return not _MASKS.isdisjoint(_words(name))


def is_aside(name: str) -> bool:
    """Whether the name is one of what lies beside data, such as `docs`."""
    return "".join(_words(name)) in _ASIDE


def is_extra(name: str) -> bool:
    """Whether a folder of this name holds what belongs to images, and none to classify."""
    return is_mask(name) or is_aside(name)


def no_class(name: str, siblings: Collection[str]) -> str | None:
    """Why a folder among class folders is hardly a class; None if it may well be one.

    `screenshots`, `documents`, `unknown`, `other`, `background`, `none` and `mask` are classes of real data sets.
    """
    if "".join(_words(name)) in _NO_CLASSES:
        return "may hold no images of a class"
    folded = {sibling.casefold().strip() for sibling in siblings if sibling != name}
    for pattern in _COPIES:
        matched = pattern.fullmatch(name.strip())
        if matched and matched[1].casefold().strip() in folded:
            return f"may be a copy of {matched[1].strip()}"
    return None


def are_numbered_parts(names: Collection[str]) -> bool:
    """Whether the names differ in their numbers alone and speak of parts: `fold_1` and `fold_2`, `images_001` ..."""
    words = {tuple(_words(name)) for name in names}
    if len(names) < 2 or len(words) > 1 or not all(any(map(str.isdigit, name)) for name in names):
        return False
    (only,) = words
    return bool(only) and ("part" in only or "fold" in only or all(word in _PARTS for word in only))


def splits_by_class(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Split word and class of names that join the two: `trainA`, `trainB`, `testA`, `testB`; else nothing."""
    words = {name: word for name in names if (word := split_word(name)) is not None and word.rest}
    roles: dict[tuple[str, ...], set[str]] = {}
    for word in words.values():
        roles.setdefault(word.rest, set()).add(word.role)
    joined = [rest for rest, found in roles.items() if len(found) > 1 and "train" in found]
    if len(joined) < 2:
        return {}
    return {name: (word.role, _spelled(name, word.rest)) for name, word in words.items() if word.rest in joined}


def _spelled(name: str, words: tuple[str, ...]) -> str:
    """The words as `name` spells them."""
    parts = [part for part in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name) if part.lower() in words]
    return " ".join(parts) or " ".join(words)


def are_ids(names: Collection[str]) -> bool:
    """Whether all names are numbers, or one word and a number: `8863`, `patient_01`, `p12`, but not `class_1`."""
    words = {word for name in names for word in _words(name) if len(word) > 2}
    return len(words) <= 1 and not words & _CLASS_WORDS and all(any(map(str.isdigit, name)) for name in names)


def is_resolution(name: str) -> bool:
    """`224px`, `64x64`, `images_512x512`."""
    return _RESOLUTION.fullmatch(name.lower()) is not None


def is_variant(name: str) -> bool:
    """Whether the name tells one variant of a data set from another."""
    words = [word for word in _words(name) if word not in _NEUTRAL_WORDS]
    numbered = words[-1:] in (["v"], ["version"], ["part"], ["fold"]) and name[-1:].isdigit()
    return numbered or is_resolution(name) or (bool(words) and all(word in _VARIANTS for word in words))


def has_variant_word(name: str) -> bool:
    """Whether a part of the name tells variants: `flowers_small`, `casting_512x512`."""
    return is_variant(name) or any(word in _VARIANTS for word in _words(name)) or _SIZE.search(name.lower()) is not None


def _words(name: str) -> list[str]:
    """Lower-case words without digits and accents: `trainData2017` is `train`, `data`."""
    bare = "".join(char for char in unicodedata.normalize("NFD", name) if not unicodedata.combining(char))
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", bare))
    joined = re.sub(r"\b(hold|held)[-_ ]+out\b", "holdout", spaced.lower())
    return [word for word in re.split(r"[\W\d_]+", joined) if word]


def _without_suffix(word: str) -> str:
    """`trainset`, `testimages` without what follows the name of the split."""
    return next((word[: -len(end)] for end in _SUFFIX_WORDS if word.endswith(end) and word != end), word)
