"""The class of each folder: its top folder, or the leaf where class folders hold folders."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping

from vit_dist.data.layout.reading import Reading, plural, refusal
from vit_dist.data.layout.tree import Folder, below
from vit_dist.data.split_words import are_ids, is_container, is_mask, is_variant, split_word
from vit_dist.errors import UserError
from vit_dist.listing import listed, shortened


def map_classes(reading: Reading, bases: Mapping[str, Folder]) -> dict[str, dict[str, str]]:
    """For each split the class of every folder that holds images."""
    leaves = {role: list(_class_leaves(reading, base)) for role, base in bases.items()}
    tops = {role: {leaf.path: below(bases[role], leaf).split("/")[0] for leaf in leaves[role]} for role in bases}
    nested = [leaf for leaf in leaves["train"] if "/" in below(bases["train"], leaf)]
    if not nested:
        return tops
    names = {role: {leaf.path: below(bases[role], leaf) for leaf in leaves[role]} for role in bases}
    by_leaf = _leaf_classes(names)
    if reading.class_folders == "leaf":
        reading.notes.append(_leaf_note(tops["train"], by_leaf["train"]))
        return by_leaf
    _judge_nesting(reading, bases["train"], tops["train"], by_leaf["train"])
    return tops


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
    top_text, leaf_text = _top_text(top_names), f"{len(leaf_names):,} leaf folders ({listed(leaf_names, room=80)})"
    direct = any(child.images for child in base.filled.values())
    if reading.class_folders is None and not direct:
        shared = _shared_leaves(tops)
        if (not shared or _are_initials(base)) and len(leaf_names) > len(top_names):
            raise UserError(
                f"{reading.where(base)}: class folders hold folders: {top_text} hold {leaf_text}. Pass --class_folders "
                "top to make the former the classes, --class_folders leaf for the latter"
            )
        if same := _classes_in_each_top(tops, shared):
            raise refusal(lambda longest: _sites_or_classes(reading, base, top_names, same, longest))
    reading.notes.append(
        f"class folders hold folders: classes are the {top_text}; --class_folders leaf takes {leaf_text}"
    )


def _are_initials(base: Folder) -> bool:
    """Whether the top folders sort others by their first letter: `a/abbey`, `a/airport`, `b/bar`."""
    return all(
        len(top) == 1 and all(name.lower().startswith(top.lower()) for name in child.filled)
        for top, child in base.filled.items()
    )


def _sites_or_classes(reading: Reading, base: Folder, tops: list[str], same: list[str], longest: int) -> str:
    short = [shortened(name, longest) for name in tops]
    named = f"; or --train_split {short[0]} --test_split {short[1]} if the top folders are splits"
    return (
        f"{reading.where(base)}: {_top_text(short)} share the folder names "
        f"{listed([shortened(name, longest) for name in same], room=60)}. Pass --class_folders leaf if these are the "
        "classes (it merges folders of one name), --class_folders top if the top folders are"
        f"{named if split_word(base.name) is None else ''}"
    )


def _top_text(names: list[str]) -> str:
    return f"{len(names):,} top folder{plural(len(names))} ({listed(names, room=60)})"


def _leaf_note(tops: Mapping[str, str], leaves: Mapping[str, str]) -> str:
    """What `--class_folders leaf` makes of the folders."""
    names = sorted(set(leaves.values()))
    note = f"--class_folders leaf: classes are the {len(names):,} leaf folders ({listed(names, room=80)})"
    if paths := [name for name in names if "/" in name]:
        return f"{note}; the same name lies in several folders, so by path: {listed(paths, room=80)}"
    if len(leaves) > len(names):
        return f"{note}, merged over {_top_text(sorted(set(tops.values())))}"
    return note


def _classes_in_each_top(tops: Mapping[str, str], shared: set[str]) -> list[str]:
    """Leaf folders that may be the classes, because the top folders are rather sites, patients or splits.

    `cat/indoor`, `cat/outdoor`, `dog/indoor`, `dog/outdoor` is not that, nor are years within `cat` and `dog`.

    Args:
        tops: Top folder of each leaf's path.
        shared: Names of leaves that lie in more than one top folder.
    """
    top_names = set(tops.values())
    held = Counter(name for name, _ in {(same_name(path.rpartition("/")[2]), top) for path, top in tops.items()})
    names = sorted(name for name in shared if not is_container(name) and not is_variant(name))
    if not names:
        return []
    if are_ids(top_names):
        return names if len(names) > 1 and len(names) == len(held) else []
    if are_ids(names) and not _counts_up(names):
        return []
    common = [name for name in names if 2 * held[name] >= len(top_names)]
    return common if len(common) > max(1, len(top_names)) else []


def _counts_up(names: list[str]) -> bool:
    """Whether the names are 0, 1, 2 ... or 1, 2, 3 ..., which are rather classes than years or patients."""
    if not all(name.isascii() and name.isdigit() for name in names):
        return False
    numbers = sorted(map(int, names))
    return numbers[0] in (0, 1) and numbers[-1] - numbers[0] == len(numbers) - 1


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
        name = same_name(path.rpartition("/")[2])
        if owner.setdefault(name, top) != top:
            shared.add(name)
    return shared


def _leaf_classes(names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The classes by leaf folder: its name, or its path below the split if another path ends in the same name.

    If every name lies in several top folders of the training split, the name alone is the class. The same path in two
    splits is the same class. `names`: role -> folder -> path below the split.
    """
    train = {path: path.partition("/")[0] for path in names["train"].values()}
    merged = {same_name(path.rpartition("/")[2]) for path in train} == _shared_leaves(train)
    counts = Counter(
        path.rpartition("/")[2] for path in {same_name(p) for below in names.values() for p in below.values()}
    )
    made: dict[str, dict[str, str]] = {}
    for role, folders in names.items():
        made[role] = {}
        for folder, path in folders.items():
            last = path.rpartition("/")[2]
            made[role][folder] = last if merged or counts[same_name(last)] == 1 else path
    return made


def same_name(name: str) -> str:
    """The name as it is compared: in the composed normal form."""
    return unicodedata.normalize("NFC", name)
