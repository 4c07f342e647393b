"""Folders that are no classes: variants, copies, parts, loose images, and classes without an image that is read."""

from __future__ import annotations

from collections.abc import Mapping

from vit_dist.data.layout.reading import Reading, plural, refusal
from vit_dist.data.layout.tree import Folder, forgotten
from vit_dist.data.split_words import (
    are_numbered_parts,
    has_variant_word,
    is_container,
    is_extra,
    is_mask,
    is_resolution,
    is_variant,
    no_class,
    splits_by_class,
)
from vit_dist.errors import UserError
from vit_dist.listing import counted, listed, shortened


def refuse_no_classes(reading: Reading, folder: Folder) -> None:
    """Raise for `results`, `unlabelled` or `dogs - Copy` beside at least two class folders."""
    filled = folder.filled
    why = {name: reason for name in filled if (reason := no_class(name, filled))}
    if reading.class_folders or not why or len(filled) - len(why) < 2:
        return
    name, reason = next(iter(why.items()))
    others = [one for one in filled if one not in why]
    raise UserError(
        f"{reading.where(folder)}: {shortened(name)} beside the class folders {listed(others, room=80)} "
        f"{shortened(reason, 90)}: move {shortened(name)} elsewhere, or pass --class_folders top if it is a class"
    )


def refuse_joined_names(reading: Reading, base: Folder) -> None:
    """Raise for `trainA`, `trainB`, `testA`, `testB`, whose names join a split and a class."""
    joined = splits_by_class(list(base.filled))
    if reading.class_folders or not joined:
        return
    name = min(joined, key=lambda name: (joined[name][0] != "train", name))
    if any(base.filled[one].nested for one in joined):
        way = f"choose splits with --train_split {shortened(name, 30)} --test_split NAME"
    else:
        role, rest = joined[name]
        way = f"move {shortened(name, 30)} to {role}/{shortened(rest, 30)}, and so on"
    raise UserError(
        f"{reading.where(base)}: {listed(sorted(joined), room=100)} join the names of splits and classes: {way}, or "
        "pass --class_folders top if each folder is a class"
    )


def refuse_variants(reading: Reading, base: Folder) -> None:
    """Raise if the folders that lie side by side hold the same classes again, or no classes at all."""
    filled = base.filled
    if reading.class_folders or len(filled) < 2:
        return
    names = list(filled)
    flat = all(not child.nested for child in filled.values())
    plain = [name for name in names if not is_mask(name)]
    direct = [name for name in plain if filled[name].images]
    if direct and len(plain) < len(names) and all(map(is_container, plain)):
        raise _no_classes(reading, base, f"{listed(names, room=100)} are images and masks or labels of them")
    if are_numbered_parts(names) or (flat and (all(map(is_resolution, names)) or _is_augmented(names))):
        why = f"{listed(names, room=100)} are names of parts or variants of a data set"
        same = _common_leaves(filled)
        raise _several_variants(reading, base, names, same) if same else _no_classes(reading, base, why)
    same = _common_leaves(filled)
    if not same:
        return
    if any(has_variant_word(name) or is_mask(name) or is_container(name) for name in names) or _same_files(
        reading, filled, same
    ):
        raise _several_variants(reading, base, names, same)


def _no_classes(reading: Reading, base: Folder, why: str) -> UserError:
    return UserError(
        f"{reading.where(base)}: no class folders: {why}. Put each image into a folder named after its class, name a "
        "table of labels with --data, or pass --class_folders top if these are classes"
    )


def _several_variants(reading: Reading, base: Folder, names: list[str], same: list[str]) -> UserError:
    def message(longest: int) -> str:
        train, validation, *_ = short = [shortened(name, longest) for name in names]
        return (
            f"{reading.where(base)}: {listed(short, room=60)} hold the same class folders "
            f"({listed([shortened(name, longest) for name in same], room=40)}): variants of one data set? Choose one "
            f"with {reading.data_flag(base.filled[names[0]])}, or splits with --train_split {train} --validation_split "
            f"{validation}, or pass --class_folders top if they are the classes"
        )

    return refusal(message)


def _same_files(reading: Reading, filled: Mapping[str, Folder], same: list[str]) -> bool:
    """Whether the images have the same names in all of the folders, and not just because they are numbered."""
    for leaf in same[:3]:
        sets = [
            set().union(*(reading.file_names(found.path) for found in child.leaves() if found.name == leaf))
            for child in filled.values()
            if not child.images
        ]
        if len(sets) < 2 or not sets[0] or any(one != sets[0] for one in sets) or _just_numbered(sets[0]):
            return False
    return True


def refuse_loose_images(reading: Reading, folder: Folder, role: str) -> None:
    """Raise if images lie in no class folder."""
    child = next(iter(folder.filled.values()), None)
    alone = child is not None and len(folder.filled) == 1 and not child.nested and not reading.class_folders
    if role == "train" and alone and child and (is_container(child.name) or child.name == folder.name):
        folder = child  # it is called `images`, and the only one: that is no class
    if not folder.images:
        return
    advice = "put each image into a folder named after its class"
    if role == "test":
        advice += ", or pass --test_split none"
    elif role == "validation":
        advice += ", or pass the training folder alone with --data: a part of it is held out"
    lie = "image lies" if folder.images == 1 else "images lie"
    raise UserError(
        f"{reading.where(folder)}: {folder.images:,} {lie} directly in it, in no class folder"
        f"{reading.example(folder)}: {advice}"
    )


def refuse_copies(reading: Reading, folder: Folder) -> None:
    """Raise if a folder among the classes holds the same classes again."""
    filled = folder.filled
    for name, child in filled.items():
        inner = child.filled.keys() - {name}
        if not reading.class_folders and inner and len(filled) > 1 and 2 * len(inner & filled.keys()) >= len(inner):
            raise UserError(
                f"{reading.where(child)} holds folders of the same names as those beside it "
                f"({listed(sorted(inner & filled.keys()), room=80)}): a copy? Move it elsewhere, read it alone "
                f"with {reading.data_flag(child)}, or pass --class_folders top if it is a class"
            )


def check_empty_classes(reading: Reading, base: Folder, role: str) -> None:
    """Class folders without an image that is read: they would vanish."""
    empty, documents = [], []
    for name, child in sorted(base.children.items()):
        if child.total:
            continue
        others = child.all_others()
        if forgotten(others) and not is_extra(name):
            raise UserError(
                f"{reading.where(child)} holds no image of a format that is read, only {counted(others)}, and would "
                "be no class: convert the files to JPEG or PNG, or move the folder out of the data"
            )
        if others:
            documents.append(f"{shortened(name)} ({counted(others)})")
        elif role == "train":
            empty.append(name)
    if empty:
        reading.notes.append(f"{len(empty):,} empty folder{plural(len(empty))}, no class: {listed(empty, room=120)}")
    if documents:
        reading.notes.append(f"no images in {listed(documents, room=140)}: no class")


def _common_leaves(filled: Mapping[str, Folder]) -> list[str]:
    """Names of leaf folders that most of the folders have, if these hold no images themselves; else none."""
    nested = [child for child in filled.values() if not child.images]
    if len(nested) < 2 or len(nested) < len(filled):
        return []
    leaves = [{leaf.name for leaf in child.leaves()} for child in nested]
    first = max(leaves, key=len)
    if not all(2 * len(names & first) >= len(names) for names in leaves):
        return []
    return sorted(name for name in first if sum(name in names for names in leaves) > 1)


def _is_augmented(names: list[str]) -> bool:
    """`original` beside `augmented`."""
    return len(names) > 1 and all(map(is_variant, names)) and any("aug" in name.lower() for name in names)


def _just_numbered(names: set[str]) -> bool:
    """Whether the files are numbered from 0 or 1 without gaps, so that equal names mean nothing."""
    stems = [name.rpartition(".")[0] for name in names]
    numbers = [int(digits) for stem in stems if (digits := _last_number(stem))]
    return len(numbers) == len(stems) and min(numbers) in (0, 1) and max(numbers) <= len(numbers)


def _last_number(stem: str) -> str:
    end = len(stem.rstrip("0123456789"))
    return stem[end:] if stem[end:].isascii() else ""
