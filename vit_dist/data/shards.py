"""Whether the images of WebDataset shards have labels, by the names of a shard's first members."""

from __future__ import annotations

import itertools
import tarfile
from pathlib import Path, PurePosixPath

from vit_dist.data.index import IMAGE_EXTENSIONS
from vit_dist.errors import UserError
from vit_dist.listing import shortened

_MEMBERS = 1000  # that are looked at


def require_labels(path: Path) -> None:
    """Raise `UserError` if a tar holds images and nothing beside them. A file that is no tar is not judged here."""
    try:
        with tarfile.open(path) as archive:
            names = [member.name for member in itertools.islice(archive, _MEMBERS) if member.isfile()]
    except (OSError, tarfile.TarError):
        return
    suffixes = {PurePosixPath(name).name.partition(".")[2].lower().rpartition(".")[2] for name in names}
    if names and suffixes <= IMAGE_EXTENSIONS:
        raise UserError(
            f"{shortened(str(path), 200)} holds images without labels ({shortened(names[0])}, ...): shards need a .cls "
            "or .json file beside each image; if its folders are the classes, unpack it and pass --data FOLDER"
        )
