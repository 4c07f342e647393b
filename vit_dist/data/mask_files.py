"""Masks that lie beside their images in one folder: `x.png` and `x_mask.png`."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_dist.data.index import IMAGE_EXTENSIONS, FolderIndex
from vit_dist.listing import shortened

_ENDING = r"[-_ .](masks?|gt|groundtruth|ground_truth|seg|segmentation|segmented|label|labels|annotation|depth)"
_MASK = rf"(?i){_ENDING}([-_ ]?\d+)?[.]({'|'.join(sorted(map(re.escape, IMAGE_EXTENSIONS)))})$"


def without_masks(index: FolderIndex) -> tuple[FolderIndex, str | None]:
    """The images that are no masks of others in their folder, and a note if there are masks.

    One pass of Arrow over the paths: 1.3 million take 0.2 s, or 1 s if half of them are masks.
    """
    likely = pc.match_substring_regex(index.images, _MASK)
    if not pc.any(likely).as_py():
        return index, None
    stems = _without_suffix(index.images.filter(pc.invert(likely)))
    bases = pc.replace_substring_regex(index.images.filter(likely), _MASK, "")
    rows = np.flatnonzero(likely)[pc.is_in(bases, value_set=stems).to_numpy(zero_copy_only=False)]
    if not len(rows):
        return index, None
    keep = np.ones(len(index.images), bool)
    keep[rows] = False
    example = shortened(index.images[rows[0]].as_py(), 100)
    plural = "s" if len(rows) > 1 else ""
    note = f"not used: {len(rows):,} mask{plural} beside their images, for example {example}"
    return replace(index, images=index.images.filter(pa.array(keep)), folder_of=index.folder_of[keep]), note


def _without_suffix(paths: pa.Array) -> pa.Array:
    parts = pc.split_pattern(paths, ".", max_splits=1, reverse=True)  # every image has a suffix
    return parts.flatten().take(pa.array(parts.offsets.to_numpy()[:-1] - parts.offsets[0].as_py()))
