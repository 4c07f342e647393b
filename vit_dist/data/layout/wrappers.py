"""Folders around the data: archives, doubled folders, `images` beside `masks`."""

from __future__ import annotations

from collections.abc import Mapping

from vit_dist.data.layout.reading import Reading
from vit_dist.data.layout.tree import Folder, forgotten
from vit_dist.data.split_words import is_container, is_extra, is_variant, split_word, split_words
from vit_dist.errors import UserError
from vit_dist.listing import listed, shortened


def unwrap(reading: Reading, folder: Folder) -> Folder:
    """The folder in which splits or classes lie side by side."""
    while not reading.named & folder.children.keys():
        inner = _only_child(reading, folder)
        if inner is None:
            break
        reading.note_loose_images(folder)
        reading.notes.append(f"reads {shortened(inner.path)}/, which holds the data")
        folder = inner
    return folder


def unwrap_splits(reading: Reading, splits: Mapping[str, Folder]) -> dict[str, Folder]:
    """The folder of each split in which its class folders lie."""
    found = dict(splits)
    while (inner := _only_child(reading, found["train"]) or _doubled(found["train"], "train")) is not None:
        reading.notes.append(
            f"reads {shortened(inner.path)}/, which holds the data of {shortened(found['train'].path)}/"
        )
        for role in [role for role in found if role != "train"]:
            same = found[role].filled.get(inner.name)
            found[role] = same if same is not None else found[role]
        found["train"] = inner
    for role in found:
        while (inner := _doubled(found[role], role)) is not None:
            found[role] = inner
    return found


def _only_child(reading: Reading, folder: Folder) -> Folder | None:
    """The one folder that the data lie in, if `folder` adds nothing but what is no data."""
    filled = folder.filled
    inner = next(iter(filled.values()), None)
    if len(filled) > 1:
        inner = _beside_masks(reading, folder, filled)
    if inner is None or inner.images or split_words([inner.name]):
        return None
    beside = [child for child in folder.children.values() if child is not inner]
    lost = [child for child in beside if forgotten(child.all_others()) and not is_extra(child.name)]
    if lost and not is_container(inner.name):
        return None  # that may be a class whose images are not read
    reading.unused += [child.path for child in beside if child.total]
    return inner


def _beside_masks(reading: Reading, folder: Folder, filled: Mapping[str, Folder]) -> Folder | None:
    """`images` beside `masks`, `data` beside `docs`."""
    data = [child for name, child in filled.items() if not is_extra(name)]
    if reading.class_folders or len(data) != 1:
        return None
    if is_container(data[0].name) or is_variant(data[0].name):
        return data[0]
    if data[0].nested and not data[0].images and not split_word(data[0].name):
        raise UserError(
            f"{reading.where(folder)}: of {listed(list(filled), room=100)} only {shortened(data[0].name)} may hold "
            f"classes: read it with {reading.data_flag(data[0])}, or pass --class_folders top if each is a class"
        )
    return None


def _doubled(folder: Folder, role: str) -> Folder | None:
    """The only folder in a split, if it just repeats the name of the split."""
    only = next(iter(folder.filled.values()), None)
    if only is None or folder.images or only.images or len(folder.filled) > 1:
        return None
    return only if only.name == folder.name or split_words([only.name]).get(only.name) == role else None
