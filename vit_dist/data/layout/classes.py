"""The class of each folder: its top folder, or the leaf where class folders hold folders."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping

from vit_dist.data.layout.reading import Reading, plural
from vit_dist.data.layout.tree import Folder, below
from vit_dist.data.listing import listed
from vit_dist.data.split_words import is_container, is_mask
from vit_dist.errors import UserError


def map_classes(reading: Reading, bases: Mapping[str, Folder]) -> dict[str, dict[str, str]]:
    """For each split the class of every folder that holds images."""
    leaves = {role: list(_class_leaves(reading, base)) for role, base in bases.items()}
    tops = {role: {leaf.path: below(bases[role], leaf).split("/")[0] for leaf in leaves[role]} for role in bases}
    nested = [leaf for leaf in leaves["train"] if "/" in below(bases["train"], leaf)]
    if not nested:
        return tops
    names = {role: {leaf.path: below(bases[role], leaf) for leaf in leaves[role]} for role in bases}
    by_leaf = _leaf_classes(names)
    _judge_nesting(reading, bases["train"], tops["train"], by_leaf["train"])
    return by_leaf if reading.class_folders == "leaf" else tops


def _class_leaves(reading: Reading, base: Folder) -> Iterator[Folder]:
    """The folders with images, without masks beside the images of a class."""
    for _, top in sorted(base.filled.items()):
        yield from _without_masks(reading, top)


def _without_masks(reading: Reading, folder: Folder) -> Iterator[Folder]:
    masks = [name for name in folder.filled if is_mask(name)]
    pictures = [name for name in folder.filled if name not in masks]
    drop = set(masks) if masks and not reading.class_folders else set()
    if drop and not folder.images and not all(map(is_container, pictures)):
        drop = set()
    if drop and not folder.images and not pictures:
        drop = set()
    reading.unused += [folder.children[name].path for name in sorted(drop)]
    if folder.images:
        yield folder
    for name, child in folder.filled.items():
        if name not in drop:
            yield from _without_masks(reading, child)


def _judge_nesting(reading: Reading, base: Folder, tops: Mapping[str, str], leaves: Mapping[str, str]) -> None:
    """Say that class folders hold folders; raise if it cannot be told which of them are the classes."""
    top_names, leaf_names = sorted(set(tops.values())), sorted(set(leaves.values()))
    top_text = f"{len(top_names):,} top folder{plural(len(top_names))} ({listed(top_names, room=60)})"
    leaf_text = f"{len(leaf_names):,} leaf folders ({listed(leaf_names, room=80)})"
    if reading.class_folders == "leaf":
        paths = [name for name in leaf_names if "/" in name]
        also = f"; the same name lies in several folders, so by path: {listed(paths, room=80)}" if paths else ""
        reading.notes.append(f"--class_folders leaf: classes are the {leaf_text}{also}")
        return
    direct = any(child.images for child in base.filled.values())
    shared = bool(_shared_leaves(tops))
    if reading.class_folders is None and not direct and not shared and len(leaf_names) > len(top_names):
        raise UserError(
            f"{reading.where(base)}: class folders hold folders: {top_text} hold {leaf_text}. Pass --class_folders "
            "top to make the former the classes, --class_folders leaf for the latter"
        )
    reading.notes.append(
        f"class folders hold folders: classes are the {top_text}; --class_folders leaf takes {leaf_text}"
    )


def refuse_foreign_split(reading: Reading, mapping: Mapping[str, dict[str, str]], bases: Mapping[str, Folder]) -> None:
    """Raise if a split has no class of the training split: it is not labelled, or not of this data set."""
    known = {same_name(name) for name in mapping["train"].values()}
    for role, classes in mapping.items():
        names = sorted(set(classes.values()))
        if known & {same_name(name) for name in names}:
            continue
        advice = "; if it is not labelled pass --test_split none" if role == "test" else "; or read train alone"
        raise UserError(
            f"{reading.where(bases[role])}: {role} has no class of train ({listed(sorted(known), room=80)}), only "
            f"{listed(names, room=80)}: give both the same class folders{advice}"
        )


def _shared_leaves(tops: Mapping[str, str]) -> set[str]:
    """Names of leaf folders that lie in more than one top folder; `tops`: top folder of each leaf's path."""
    owner: dict[str, str] = {}
    shared = set()
    for path, top in tops.items():
        name = path.rpartition("/")[2]
        if owner.setdefault(name, top) != top:
            shared.add(name)
    return shared


def _leaf_classes(names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The classes by leaf folder: its name, or its path below the split if another path ends in the same name.

    `names`: role -> folder -> path below the split. The same path in two splits is the same class.
    """
    paths = {same_name(path): path for folders in names.values() for path in folders.values()}
    counts = Counter(path.rpartition("/")[2] for path in paths)
    made: dict[str, dict[str, str]] = {}
    for role, folders in names.items():
        made[role] = {}
        for folder, path in folders.items():
            last = path.rpartition("/")[2]
            made[role][folder] = last if counts[same_name(last)] == 1 else path
    return made


def same_name(name: str) -> str:
    """The name as it is compared: in the composed normal form."""
    return unicodedata.normalize("NFC", name)
