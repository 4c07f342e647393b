"""What the steps of one reading share: the user's choices, and what was decided so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vit_dist.data.columns import ROLES
from vit_dist.data.layout.tree import Folder
from vit_dist.errors import UserError
from vit_dist.listing import shortened

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

_LONGEST_MESSAGE = 480  # characters
FileNames = Callable[[str], set[str]]  # of the images that lie directly in a folder


class Reading:
    """The user's choices, the notes for the user, and the folders with images that are left out."""

    def __init__(self, root: str, options: DataOptions, file_names: FileNames) -> None:
        self.root, self.options, self.file_names = root, options, file_names
        self.named = {name for role in ROLES if (name := getattr(options, f"{role}_split")) is not None}
        if self.leaves_test_alone():
            self.named.discard(options.test_split)
        self.class_folders: str | None = options.class_folders
        self.notes: list[str] = []
        self.unused: list[str] = []

    def leaves_test_alone(self) -> bool:
        """Whether the user wants no test split."""
        return (self.options.test_split or "").lower() == "none"

    def where(self, folder: Folder) -> str:
        """The path of a folder in messages."""
        return shortened(f"{self.root}/{folder.path}".rstrip("/"), 80)

    def data_flag(self, folder: Folder) -> str:
        """The flag that reads a folder alone."""
        return f"--data {shortened(f'{self.root}/{folder.path}', 110)}"

    def example(self, folder: Folder) -> str:
        """The first image of a folder, as a part of a sentence."""
        names = sorted(self.file_names(folder.path))
        return f", for example {shortened(names[0])}" if names else ""

    def note_loose_images(self, folder: Folder) -> None:
        """Say that images which lie directly in a folder are not used."""
        if folder.images:
            where = f"{shortened(folder.path)}/" if folder.path else "the data folder itself"
            self.notes.append(f"not used: {folder.images:,} image{plural(folder.images)} directly in {where}")


def plural(count: int) -> str:
    """The ending of a noun."""
    return "" if count == 1 else "s"


def refusal(message: Callable[[int], str]) -> UserError:
    """The message with names as long as fit into it; `message` takes the characters of one name."""
    texts = [message(longest) for longest in (60, 30, 18)]
    return UserError(next((text for text in texts if len(text) < _LONGEST_MESSAGE), texts[-1]))
