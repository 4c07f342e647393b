"""Build the image cache of a recipe ahead of training, see all of them, or remove one.

vit-dist cache configs/recipes/photos.yaml       # for --image_source cache; on a login node, say
vit-dist cache --list                            # all in the cache folder, the last used first
vit-dist cache --remove KEY
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

from vit_dist import console, entry
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for what the user can mend."""

    def body() -> int:
        asked, rest = _parser().parse_known_args(argv)
        config = load_config(rest)
        if asked.list:
            show(config.data.cache_dir)
        elif asked.remove is not None:
            remove(config.data.cache_dir, asked.remove)
        else:
            build(config)
        return 0

    return entry.run(body, "what was begun is made anew by the same command")


def _parser() -> Parser:
    parser = Parser(
        prog="vit-dist cache",
        usage="vit-dist cache [RECIPE] [--list | --remove KEY] [--flag value ...]",
        description=f"{__doc__}\nAll other flags are those of `vit-dist train`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--list", action="store_true", help="key, images, pixels, bytes, last use and data of each")
    one.add_argument("--remove", metavar="KEY", help="one that --list shows; the first characters are enough")
    return parser


def build(config: Config) -> None:
    """The caches of all splits, and a line about each. Raises UserError for what is wrong with the data or the disk."""
    import torch

    from vit_dist.data.image_cache import CachedDataset, about
    from vit_dist.data.pipeline import build_data
    from vit_dist.data.resident import place_images

    data = build_data(config.data, config.model, config.data_seed, console.progress)
    told = partial(console.progress, doing="caching images")
    placed, _, _ = place_images(data, "cache", torch.device("cpu"), 0, cache_dir=config.data.cache_dir, progress=told)
    for split, dataset in (("train", placed.train), ("validation", placed.validation), ("test", placed.test)):
        if isinstance(dataset, CachedDataset) and (contents := about(dataset.folder)) is not None:
            console.say(f"{split:<11}{len(dataset):,} images, {contents.bytes:,} bytes, {dataset.folder}")
    console.say("train from it: --image_source cache")


def show(cache_dir: str | None) -> None:
    from vit_dist.data.image_cache import cache_folder, caches

    found = caches(cache_dir)
    rows = [("key", "images", "input", "shortest", "bytes", "last used (UTC)", "data")]
    for key, (_, has, used) in found.items():
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(used))
        rows.append((key, f"{has.images:,}", str(has.side), str(has.shortest), f"{has.bytes:,}", when, has.data))
    total = sum(has.bytes for _, has, _ in found.values())
    where = cache_folder(cache_dir)
    if found:
        console.say(*console.aligned(rows), f"{total:,} bytes in {where}")
    else:
        console.say(f"there is no image cache in {where}")


def remove(cache_dir: str | None, key: str) -> None:
    """Raises UserError unless exactly one key begins so."""
    from vit_dist.data.image_cache import caches, remove_cache

    found = [(folder, has) for name, (folder, has, _) in caches(cache_dir).items() if key and name.startswith(key)]
    if len(found) != 1:
        raise UserError(
            f"--remove {key}: {len(found)} image caches have a key that begins so; see vit-dist cache --list"
        )
    folder, has = found[0]
    remove_cache(folder)
    console.say(f"{folder}: removed, {has.bytes:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
