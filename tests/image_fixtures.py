"""Small images and data folders for the tests of the data layer."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
from PIL import Image

from vit_dist.options import DataOptions

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(colour: tuple[int, int, int] | int = RED, size: tuple[int, int] = (4, 4)) -> bytes:
    """A file of one colour."""
    return encoded(Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour))


def noise(seed: int = 0, size: tuple[int, int] = (16, 12)) -> Image.Image:
    """Pixels that no two seeds share."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def options(data: Any, cache: Path, **values: Any) -> DataOptions:
    """Data options that keep their caches below `cache`."""
    return DataOptions(data=str(data), cache_dir=str(cache), **values)


def image_folder(root: Path, counts: dict[str, int]) -> Path:
    """`counts[folder]` PNG files in each folder below `root`, every one different."""
    number = 0
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (root / folder / f"{index}.png").write_bytes(png((number % 256, number // 256, 7)))
            number += 1
    return root


def run_python(code: str, *values: Any, data_options: DataOptions, env: dict[str, str] | None = None) -> Popen[str]:
    """Start `code` in a process of its own, with `options` (quicker to make than to import) and `sys.argv[2:]`."""
    head = "import json, sys, types; options = types.SimpleNamespace(**json.loads(sys.argv[1]))\n"
    command = [sys.executable, "-c", head + code, json.dumps(asdict(data_options)), *map(str, values)]
    cwd = Path(__file__).resolve().parent.parent
    return Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, cwd=cwd, env={**os.environ, **(env or {})})


def settle(root: Path) -> None:
    """Date all directories back, as if nobody had touched them for an hour."""
    for folder, _, _ in os.walk(root):
        stat = os.stat(folder)
        os.utime(folder, ns=(stat.st_atime_ns, stat.st_mtime_ns - 3600 * 10**9))


def shared_data(name: str) -> Path | None:
    """The folder `shared/data/<name>` beside or above the checkout, if there is one."""
    for parent in Path(__file__).resolve().parents:
        if (parent / "shared" / "data" / name).is_dir():
            return parent / "shared" / "data" / name
    return None
