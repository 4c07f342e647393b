"""Folders of splits with class folders in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vit_dist.data.columns import ROLES, SPLIT_NAMES
from vit_dist.data.layout.reading import Reading
from vit_dist.data.layout.tree import Folder, forgotten
from vit_dist.data.split_words import is_aside, is_container, split_word, split_words
from vit_dist.errors import UserError
from vit_dist.listing import counted, listed, shortened


def splits_above(reading: Reading, base: Folder) -> dict[str, Folder] | None:
    """Folders of splits with class folders in them, by role."""
    filled = base.filled
    by_name = split_words(filled)
    if reading.named & base.children.keys():
        return _take(reading, base, by_name)
    if not by_name or (reading.class_folders and not _surely_splits(reading, filled, by_name)):
        return None
    rest = [filled[name] for name in filled if name not in by_name]
    if not rest:
        return _take(reading, base, by_name)
    if (beside := _splits_beside_test(reading, base, by_name, rest)) is not None:
        return beside
    members = [filled[name] for name in by_name]
    roles = set(by_name.values())
    nested = any(not child.images for child in members)
    if not nested:
        if len(roles) > 1 and "train" in roles and len(rest) <= len(members):
            raise _either(reading, base, by_name, rest)
        if "train" not in roles and len(rest) > 1 and not reading.class_folders:
            raise _flat_split(reading, base, by_name, rest)
        return None  # `train` beside `car` and `plane`, each full of images
    if _surely_splits(reading, filled, by_name):
        return _take(reading, base, by_name)
    raise _either(reading, base, by_name, rest)


def _splits_beside_test(
    reading: Reading, base: Folder, by_name: Mapping[str, str], rest: list[Folder]
) -> dict[str, Folder] | None:
    """`data/train`, `data/valid` beside `test` without labels: the former. Raises `UserError` if it has labels."""
    inner = rest[0]
    while len(inner.filled) == 1 and not inner.images:
        (inner,) = inner.filled.values()
    within = split_words(inner.filled)
    if len(rest) > 1 or "train" in by_name.values() or "train" not in within.values():
        return None
    members = [base.filled[name] for name in by_name]
    if any(not _has_no_labels(leaf) for child in members for leaf in child.leaves()):
        raise UserError(
            f"{reading.where(base)}: {listed(sorted(by_name), room=60)} may belong to the splits in "
            f"{shortened(inner.path, 80)}: move it there, or read them alone with {reading.data_flag(inner)}"
        )
    reading.notes.append(f"reads {shortened(inner.path)}/, which holds the splits")
    reading.unused += [child.path for child in members]
    return _take(reading, inner, within)


def _has_no_labels(leaf: Folder) -> bool:
    """Whether the name of a folder with images is that of a split, or says nothing."""
    return split_word(leaf.name) is not None or is_container(leaf.name)


def _surely_splits(reading: Reading, filled: Mapping[str, Folder], by_name: Mapping[str, str]) -> bool:
    """Whether nothing else than splits is meant: what lies beside them is less, or the same classes again."""
    rest = [child for name, child in filled.items() if name not in by_name]
    train = [filled[name] for name, role in by_name.items() if role == "train"]
    if not train or train[0].images:
        return not rest and bool(train)
    if len(set(by_name.values())) > 1 and len(rest) <= len(by_name):
        return True
    known = {name for child in train for name in child.filled}
    return all(is_aside(child.name) or _share(child.filled.keys(), known) for child in rest)


def _either(reading: Reading, base: Folder, by_name: Mapping[str, str], rest: list[Folder]) -> UserError:
    splits, others = listed(sorted(by_name), room=80), listed([child.name for child in rest], room=80)
    train = next((name for name, role in by_name.items() if role == "train"), None)
    known = {name for member in by_name for name in base.filled[member].filled}
    if train is None and _share([child.name for child in rest], known):
        return UserError(
            f"{reading.where(base)}: {splits} holds the same class folders as those beside it ({others}): move these "
            "into a folder train, or pass --class_folders top if every folder is a class"
        )
    take = f"--train_split {shortened(train or max(rest, key=lambda child: child.total).name)}"
    return UserError(
        f"{reading.where(base)}: {splits} may be splits, but {others} beside them are not: pass {take} if they are "
        "splits, or --class_folders top if every folder is a class"
    )


def _flat_split(reading: Reading, base: Folder, by_name: Mapping[str, str], rest: list[Folder]) -> UserError:
    """`test`, full of images, beside `cat` and `dog`: images without labels, or a class."""
    names = listed(sorted(by_name), room=60)
    return UserError(
        f"{reading.where(base)}: {names} beside the class folders {listed([child.name for child in rest], room=80)} "
        f"may hold images without labels: move {names} out of the folder, or pass --class_folders top if it is a "
        "class"
    )


def _take(reading: Reading, base: Folder, by_name: Mapping[str, str]) -> dict[str, Folder]:
    filled = base.filled
    roles = assign(reading, list(filled), by_name)
    _check_lost_splits(reading, base)
    reading.unused += [filled[name].path for name in filled if name not in roles.values()]
    reading.note_loose_images(base)
    usual = {name for names in SPLIT_NAMES.values() for name in names}
    if any(name.lower() not in usual for name in roles.values()):
        reading.notes.append("splits: " + ", ".join(f"{role} from {shortened(name)}/" for role, name in roles.items()))
    return {role: filled[name] for role, name in roles.items()}


def assign(reading: Reading, names: list[str], by_name: Mapping[str, str] | None = None) -> dict[str, str]:
    """The folder for each role that there is one for."""
    by_name = by_name or {}
    roles: dict[str, str] = {}
    for role in ROLES:
        chosen: str | None = getattr(reading.options, f"{role}_split")
        if role == "test" and reading.leaves_test_alone():
            continue
        if chosen is not None:
            if chosen not in names:
                raise UserError(
                    f"--{role}_split {shortened(chosen)}: {shortened(reading.root, 120)} has no such split; it has "
                    f"{listed(names)}"
                )
            if chosen in roles.values():
                raise UserError(
                    f"--{role}_split {shortened(chosen)}: this split of {shortened(reading.root, 120)} already has "
                    "another role"
                )
            roles[role] = chosen
            continue
        free = [name for name in names if by_name.get(name) == role and name not in roles.values()]
        free = [name for name in free if name not in reading.named]
        if found := _usual(reading, role, free):
            roles[role] = found
    if "train" not in roles:
        raise UserError(
            f"{shortened(reading.root, 120)} has no split to train on, only {listed(names)}: name one with "
            "--train_split"
        )
    return roles


def _usual(reading: Reading, role: str, names: list[str]) -> str | None:
    if len(names) > 1 and role != "train":
        for usual in SPLIT_NAMES[role]:
            if exact := [name for name in names if name.lower() == usual]:
                return exact[0]
    if len(names) > 1:
        raise UserError(
            f"{shortened(reading.root, 120)} has {len(names)} folders for {role}, {listed(names)}: choose one with "
            f"--{role}_split"
        )
    return names[0] if names else None


def _check_lost_splits(reading: Reading, base: Folder) -> None:
    """Folders with the name of a split that hold no image."""
    for name, child in sorted(base.children.items()):
        word = split_word(name)
        if child.total or word is None or word.rest or (word.role == "test" and reading.leaves_test_alone()):
            continue
        others = child.all_others()
        if forgotten(others):
            raise UserError(
                f"{reading.where(child)} holds no image of a format that is read, only {counted(others)}: convert "
                "them, or move the folder elsewhere"
            )
        reading.notes.append(f"no images in {shortened(name)}/")


def _share(names: Iterable[str], known: set[str]) -> bool:
    names = list(names)
    return bool(names) and 2 * len(known.intersection(names)) >= len(names)
