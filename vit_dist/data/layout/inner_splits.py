"""Folders of splits within class folders: `bottle/train`, `bottle/test`."""

from __future__ import annotations

from vit_dist.data.layout.reading import Reading
from vit_dist.data.layout.refusals import check_empty_classes
from vit_dist.data.layout.splits import assign
from vit_dist.data.layout.tree import Folder
from vit_dist.data.split_words import is_mask, split_words
from vit_dist.errors import UserError
from vit_dist.listing import listed, shortened


def splits_below(reading: Reading, base: Folder) -> dict[str, dict[str, str]] | None:
    """`bottle/train`, `bottle/test`: splits within class folders."""
    within = {name: _innermost(child) for name, child in base.filled.items() if not child.images}
    inner = {name: _inner_splits(reading, child) for name, child in within.items()}
    found = {name: names for name, names in inner.items() if names}
    if not found or (reading.class_folders and not reading.named):
        return None
    if reading.named and not any(reading.named & set(names) for names in found.values()):
        return None
    check_empty_classes(reading, base, "train")
    reading.note_loose_images(base)
    first, names = next(iter(found.items()))
    deep = any(within[name].children[part].nested for name, parts in found.items() for part in parts)
    if len(found) == 1 and len(base.filled) > 1 and deep:
        raise UserError(
            f"{reading.where(base)}: {shortened(first)}/ holds splits ({listed(sorted(names), room=60)}), the "
            f"folders beside it do not: read it with {reading.data_flag(base.children[first])}, or pass "
            "--class_folders top if every folder is a class"
        )
    if deep:
        raise UserError(
            f"{reading.where(base)} holds {len(found)} data sets, {listed([f'{name}/' for name in found], room=90)}, "
            f"each with splits ({listed(sorted(names), room=60)}): choose one with "
            f"{reading.data_flag(base.children[first])}"
        )
    odd = [name for name in base.filled if sorted(inner.get(name, {})) != sorted(names)]
    if odd:
        raise UserError(
            f"{reading.where(base)}: {shortened(first)}/ holds the splits {listed(sorted(names), room=60)}, but "
            f"{listed(odd, room=80)} does not: give every class the same splits, or pass --class_folders top to "
            "ignore them"
        )
    roles = assign(reading, sorted(names), names)
    order = "class folders hold the splits: "
    reading.notes.append(order + ", ".join(f"{role} from CLASS/{shortened(name)}/" for role, name in roles.items()))
    dropped = sorted(set(names) - set(roles.values()))
    reading.unused += [f"CLASS/{name}" for name in dropped]
    return {
        role: {leaf.path: name for name in found for leaf in within[name].children[part].leaves()}
        for role, part in roles.items()
    }


def _innermost(folder: Folder) -> Folder:
    """The folder within wrappers."""
    while len(folder.filled) == 1 and not folder.images:
        (inner,) = folder.filled.values()
        if inner.images or split_words([inner.name]):
            break
        folder = inner
    return folder


def _inner_splits(reading: Reading, folder: Folder) -> dict[str, str]:
    """Roles of the folders in a class folder, if all of them are splits and there is one to train on."""
    names = [name for name in folder.filled if not is_mask(name)]
    by_name = split_words(names)
    named = reading.named & set(names)
    if named:
        return {name: by_name.get(name, "") for name in names}
    whole = len(by_name) == len(names) and "train" in by_name.values() and len(set(by_name.values())) > 1
    return by_name if whole else {}
