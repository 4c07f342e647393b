"""The folders of a data set with the numbers of their files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from vit_dist.errors import UserError
from vit_dist.listing import shortened

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


class Folder:
    """A folder with what lies in it."""

    __slots__ = ("children", "images", "name", "others", "path", "total")

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = path.rpartition("/")[2]
        self.children: dict[str, Folder] = {}
        self.images = 0  # directly in it
        self.total = 0  # in it and below
        self.others: Mapping[str, int] = {}  # files directly in it that are no images, by suffix

    def child(self, name: str) -> Folder:
        if name not in self.children:
            self.children[name] = Folder(f"{self.path}/{name}" if self.path else name)
        return self.children[name]

    @property
    def filled(self) -> dict[str, Folder]:
        """The folders in it that hold images, in them or below."""
        return {name: child for name, child in sorted(self.children.items()) if child.total}

    @property
    def nested(self) -> bool:
        """Whether folders in it hold images."""
        return self.total > self.images

    def leaves(self) -> Iterator[Folder]:
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


def folder_tree(
    root: str, images: Mapping[str, int], directories: Iterable[str], others: Mapping[str, Mapping[str, int]]
) -> Folder:
    """The root of the tree; raises `UserError` if images lie too deep.

    Args:
        root: The folder, as the user names it.
        images: Number of image files that lie directly in each folder, by path relative to `root`.
        directories: All folders, also those without images.
        others: Numbers of files by suffix that are no images, by folder.
    """
    tree = Folder("")
    for path in directories:
        if path.count("/") <= _DEEPEST:
            _find(tree, path)
    for path, counts in others.items():
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
    return tree


def _find(tree: Folder, path: str) -> Folder:
    for name in path.split("/") if path else ():
        tree = tree.child(name)
    return tree


def below(base: Folder, folder: Folder) -> str:
    """The path of a folder relative to one above it."""
    return folder.path[len(base.path) + 1 :] if base.path else folder.path


def forgotten(others: Mapping[str, int]) -> bool:
    """Whether some files may be images in a format that is not read. One file without a suffix is a LICENSE."""
    return any(suffix not in _NOT_IMAGES and (suffix or count > 1) for suffix, count in others.items())
