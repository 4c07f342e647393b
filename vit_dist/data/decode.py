"""The one way from bytes to RGB pixels, for training, evaluation and prediction alike."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import IcoImagePlugin, Image, ImageColor, TiffImagePlugin, UnidentifiedImageError

from vit_dist.errors import UserError

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

RULES_VERSION = 4  # part of the key of remembered outcomes: count up when a rule changes

# No PostScript or PDF: they run programs. TGA comes last, it has no signature to tell it by.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")

MOST_FILE_BYTES = 2 * 2**30  # that an image file may have
HIGHEST_LEVEL = "vit_dist_highest_level"  # in `info` of an image that was 16-bit gray: its brightest level

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_POINTERS = {  # what stands for a file that was not downloaded
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the image: run `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer, not the image: run `git annex get`",
}
_STRIP_PIXELS = 4_000_000  # at a time, where a conversion needs several copies
_SAMPLES_PER_PIXEL = 277  # tag of TIFF
_REDUCTIONS = (8, 4, 2)  # of each side, by libjpeg while it decodes
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THEIR_SIDE = (5, 6, 7, 8)
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # an entry of `warnings.filters`


class BadImage(Exception):
    """An image that cannot be used, and why; `missing` if there is no such file."""

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.missing = reason, missing


@dataclass(frozen=True)
class DecodeRules:
    """Which images are refused (sizes in pixels) and the colour (0 to 255) behind transparent ones."""

    max_image_pixels: int = 120_000_000
    min_image_side: int = 2
    background: tuple[int, int, int] = (255, 255, 255)

    @classmethod
    def from_options(cls, options: DataOptions) -> DecodeRules:
        """The rules that the options ask for; raises `UserError` for a colour or a size that is none."""
        for name in ("max_image_pixels", "min_image_side"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} {getattr(options, name)}: a positive number of pixels is needed")
        try:
            red, green, blue = ImageColor.getcolor(options.image_background, "RGB")  # type: ignore[misc]
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"--image_background {options.image_background}: not a colour; a name such as white, or #rrggbb"
            ) from error
        return cls(options.max_image_pixels, options.min_image_side, (red, green, blue))


_SWAPS_SIDES = (5, 6, 7, 8)  # orientations of EXIF that turn by 90 degrees


def decode(image: Mapping[str, Any] | bytes | str | os.PathLike[str], rules: DecodeRules) -> Image.Image:
    """RGB, 8 bit, upright, of `{"bytes", "path"}` (bytes win), a file's bytes, or a path.

    The first frame of animations; transparent pixels on the background; 16-bit gray scaled, not clipped. Raises
    `BadImage` for whatever is not a whole image within the rules.
    """
    return decode_downscaled(image, rules, lambda width, height: 1)[0]


def decode_downscaled(
    image: Mapping[str, Any] | bytes | str | os.PathLike[str], rules: DecodeRules, spare: Callable[[int, int], float]
) -> tuple[Image.Image, tuple[int, int]]:
    """The same, but sides may be 2, 4 or 8 times shorter, and no more than `spare(width, height)` times: several times
    faster for JPEGs, the only ones that are reduced. Also the upright size (width, height) before.

    All of the file is read, and what is refused is the same; rules about sizes are about the size before.
    """
    data = encoded_bytes(image)
    _ignore_pillow_warnings()
    _allow_pixels(rules.max_image_pixels)
    try:
        _check_icon(data, rules)
        with Image.open(io.BytesIO(data), formats=_formats()) as opened:
            _check_size(opened.size, rules)
            before = _reduce(opened, spare)
            opened.load()
            rgb = _to_rgb(opened, rules.background)
            method = _TRANSPOSE.get(_orientation(opened))
            upright = rgb if method is None else rgb.transpose(method)
            return upright, before or upright.size
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {rules.max_image_pixels:,} pixels (max_image_pixels)") from error
    except UnidentifiedImageError as error:
        raise BadImage(_unidentified(data)) from error
    except Exception as error:  # Pillow's readers raise almost anything for broken files
        reason = " ".join(str(error).split())[:200]
        raise BadImage(f"{reason or 'does not decode'} ({type(error).__name__})") from error


def stored_size(image: Mapping[str, Any] | bytes | str | os.PathLike[str]) -> tuple[int, int] | None:
    """(width, height) in pixels of the upright image, by the header; None if it cannot be read."""
    _ignore_pillow_warnings()
    try:
        data, path = _parts(image)
        with (
            io.BytesIO(data) if data is not None else _open_regular(path) as file,
            Image.open(file, formats=_formats()) as opened,
        ):
            width, height = opened.size
            return (height, width) if _orientation(opened) in _SWAPS_SIDES else (width, height)
    except Exception:  # as above; decoding says what it is
        return None


def encoded_bytes(image: Mapping[str, Any] | bytes | str | os.PathLike[str] | None) -> bytes:
    """The bytes of an image's file; raises `BadImage` if they cannot be had."""
    data, path = _parts(image)
    if data is None:
        try:
            with _open_regular(path) as file:
                data = file.read(os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise _unreadable(error, path) from error
    if not data:
        raise BadImage("empty file")
    return data


def _parts(image: Mapping[str, Any] | bytes | str | os.PathLike[str] | None) -> tuple[Any, Any]:
    """Bytes and path, one of which may be None."""
    path: Any = None
    data: Any = image
    if image is None or isinstance(image, Mapping):
        data, path = (image or {}).get("bytes"), (image or {}).get("path")
    elif isinstance(image, (str, os.PathLike)):
        data, path = None, image
    if data is None and path is None:
        raise BadImage("no image: neither bytes nor a path")
    return data, path


def _open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """The file, if it is one: a pipe or a device would never end."""
    # Opening a pipe for reading waits for its writer, unless it is told not to.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe, device or socket"
            raise BadImage(f"{kind}, not a file: {os.fspath(path)}")
        if found.st_size > MOST_FILE_BYTES:
            raise BadImage(f"a file of {found.st_size:,} bytes, more than {MOST_FILE_BYTES:,}: {os.fspath(path)}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _unreadable(error: Exception, path: str | os.PathLike[str]) -> BadImage:
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return BadImage(f"{getattr(error, 'strerror', None) or error}: {os.fspath(path)}", missing=missing)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()  # a format that this build of Pillow lacks must not be asked for
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _ignore_pillow_warnings() -> None:
    """Pillow warns about metadata that we do not use. (`catch_warnings` would not do: it is not thread-safe.)"""
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", category=Warning, module=_QUIET[3].pattern)


def _allow_pixels(num_pixels: int) -> None:
    """Pillow has a limit of its own, for the whole process: it is raised where ours is higher, never lowered."""
    if Image.MAX_IMAGE_PIXELS is not None and num_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = num_pixels


def _check_icon(data: bytes, rules: DecodeRules) -> None:
    """Pillow decodes an icon as soon as it opens it, in the size of the picture inside, which may be any."""
    if not data.startswith(b"\0\0\1\0"):
        return
    try:
        first = IcoImagePlugin.IcoFile(io.BytesIO(data)).entry[0]
        with Image.open(io.BytesIO(data[first.offset :]), formats=("PNG", "DIB")) as inside:
            width, height = inside.size
    except (SyntaxError, LookupError, struct.error, UnidentifiedImageError):
        return  # no icon: it will not open
    _check_size((width, height if inside.format == "PNG" else height // 2), rules)  # a bitmap's mask lies below it


def _check_size(size: tuple[int, int], rules: DecodeRules) -> None:
    width, height = size
    if width * height > rules.max_image_pixels:
        raise BadImage(f"{width}x{height} is more than {rules.max_image_pixels:,} pixels (max_image_pixels)")
    if min(width, height) < rules.min_image_side:
        raise BadImage(f"{width}x{height}: a side of fewer than {rules.min_image_side} pixels (min_image_side)")


def _reduce(opened: Image.Image, spare: Callable[[int, int], float]) -> tuple[int, int] | None:
    """Have a JPEG decoded at a part of its size, as far as it may be; its upright size before, None of other images."""
    if opened.format not in ("JPEG", "MPO"):
        return None
    width, height = opened.size
    before = (height, width) if _orientation(opened) in _ON_THEIR_SIDE else (width, height)
    most = spare(*before)
    by = next((by for by in _REDUCTIONS if by <= most), 1)
    if by > 1:
        opened.draft(None, (max(1, width // by), max(1, height // by)))  # at least that large: sides are rounded up
    return before


def _orientation(opened: Image.Image) -> int:
    """As the EXIF data say; if they cannot be read they say nothing."""
    try:
        value = opened.getexif().get(_ORIENTATION_TAG)
        return int(value) if value in _TRANSPOSE else 1
    except MemoryError:
        raise
    except Exception:
        return 1


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F":
        raise BadImage("floating-point pixels have no agreed range: convert to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _gray8(image)
    elif image.mode == "LAB":
        return _lab_to_rgb(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    return _on_background(image, background)


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A strip at a time: whole, it would take four copies of 4 bytes per pixel."""
    flat = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        behind = Image.new("RGBA", strip.size, (*background, 255))
        flat.paste(Image.alpha_composite(behind, strip).convert("RGB"), (0, top))
    flat.info.update(image.info)
    return flat


def _gray8(image: Image.Image) -> Image.Image:
    """8-bit gray out of 16-bit gray, with an alpha channel if one level stands for transparent."""
    if image.mode == "I" and image.format == "TIFF":
        raise BadImage("32-bit or signed integer pixels have no agreed range: convert to 8 or 16 bits")
    bits, transparent = _declared_bits(image), image.info.get("transparency")
    table = _gray_levels(bits)
    gray = np.empty((image.height, image.width), np.uint8)
    alpha = np.empty_like(gray) if isinstance(transparent, int) else None
    rows, highest = max(1, _STRIP_PIXELS // image.width), 0
    for top in range(0, image.height, rows):  # a strip at a time: NumPy's copies of all would take 2 GB
        levels = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if levels.min() < 0 or levels.max() > 65535:
            raise BadImage("integer pixels beyond 16 bits: convert to 8 or 16 bits")
        highest = max(highest, int(levels.max()))
        gray[top : top + rows] = table[levels]
        if alpha is not None:
            alpha[top : top + rows] = np.where(levels == transparent, 0, 255)
    made = Image.fromarray(gray)
    if alpha is not None:
        made.putalpha(Image.fromarray(alpha))
    if bits == 16:
        made.info[HIGHEST_LEVEL] = highest
    return made


@lru_cache(maxsize=9)
def _gray_levels(bits: int) -> np.ndarray:
    """The 8-bit level of each 16-bit one, uint8 (65536,); levels above what `bits` can hold are white."""
    most = 2**bits - 1
    levels = np.arange(65536, dtype=np.uint32).clip(0, most)
    return ((levels * 255 + most // 2) // most).astype(np.uint8)


def _declared_bits(image: Image.Image) -> int:
    """16, but for TIFF files with, say, 12-bit samples (other readers scale to 16 bits themselves)."""
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    bits = tags.get(258, (16,)) if tags is not None else (16,)  # 258: BitsPerSample
    return min(16, max(8, int(bits[0] if isinstance(bits, tuple) else bits)))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image, _lab_transform())
    if converted is None:
        raise BadImage("LAB colours do not convert")
    return converted


@lru_cache(maxsize=1)
def _lab_transform() -> Any:
    from PIL import ImageCms

    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _unidentified(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "HEIC/HEIF is not read: convert to JPEG"
    for pointer, reason in _POINTERS.items():
        if data.startswith(pointer):
            return reason
    if bands := _tiff_bands(data):
        return f"a TIFF of {bands} bands: convert to RGB, three of them"
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "not an image: HTML or XML"
    return "not an image of a known format, or its header is broken"


def _tiff_bands(data: bytes) -> int:
    """How many bands a TIFF has if there are more than four, which Pillow does not read; else 0."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return 0
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        bands = int(directory.get(_SAMPLES_PER_PIXEL, 1))
    except Exception:  # as above
        return 0
    return bands if bands > 4 else 0
