"""Which split plays which role, which columns hold images and labels, and the common shape of both."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa

from vit_dist.errors import UserError

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

ROLES = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_TEXT = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_MOST_SHOWN = 10
_LONGEST_SHOWN = 30  # characters of a column's name in a message
# fmt: off
_IMAGE_NAMES = frozenset([
    "image", "img", "picture", "photo", "file_name", "filename", "file", "path", "image_path", "filepath",
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif",
])
_LABEL_NAMES = frozenset(["label", "labels", "fine_label", "target", "cls", "class"])
# Names that public data sets use but that may mean something else: they count where no name above is there, and the
# data lines say that the column is a guess.
_LIKELY_IMAGE_NAMES = frozenset([
    "image_id", "image_name", "image_file", "image_filename", "image_file_name", "img_id", "img_name", "img_path",
    "img_file", "imagename", "imagepath", "imageid", "filenames", "files", "file_path", "filepaths", "file_names",
    "fname", "fpath", "full_path", "rel_path", "relative_path", "photo_id", "picture_id", "photo_path", "image_bytes",
    "images", "imgs", "image_base64", "base64", "image_url", "img_url", "url", "id", "id_code", "isic_id",
    # German, French, Spanish, Italian, Portuguese
    "bild", "bilder", "foto", "datei", "dateiname", "bilddatei", "bildname", "dateipfad", "pfad", "fichier",
    "nom_fichier", "nom_de_fichier", "nom_du_fichier", "chemin", "imagen", "archivo", "nombre_archivo",
    "nombre_de_archivo", "fichero", "ruta", "immagine", "nome_file", "percorso", "imagem", "arquivo", "ficheiro",
    "nome_arquivo", "nome_do_arquivo", "caminho",
])
_LIKELY_LABEL_NAMES = frozenset([
    "category", "species", "breed", "class_name", "class_label", "classname", "class_id", "class_index", "classid",
    "category_name", "category_id", "label_name", "label_id", "label_text", "label_idx", "label_index", "labelname",
    "target_name", "target_id", "diagnosis", "dx", "disease", "y", "emotion", "variety", "level", "classes",
    # German, French, Spanish, Italian, Portuguese
    "klasse", "kategorie", "rasse", "sorte", "diagnose", "bezeichnung", "classe", "étiquette", "etiquette",
    "catégorie", "categorie", "espèce", "espece", "clase", "etiqueta", "categoría", "categoria", "especie", "raza",
    "diagnóstico", "diagnostico", "etichetta", "specie", "razza", "rótulo", "rotulo", "espécie", "raça",
])
# fmt: on
_PIXEL_NAME = re.compile(r"(?:pixel|pix|px|p|x|f|feature|attr)?[_ -]?\d+(?:[x_]\d+)?", re.IGNORECASE)
_LABEL_STEM = re.compile(r"(label|class|target|category)(?:[_ -]?(?:name|id|idx|index|text|str|code|num|number))?")
_STEM_OF = {"labels": "label", "fine_label": "label", "cls": "class", "classes": "class"}
_MIN_PIXEL_COLUMNS = 16


def split_roles(splits: Sequence[str], options: DataOptions, where: str) -> dict[str, str]:
    """The name of the split for each of train, validation and test that there is one for.

    Raises `UserError` if a split that the options name is missing, if one split would play two roles, or if
    nothing is there to train on.
    """
    roles: dict[str, str] = {}
    for role in ROLES:
        chosen: str | None = getattr(options, f"{role}_split")
        if role == "test" and chosen is not None and chosen.lower() == "none":
            continue
        if chosen is not None and chosen not in splits:
            raise UserError(f"--{role}_split {chosen}: {where} has no such split; it has {', '.join(splits)}")
        name = chosen or _usual_name(role, splits, taken=roles.values())
        if name is None:
            continue
        if name in roles.values():
            raise UserError(f"--{role}_split {name}: this split of {where} already has another role")
        roles[role] = name
    if "train" not in roles:
        raise UserError(f"{where} has no split to train on, only {', '.join(splits)}: name one with --train_split")
    return roles


def usual_role(name: str) -> str | None:
    """The role that a split of this name plays unless the user says otherwise."""
    return next((role for role in ROLES if name.lower() in SPLIT_NAMES[role]), None)


def _usual_name(role: str, splits: Sequence[str], taken: Iterable[str]) -> str | None:
    free = [name for name in splits if name not in set(taken)]
    for usual in SPLIT_NAMES[role]:
        for name in free:
            if name.lower() == usual:
                return name
    return None


def image_column(features: Any, override: str | None, where: str, file_names: Collection[str] = ()) -> str:
    """The one column of `features` that holds images.

    Args:
        features: Of a table.
        override: The column that the user named.
        where: The table, for messages.
        file_names: The columns whose values are names of image files: they count before columns that only have a
            likely name.

    Raises:
        UserError: There is no such column, or there are several.
    """
    if override is None:
        typed = [name for name, feature in features.items() if _holds_images(feature)]
        texts = [name for name in features if getattr(features[name], "dtype", "") in _TEXT]
        tiers = [
            typed,
            [name for name in texts if _is_known(name, _IMAGE_NAMES)],
            [name for name in texts if name in file_names],
            [name for name in texts if _is_known(name, _LIKELY_IMAGE_NAMES)],
            [name for name in features if is_image_name(name)],  # numbers may be names of files, lists are refused
        ]
        candidates = next((names for names in tiers if names), [])
        candidates = [name for name in candidates if _is_known(name, _IMAGE_NAMES)] or candidates
        is_sure = len(candidates) == 1 and not is_guess(candidates[0], features[candidates[0]])
        if not is_sure and (reason := _pixel_columns(features)):
            raise UserError(f"{where}: {reason}")
        return _the_one("image", candidates, features, where)
    return _named("image", override, features, where)


def label_column(features: Any, override: str | None, where: str) -> str:
    """The one column of `features` that holds class labels; raises `UserError` if there is not exactly one."""
    if override is not None:
        return _named("label", override, features, where)
    candidates = label_candidates(features)
    candidates = [name for name in candidates if _is_known(name, _LABEL_NAMES)] or candidates
    return _the_one("label", candidates, features, where)


def label_candidates(features: Any) -> list[str]:
    """The columns that may hold class labels, by type and name."""
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in features if _is_known(name, _LABEL_NAMES)]
    features = features if {"x", "y"} - {name.lower() for name in features} else _without_y(features)
    return list(dict.fromkeys([*typed, *named])) or [name for name in features if is_label_name(name)]


def _without_y(features: Any) -> dict[str, Any]:
    """The columns without `y`, which beside `x` is a coordinate."""
    return {name: feature for name, feature in features.items() if name.lower() != "y"}


def same_labels(features: Any, label: str) -> list[str]:
    """Columns named like another form of `label`: `label_name` or `label_id` beside `label`."""
    stem = _label_stem(label)
    return [name for name in features if name != label and stem is not None and _label_stem(name) == stem]


def _label_stem(name: str) -> str | None:
    lowered = name.lower()
    lowered = _STEM_OF.get(lowered, lowered)
    matched = _LABEL_STEM.fullmatch(lowered)
    return matched[1] if matched else None


def is_image_name(name: str) -> bool:
    """Whether columns of images are often called so."""
    return _is_known(name, _IMAGE_NAMES | _LIKELY_IMAGE_NAMES)


def is_label_name(name: str) -> bool:
    """Whether columns of labels are often called so."""
    return _is_known(name, _LABEL_NAMES | _LIKELY_LABEL_NAMES)


def is_guess(name: str, feature: Any) -> bool:
    """Whether a column may well hold something else than images or labels, by its name and type."""
    is_typed = isinstance(feature, datasets.ClassLabel) or _holds_images(feature)
    return not is_typed and not _is_known(name, _IMAGE_NAMES | _LABEL_NAMES)


def _is_known(name: str, known: frozenset[str]) -> bool:
    last = name.rsplit(".", 1)[-1].strip().lower()  # `json.label` is the field `label` of `json`
    return re.sub(r"[ -]+", "_", last) in known


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _pixel_columns(features: Any) -> str | None:
    """Why a table of numbers is no table of images; None if it does not look like one."""
    pixels = [name for name in features if _PIXEL_NAME.fullmatch(name)]
    if len(pixels) >= _MIN_PIXEL_COLUMNS:
        return (
            f"pixel values in {len(pixels):,} columns ({pixels[0]}, {pixels[1]}, ...), not images: write each row as "
            "an image file, or as PNG bytes in a Parquet file"
        )
    if any(name.strip().lower() in ("pixels", "pixel", "pixel_values") for name in features):
        return "column pixels holds pixel values, not images: write each row as an image file"
    return None


def _named(kind: str, override: str, features: Any, where: str) -> str:
    if override in features:
        return override
    close = difflib.get_close_matches(override, list(features), n=1)
    hint = f" (did you mean {_short(close[0])}?)" if close else ""
    raise UserError(
        f"--{kind}_column_name {_short(override)}: {where} has no such column{hint}; it has {_columns(features)}"
    )


class NoLabelColumn(UserError):
    """A table has no column that looks like labels: it may describe images without saying what they show."""


def _the_one(kind: str, candidates: list[str], features: Any, where: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    found = f"several columns could hold the {kind}s" if candidates else f"no column looks like it holds {kind}s"
    refusal = NoLabelColumn if kind == "label" and not candidates else UserError
    both = kind == "image" and not label_candidates(features)
    also = ", and the one with labels with --label_column_name" if both else ""
    raise refusal(f"{where}: {found}; name one with --{kind}_column_name{also}. Columns: {_columns(features)}")


def _columns(features: Any) -> str:
    shown = [f"{_short(name)} ({_type_name(features[name])})" for name in list(features)[:_MOST_SHOWN]]
    while len(shown) > 1 and len(", ".join(shown)) > 220:
        shown.pop()
    left = len(features) - len(shown)
    return ", ".join(shown) + (f" and {left:,} more" if left else "")


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_SHOWN else name[: _LONGEST_SHOWN - 3] + "..."


def _type_name(feature: Any) -> str:
    names = getattr(feature, "names", None)
    if names is not None:
        return f"ClassLabel of {len(names)}"
    if isinstance(feature, dict):
        return _short("struct<" + ", ".join(feature) + ">")
    return _short(str(getattr(feature, "dtype", type(feature).__name__)).rsplit(".", 1)[-1].replace("Image", "image"))


def common_table(
    table: datasets.Dataset, image: str, label: str, ids: Sequence[str] | pa.ChunkedArray
) -> datasets.Dataset:
    """Columns `id` (string), `image` (bytes or path, not decoded) and `label` (as it is) of some rows.

    Raises `UserError` if the image column holds something else.
    """
    table = table.select_columns([image, label])
    try:
        table = table.cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(f"column {image} holds no images: {error}") from error
    table = table.rename_columns({image: "image", label: "label"})
    column = ids if isinstance(ids, pa.ChunkedArray) else pa.array(ids, pa.string())
    names = datasets.Dataset(pa.table({"id": column}))
    return datasets.concatenate_datasets([names, table], axis=1)
