"""What the folders of a data set mean: which are splits, which are classes, and which are neither.

`read_layout` decides once, from the names of folders and the numbers of their files alone, so that every process reads
the same. Where more than one reading is sensible it refuses and names the flags that choose.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vit_dist.data.columns import ROLES, SPLIT_NAMES
from vit_dist.data.listing import counted, listed, shortened
from vit_dist.data.split_words import (
    are_numbered_parts,
    has_variant_word,
    is_aside,
    is_container,
    is_mask,
    is_resolution,
    is_variant,
    split_word,
    split_words,
)
from vit_dist.errors import UserError

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

# Files that lie in class folders without being images that somebody forgot to convert.
# fmt: off
_NOT_IMAGES = frozenset([
    "7z", "bat", "bib", "bin", "bz2", "cfg", "ckpt", "conf", "css", "csv", "db", "doc", "docx", "gz", "h5", "htm",
    "html", "ini", "ipynb", "js", "json", "jsonl", "lnk", "lock", "log", "lst", "md", "md5", "names", "odt", "onnx",
    "parquet", "pdf", "pkl", "pt", "pth", "py", "rar", "rst", "safetensors", "sh", "sha256", "tar", "tex", "tgz",
    "toml", "tsv", "txt", "url", "xls", "xlsx", "xml", "yaml", "yml", "zip",
])
# fmt: on
_DEEPEST = 200  # folders in each other; below Python's limit of recursion
FileNames = Callable[[str], set[str]]  # of the images that lie directly in a folder


@dataclass(frozen=True)
class Layout:
    """One reading of a data folder."""

    splits: dict[str, dict[str, str]]  # role -> folder that holds images -> class
    notes: list[str] = field(default_factory=list)  # what was decided, for the user
    unused: list[str] = field(default_factory=list)  # folders with images that are left out

    @property
    def classes(self) -> list[str]:
        """Of the training split, sorted."""
        return sorted(set(self.splits["train"].values()))


class _Folder:
    """A folder with what lies in it."""

    __slots__ = ("children", "images", "name", "others", "path", "total")

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = path.rpartition("/")[2]
        self.children: dict[str, _Folder] = {}
        self.images = 0  # directly in it
        self.total = 0  # in it and below
        self.others: Mapping[str, int] = {}  # files directly in it that are no images, by suffix

    def child(self, name: str) -> _Folder:
        if name not in self.children:
            self.children[name] = _Folder(f"{self.path}/{name}" if self.path else name)
        return self.children[name]

    @property
    def filled(self) -> dict[str, _Folder]:
        """The folders in it that hold images, in them or below."""
        return {name: child for name, child in sorted(self.children.items()) if child.total}

    @property
    def nested(self) -> bool:
        """Whether folders in it hold images."""
        return self.total > self.images

    def leaves(self) -> Iterator[_Folder]:
        """The folders that hold images directly: it and those below, by path."""
        if self.images:
            yield self
        for _, child in sorted(self.children.items()):
            if child.total:
                yield from child.leaves()

    def all_others(self) -> Counter[str]:
        """Files in it and below that are no images, by suffix."""
        counts = Counter(self.others)
        for child in self.children.values():
            counts.update(child.all_others())
        return counts


def read_layout(
    root: str,
    images: Mapping[str, int],
    options: DataOptions,
    *,
    directories: Iterable[str] = (),
    others: Mapping[str, Mapping[str, int]] | None = None,
    file_names: FileNames = lambda folder: set(),
) -> Layout:
    """The one sensible reading of a folder of images.

    Args:
        root: The folder, as the user names it.
        images: Number of image files that lie directly in each folder, by path relative to `root`.
        options: `train_split`, `validation_split`, `test_split` and `class_folders` choose between readings.
        directories: All folders, also those without images.
        others: Numbers of files by suffix that are no images, by folder.
        file_names: Names of the images in a folder; asked for few folders.

    Raises:
        UserError: There is no sensible reading, or more than one.
    """
    tree = _Folder("")
    for path in directories:
        if path.count("/") <= _DEEPEST:
            _find(tree, path)
    for path, counts in (others or {}).items():
        if path.count("/") <= _DEEPEST:
            _find(tree, path).others = counts
    for path, count in images.items():
        if path.count("/") > _DEEPEST:
            raise UserError(f"{shortened(root, 120)}: folders lie more than {_DEEPEST} deep: {shortened(path, 120)}")
        node = tree
        node.total += count
        for name in path.split("/") if path else ():
            node = node.child(name)
            node.total += count
        node.images = count
    return _Reader(root, options, file_names).read(tree)


def _find(tree: _Folder, path: str) -> _Folder:
    for name in path.split("/") if path else ():
        tree = tree.child(name)
    return tree


def same_name(name: str) -> str:
    """The name as it is compared: in the composed normal form."""
    return unicodedata.normalize("NFC", name)


class _Reader:
    def __init__(self, root: str, options: DataOptions, file_names: FileNames) -> None:
        self.root, self.options, self.file_names = root, options, file_names
        self.named = {name for role in ROLES if (name := getattr(options, f"{role}_split")) is not None}
        if self._leaves_test_alone():
            self.named.discard(options.test_split)
        self.class_folders: str | None = options.class_folders
        self.notes: list[str] = []
        self.unused: list[str] = []

    def read(self, tree: _Folder) -> Layout:
        base = self._unwrap(tree)
        splits = self._splits_above(base)
        if splits is None and (mapping := self._splits_below(base)) is not None:
            return Layout(mapping, self.notes, sorted(self.unused))
        if splits is None:
            if self.named:
                self._assign(list(base.filled))  # says that there are no such splits
            self._refuse_variants(base)
            splits = {"train": base}
        bases = self._unwrap_splits(splits)
        for role, folder in bases.items():
            self._refuse_loose_images(folder, role)
            self._refuse_copies(folder)
            self._check_empty_classes(folder, role)
        mapping = self._map_classes(bases)
        self._refuse_foreign_split(mapping, bases)
        return Layout(mapping, self.notes, sorted(self.unused))

    def _data(self, folder: _Folder) -> str:
        """The flag that reads a folder alone."""
        return f"--data {shortened(f'{self.root}/{folder.path}', 150)}"

    # Folders around the data

    def _unwrap(self, folder: _Folder) -> _Folder:
        """The folder in which splits or classes lie side by side."""
        while not self.named & folder.children.keys():
            inner = self._only_child(folder)
            if inner is None:
                break
            self._note_loose_images(folder)
            self.notes.append(f"reads {shortened(inner.path)}/, which holds the data")
            folder = inner
        return folder

    def _note_loose_images(self, folder: _Folder) -> None:
        if folder.images:
            where = f"{shortened(folder.path)}/" if folder.path else "the data folder itself"
            self.notes.append(f"not used: {folder.images:,} image{_s(folder.images)} directly in {where}")

    def _only_child(self, folder: _Folder) -> _Folder | None:
        """The one folder that the data lie in, if `folder` adds nothing but what is no data."""
        filled = folder.filled
        inner = next(iter(filled.values()), None)
        if len(filled) > 1:
            inner = self._beside_masks(folder, filled)
        if inner is None or inner.images or split_words([inner.name]):
            return None
        beside = [child for child in folder.children.values() if child is not inner]
        lost = [child for child in beside if _forgotten(child.all_others()) and not _is_extra(child.name)]
        if lost and not is_container(inner.name):
            return None  # that may be a class whose images are not read
        self.unused += [child.path for child in beside if child.total]
        return inner

    def _beside_masks(self, folder: _Folder, filled: Mapping[str, _Folder]) -> _Folder | None:
        """`images` beside `masks`, `data` beside `docs`."""
        data = [child for name, child in filled.items() if not _is_extra(name)]
        if self.class_folders or len(data) != 1:
            return None
        if is_container(data[0].name) or is_variant(data[0].name):
            return data[0]
        if data[0].nested and not data[0].images and any(map(is_mask, filled)) and not split_word(data[0].name):
            raise UserError(
                f"{self._where(folder)}: {listed(list(filled), room=100)} may be images and masks or labels of them: "
                f"read the images with {self._data(data[0])}, or pass --class_folders top if each of them is a class"
            )
        return None

    # Splits

    def _splits_above(self, base: _Folder) -> dict[str, _Folder] | None:
        """Folders of splits with class folders in them, by role."""
        filled = base.filled
        by_name = split_words(filled)
        if self.named & base.children.keys():
            return self._take(base, by_name)
        if not by_name or (self.class_folders and not self._surely_splits(filled, by_name)):
            return None
        rest = [filled[name] for name in filled if name not in by_name]
        if not rest:
            return self._take(base, by_name)
        members = [filled[name] for name in by_name]
        roles = set(by_name.values())
        nested = any(not child.images for child in members)
        if not nested:
            if len(roles) > 1 and "train" in roles and len(rest) <= len(members):
                raise self._either(base, by_name, rest)
            if "train" not in roles and len(rest) > 1 and not self.class_folders:
                raise self._flat_split(base, by_name, rest)
            return None  # `train` beside `car` and `plane`, each full of images
        if self._surely_splits(filled, by_name):
            return self._take(base, by_name)
        raise self._either(base, by_name, rest)

    def _surely_splits(self, filled: Mapping[str, _Folder], by_name: Mapping[str, str]) -> bool:
        """Whether nothing else than splits is meant: what lies beside them is less, or the same classes again."""
        rest = [child for name, child in filled.items() if name not in by_name]
        train = [filled[name] for name, role in by_name.items() if role == "train"]
        if not train or train[0].images:
            return not rest and bool(train)
        if len(set(by_name.values())) > 1 and len(rest) <= len(by_name):
            return True
        known = {name for child in train for name in child.filled}
        return all(is_aside(child.name) or _share(child.filled.keys(), known) for child in rest)

    def _either(self, base: _Folder, by_name: Mapping[str, str], rest: list[_Folder]) -> UserError:
        splits, others = listed(sorted(by_name), room=80), listed([child.name for child in rest], room=80)
        train = next((name for name, role in by_name.items() if role == "train"), None)
        take = f"--train_split {shortened(train)}" if train else "--train_split NAME"
        return UserError(
            f"{self._where(base)}: {splits} may be splits, but {others} beside them are not: pass {take} if they are "
            "splits, or --class_folders top if every folder is a class"
        )

    def _flat_split(self, base: _Folder, by_name: Mapping[str, str], rest: list[_Folder]) -> UserError:
        """`test`, full of images, beside `cat` and `dog`: images without labels, or a class."""
        names = listed(sorted(by_name), room=60)
        return UserError(
            f"{self._where(base)}: {names} beside the class folders {listed([child.name for child in rest], room=80)} "
            f"may hold images without labels: move {names} out of the folder, or pass --class_folders top if it is a "
            "class"
        )

    def _where(self, folder: _Folder) -> str:
        return shortened(f"{self.root}/{folder.path}".rstrip("/"), 120)

    def _take(self, base: _Folder, by_name: Mapping[str, str]) -> dict[str, _Folder]:
        filled = base.filled
        roles = self._assign(list(filled), by_name)
        self._check_lost_splits(base)
        self.unused += [filled[name].path for name in filled if name not in roles.values()]
        self._note_loose_images(base)
        usual = {name for names in SPLIT_NAMES.values() for name in names}
        if any(name.lower() not in usual for name in roles.values()):
            self.notes.append("splits: " + ", ".join(f"{role} from {shortened(name)}/" for role, name in roles.items()))
        return {role: filled[name] for role, name in roles.items()}

    def _assign(self, names: list[str], by_name: Mapping[str, str] | None = None) -> dict[str, str]:
        """The folder for each role that there is one for."""
        by_name = by_name or {}
        roles: dict[str, str] = {}
        for role in ROLES:
            chosen: str | None = getattr(self.options, f"{role}_split")
            if role == "test" and self._leaves_test_alone():
                continue
            if chosen is not None:
                if chosen not in names:
                    raise UserError(
                        f"--{role}_split {shortened(chosen)}: {shortened(self.root, 120)} has no such split; it has "
                        f"{listed(names)}"
                    )
                if chosen in roles.values():
                    raise UserError(
                        f"--{role}_split {shortened(chosen)}: this split of {shortened(self.root, 120)} already has "
                        "another role"
                    )
                roles[role] = chosen
                continue
            free = [name for name in names if by_name.get(name) == role and name not in roles.values()]
            free = [name for name in free if name not in self.named]
            if found := self._usual(role, free):
                roles[role] = found
        if "train" not in roles:
            raise UserError(
                f"{shortened(self.root, 120)} has no split to train on, only {listed(names)}: name one with "
                "--train_split"
            )
        return roles

    def _usual(self, role: str, names: list[str]) -> str | None:
        if len(names) > 1 and role != "train":
            for usual in SPLIT_NAMES[role]:
                if exact := [name for name in names if name.lower() == usual]:
                    return exact[0]
        if len(names) > 1:
            raise UserError(
                f"{shortened(self.root, 120)} has {len(names)} folders for {role}, {listed(names)}: choose one with "
                f"--{role}_split"
            )
        return names[0] if names else None

    def _leaves_test_alone(self) -> bool:
        return (self.options.test_split or "").lower() == "none"

    def _check_lost_splits(self, base: _Folder) -> None:
        """Folders with the name of a split that hold no image."""
        for name, child in sorted(base.children.items()):
            word = split_word(name)
            if child.total or word is None or word.rest or (word.role == "test" and self._leaves_test_alone()):
                continue
            others = child.all_others()
            if _forgotten(others):
                raise UserError(
                    f"{self._where(child)} holds no image of a format that is read, only {counted(others)}: convert "
                    "them, or move the folder elsewhere"
                )
            self.notes.append(f"no images in {shortened(name)}/")

    def _splits_below(self, base: _Folder) -> dict[str, dict[str, str]] | None:
        """`bottle/train`, `bottle/test`: splits within class folders."""
        within = {name: self._innermost(child) for name, child in base.filled.items() if not child.images}
        inner = {name: self._inner_splits(child) for name, child in within.items()}
        found = {name: names for name, names in inner.items() if names}
        if not found or (self.class_folders and not self.named):
            return None
        if self.named and not any(self.named & set(names) for names in found.values()):
            return None
        self._check_empty_classes(base, "train")
        self._note_loose_images(base)
        first, names = next(iter(found.items()))
        deep = any(within[name].children[part].nested for name, parts in found.items() for part in parts)
        if len(found) == 1 and len(base.filled) > 1 and deep:
            raise UserError(
                f"{self._where(base)}: {shortened(first)}/ holds splits ({listed(sorted(names), room=60)}), the "
                f"folders beside it do not: read it with {self._data(base.children[first])}, or pass "
                "--class_folders top if every folder is a class"
            )
        if deep:
            raise UserError(
                f"{self._where(base)} holds {len(found)} data sets, {listed([f'{name}/' for name in found], room=90)}, "
                f"each with splits ({listed(sorted(names), room=60)}): choose one with "
                f"{self._data(base.children[first])}"
            )
        odd = [name for name in base.filled if sorted(inner.get(name, {})) != sorted(names)]
        if odd:
            raise UserError(
                f"{self._where(base)}: {shortened(first)}/ holds the splits {listed(sorted(names), room=60)}, but "
                f"{listed(odd, room=80)} does not: give every class the same splits, or pass --class_folders top to "
                "ignore them"
            )
        roles = self._assign(sorted(names), names)
        order = "class folders hold the splits: "
        self.notes.append(order + ", ".join(f"{role} from CLASS/{shortened(name)}/" for role, name in roles.items()))
        dropped = sorted(set(names) - set(roles.values()))
        self.unused += [f"CLASS/{name}" for name in dropped]
        return {
            role: {leaf.path: name for name in found for leaf in within[name].children[part].leaves()}
            for role, part in roles.items()
        }

    def _innermost(self, folder: _Folder) -> _Folder:
        """The folder within wrappers."""
        while len(folder.filled) == 1 and not folder.images:
            (inner,) = folder.filled.values()
            if inner.images or split_words([inner.name]):
                break
            folder = inner
        return folder

    def _inner_splits(self, folder: _Folder) -> dict[str, str]:
        """Roles of the folders in a class folder, if all of them are splits and there is one to train on."""
        names = [name for name in folder.filled if not is_mask(name)]
        by_name = split_words(names)
        named = self.named & set(names)
        if named:
            return {name: by_name.get(name, "") for name in names}
        whole = len(by_name) == len(names) and "train" in by_name.values() and len(set(by_name.values())) > 1
        return by_name if whole else {}

    # Folders that are not classes

    def _refuse_variants(self, base: _Folder) -> None:
        """Raise if the folders that lie side by side hold the same classes again, or no classes at all."""
        filled = base.filled
        if self.class_folders or len(filled) < 2:
            return
        names = list(filled)
        flat = all(not child.nested for child in filled.values())
        plain = [name for name in names if not is_mask(name)]
        direct = [name for name in plain if filled[name].images]
        if direct and len(plain) < len(names) and all(map(is_container, plain)):
            raise self._no_classes(base, f"{listed(names, room=100)} are images and masks or labels of them")
        if are_numbered_parts(names) or (flat and (all(map(is_resolution, names)) or _is_augmented(names))):
            why = f"{listed(names, room=100)} are names of parts or variants of a data set"
            same = _common_leaves(filled)
            raise self._several_variants(base, names, same) if same else self._no_classes(base, why)
        same = _common_leaves(filled)
        if not same:
            return
        if any(has_variant_word(name) or is_mask(name) or is_container(name) for name in names) or self._same_files(
            filled, same
        ):
            raise self._several_variants(base, names, same)

    def _no_classes(self, base: _Folder, why: str) -> UserError:
        return UserError(
            f"{self._where(base)}: no class folders: {why}. Put each image into a folder named after its class, name a "
            "table of labels with --data, or pass --class_folders top if these are classes"
        )

    def _several_variants(self, base: _Folder, names: list[str], same: list[str]) -> UserError:
        return UserError(
            f"{self._where(base)}: {listed(names, room=80)} hold the same class folders ({listed(same, room=60)}): "
            f"parts or variants of one data set? Choose one with {self._data(base.filled[names[0]])}, or splits with "
            f"--train_split {shortened(names[0], 30)} --validation_split {shortened(names[1], 30)}, or pass "
            "--class_folders top if they are the classes"
        )

    def _same_files(self, filled: Mapping[str, _Folder], same: list[str]) -> bool:
        """Whether the images have the same names in all of the folders, and not just because they are numbered."""
        for leaf in same[:3]:
            sets = [
                set().union(*(self.file_names(found.path) for found in child.leaves() if found.name == leaf))
                for child in filled.values()
                if not child.images
            ]
            if len(sets) < 2 or not sets[0] or any(one != sets[0] for one in sets) or _just_numbered(sets[0]):
                return False
        return True

    # Classes

    def _unwrap_splits(self, splits: Mapping[str, _Folder]) -> dict[str, _Folder]:
        """The folder of each split in which its class folders lie."""
        found = dict(splits)
        while (inner := self._only_child(found["train"]) or _doubled(found["train"], "train")) is not None:
            self.notes.append(
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

    def _refuse_loose_images(self, folder: _Folder, role: str) -> None:
        """Raise if images lie in no class folder."""
        child = next(iter(folder.filled.values()), None)
        alone = child is not None and len(folder.filled) == 1 and not child.nested and not self.class_folders
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
            f"{self._where(folder)}: {folder.images:,} {lie} directly in it, in no class folder"
            f"{self._example(folder)}: {advice}"
        )

    def _refuse_copies(self, folder: _Folder) -> None:
        """Raise if a folder among the classes holds the same classes again."""
        filled = folder.filled
        for name, child in filled.items():
            inner = child.filled.keys() - {name}
            if not self.class_folders and inner and len(filled) > 1 and 2 * len(inner & filled.keys()) >= len(inner):
                raise UserError(
                    f"{self._where(child)} holds folders of the same names as those beside it "
                    f"({listed(sorted(inner & filled.keys()), room=80)}): a copy? Move it elsewhere, read it alone "
                    f"with {self._data(child)}, or pass --class_folders top if it is a class"
                )

    def _example(self, folder: _Folder) -> str:
        names = sorted(self.file_names(folder.path))
        return f", for example {shortened(names[0])}" if names else ""

    def _check_empty_classes(self, base: _Folder, role: str) -> None:
        """Class folders without an image that is read: they would vanish."""
        empty, documents = [], []
        for name, child in sorted(base.children.items()):
            if child.total:
                continue
            others = child.all_others()
            if _forgotten(others) and not _is_extra(name):
                raise UserError(
                    f"{self._where(child)} holds no image of a format that is read, only {counted(others)}, and would "
                    "be no class: convert the files to JPEG or PNG, or move the folder out of the data"
                )
            if others:
                documents.append(f"{shortened(name)} ({counted(others)})")
            elif role == "train":
                empty.append(name)
        if empty:
            self.notes.append(f"{len(empty):,} empty folder{_s(len(empty))}, no class: {listed(empty, room=120)}")
        if documents:
            self.notes.append(f"no images in {listed(documents, room=140)}: no class")

    def _map_classes(self, bases: Mapping[str, _Folder]) -> dict[str, dict[str, str]]:
        """For each split the class of every folder that holds images."""
        leaves = {role: list(self._class_leaves(base)) for role, base in bases.items()}
        tops = {role: {leaf.path: _below(bases[role], leaf).split("/")[0] for leaf in leaves[role]} for role in bases}
        nested = [leaf for leaf in leaves["train"] if "/" in _below(bases["train"], leaf)]
        if not nested:
            return tops
        names = {role: {leaf.path: _below(bases[role], leaf) for leaf in leaves[role]} for role in bases}
        by_leaf = _leaf_classes(names)
        self._judge_nesting(bases["train"], tops["train"], by_leaf["train"])
        return by_leaf if self.class_folders == "leaf" else tops

    def _class_leaves(self, base: _Folder) -> Iterator[_Folder]:
        """The folders with images, without masks beside the images of a class."""
        for _, top in sorted(base.filled.items()):
            yield from self._without_masks(top)

    def _without_masks(self, folder: _Folder) -> Iterator[_Folder]:
        masks = [name for name in folder.filled if is_mask(name)]
        pictures = [name for name in folder.filled if name not in masks]
        drop = set(masks) if masks and not self.class_folders else set()
        if drop and not folder.images and not all(map(is_container, pictures)):
            drop = set()
        if drop and not folder.images and not pictures:
            drop = set()
        self.unused += [folder.children[name].path for name in sorted(drop)]
        if folder.images:
            yield folder
        for name, child in folder.filled.items():
            if name not in drop:
                yield from self._without_masks(child)

    def _judge_nesting(self, base: _Folder, tops: Mapping[str, str], leaves: Mapping[str, str]) -> None:
        """Say that class folders hold folders; raise if it cannot be told which of them are the classes."""
        top_names, leaf_names = sorted(set(tops.values())), sorted(set(leaves.values()))
        top_text = f"{len(top_names):,} top folder{_s(len(top_names))} ({listed(top_names, room=60)})"
        leaf_text = f"{len(leaf_names):,} leaf folders ({listed(leaf_names, room=80)})"
        if self.class_folders == "leaf":
            paths = [name for name in leaf_names if "/" in name]
            also = f"; the same name lies in several folders, so by path: {listed(paths, room=80)}" if paths else ""
            self.notes.append(f"--class_folders leaf: classes are the {leaf_text}{also}")
            return
        direct = any(child.images for child in base.filled.values())
        shared = bool(_shared_leaves(tops))
        if self.class_folders is None and not direct and not shared and len(leaf_names) > len(top_names):
            raise UserError(
                f"{self._where(base)}: class folders hold folders: {top_text} hold {leaf_text}. Pass --class_folders "
                "top to make the former the classes, --class_folders leaf for the latter"
            )
        self.notes.append(
            f"class folders hold folders: classes are the {top_text}; --class_folders leaf takes {leaf_text}"
        )

    def _refuse_foreign_split(self, mapping: Mapping[str, dict[str, str]], bases: Mapping[str, _Folder]) -> None:
        """Raise if a split has no class of the training split: it is not labelled, or not of this data set."""
        known = {same_name(name) for name in mapping["train"].values()}
        for role, classes in mapping.items():
            names = sorted(set(classes.values()))
            if known & {same_name(name) for name in names}:
                continue
            advice = "; if it is not labelled pass --test_split none" if role == "test" else "; or read train alone"
            raise UserError(
                f"{self._where(bases[role])}: {role} has no class of train ({listed(sorted(known), room=80)}), only "
                f"{listed(names, room=80)}: give both the same class folders{advice}"
            )


def _is_extra(name: str) -> bool:
    """Whether a folder of this name holds what belongs to images, and none to classify."""
    return is_mask(name) or is_aside(name)


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _doubled(folder: _Folder, role: str) -> _Folder | None:
    """The only folder in a split, if it just repeats the name of the split."""
    only = next(iter(folder.filled.values()), None)
    if only is None or folder.images or only.images or len(folder.filled) > 1:
        return None
    return only if only.name == folder.name or split_words([only.name]).get(only.name) == role else None


def _below(base: _Folder, folder: _Folder) -> str:
    return folder.path[len(base.path) + 1 :] if base.path else folder.path


def _forgotten(others: Mapping[str, int]) -> bool:
    """Whether some files may be images in a format that is not read. One file without a suffix is a LICENSE."""
    return any(suffix not in _NOT_IMAGES and (suffix or count > 1) for suffix, count in others.items())


def _share(names: Iterable[str], known: set[str]) -> bool:
    names = list(names)
    return bool(names) and 2 * len(known.intersection(names)) >= len(names)


def _common_leaves(filled: Mapping[str, _Folder]) -> list[str]:
    """Names of leaf folders that most of the folders have, if these hold no images themselves; else none."""
    nested = [child for child in filled.values() if not child.images]
    if len(nested) < 2 or len(nested) < len(filled):
        return []
    leaves = [{leaf.name for leaf in child.leaves()} for child in nested]
    first = max(leaves, key=len)
    if not all(2 * len(names & first) >= len(names) for names in leaves):
        return []
    return sorted(name for name in first if sum(name in names for names in leaves) > 1)


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
    paths = {same_name(below): below for folders in names.values() for below in folders.values()}
    counts = Counter(below.rpartition("/")[2] for below in paths)
    made: dict[str, dict[str, str]] = {}
    for role, folders in names.items():
        made[role] = {}
        for path, below in folders.items():
            last = below.rpartition("/")[2]
            made[role][path] = last if counts[same_name(last)] == 1 else below
    return made


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
