"""Every kind of image either decodes to the right pixels or is refused with a reason."""

from __future__ import annotations

import csv
import io
import pickle
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_fixtures import BLUE, GREEN, RED, encoded, noise, options, png, shared_data
from PIL import Image, ImageFile

from vit_dist.data.decode import BadImage, DecodeRules, decode, decode_downscaled
from vit_dist.errors import UserError

RULES = DecodeRules()


def pixels(data: bytes, rules: DecodeRules = RULES) -> np.ndarray:
    image = decode(data, rules)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data: object, rules: DecodeRules = RULES) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, rules)  # type: ignore[arg-type]
    assert caught.value.reason
    return caught.value.reason


def png_chunks(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG file written by hand, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def gray16(levels: np.ndarray, *extra: tuple[bytes, bytes]) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return png_chunks(levels.shape[1], levels.shape[0], 16, 0, rows, *extra)


def test_dict_bytes_and_path_give_the_same_pixels(tmp_path):
    data = encoded(noise())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    expected = np.asarray(noise())
    for image in (data, path, str(path), {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}):
        assert (np.asarray(decode(image, RULES)) == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_undone(orientation, format):
    upright = Image.new("RGB", (32, 16), RED)  # one colour per corner
    upright.paste(GREEN, (16, 0, 32, 8))
    upright.paste(BLUE, (0, 8, 16, 16))
    upright.paste((255, 255, 255), (16, 8, 32, 16))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # what turns upright into stored
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {} if format in ("PNG", "TIFF") else {"quality": 95}
    turned = decode(encoded(stored, format, exif=exif, **quality), RULES)
    assert turned.size == (32, 16)
    corners = [turned.getpixel(point) for point in ((4, 2), (27, 2), (4, 13), (27, 13))]
    assert np.abs(np.array(corners, int) - [RED, GREEN, BLUE, (255, 255, 255)]).max() < 16


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("most", [1, 1.9, 2, 3.9, 4.5, 8, 100])
def test_jpegs_are_reduced_as_far_as_they_may_be(orientation, most):
    """`spare` is asked about the upright size; a reduced image is the whole one, resized, within a few levels."""
    exif, asked = Image.Exif(), []
    exif[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)).resize((203, 117), 3)
    data = encoded(picture, "JPEG", quality=95, subsampling=0, exif=exif)
    reduced, size = decode_downscaled(data, RULES, lambda *size: asked.append(size) or most)
    assert asked == [size] and size == ((117, 203) if orientation > 4 else (203, 117)) == decode(data, RULES).size
    by = next(by for by in (8, 4, 2, 1) if by <= most)
    assert reduced.size == tuple(-(-side // by) for side in size)
    expected = decode(data, RULES).resize(reduced.size, Image.Resampling.BOX)
    difference = np.abs(np.asarray(reduced).astype(int) - np.asarray(expected))
    assert difference.mean() < 10  # sides are rounded up; turned wrongly it is 50


def test_reduced_decoding_is_for_jpegs_and_judges_the_full_size():
    for data in (encoded(noise(), "PNG"), encoded(noise(), "WEBP"), encoded(noise(), "TIFF", compression="jpeg")):
        assert decode_downscaled(data, RULES, lambda width, height: 8)[0].size == noise().size
    small = encoded(noise(), "JPEG")
    assert decode_downscaled(small, DecodeRules(min_image_side=12), lambda width, height: 8)[0].size == (2, 2)
    for rules in (DecodeRules(min_image_side=13), DecodeRules(max_image_pixels=191)):
        with pytest.raises(BadImage, match="16x12"):
            decode_downscaled(small, rules, lambda width, height: 8)


def outcome(data: bytes, by: int) -> str:
    try:
        decode_downscaled(data, RULES, lambda width, height: by)
        return "decodes"
    except BadImage as error:
        return error.reason


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_damage_is_found_at_an_eighth_of_the_size(progressive):
    """Truncated, cut, overwritten in the header or anywhere: the same files are refused, for the same reasons."""
    picture = noise(size=(24, 18)).resize((240, 180), Image.Resampling.BICUBIC)
    whole, random = encoded(picture, "JPEG", progressive=progressive), np.random.default_rng(0)
    found = []
    for number in range(300):
        data, place = bytearray(whole), int(random.integers(len(whole)))
        if number % 3 == 0:
            del data[place:]
        elif number % 3 == 1:
            del data[place : place + 40]
        else:
            for byte in random.integers(600 if number % 2 else len(whole), size=3).tolist():
                data[byte] = int(random.integers(256))
        if data:
            found.append(outcome(bytes(data), 8))
            assert found[-1] == outcome(bytes(data), 1)
    assert 20 < found.count("decodes") < len(found) - 100 and len(set(found)) > 10


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_broken_exif_does_not_cost_the_image(exif):
    assert (np.abs(pixels(encoded(Image.new("RGB", (8, 8), RED), "JPEG", exif=exif)).astype(int) - RED) < 4).all()


def test_exif_orientation_of_a_wrong_type_or_value_is_none():
    for value in (0, 9, 77):
        exif = Image.Exif()
        exif[0x0112] = value
        assert decode(encoded(noise(), "PNG", exif=exif), RULES).size == noise().size


def test_16_bit_gray_is_scaled_not_clipped():
    levels = np.arange(0, 65536, 256).reshape(16, 16)
    expected = np.round(levels / 257)
    tiff = encoded(Image.fromarray(levels.astype(np.uint16)), "TIFF")
    pgm = b"P5 16 16 65535\n" + levels.astype(">u2").tobytes()
    jp2 = encoded(Image.fromarray(levels.astype(np.uint16)), "JPEG2000", irreversible=False)
    for data in (gray16(levels), tiff, pgm, jp2):
        got = pixels(data)
        assert abs(got.mean() - expected.mean()) < 1  # clipping gives 254
        assert np.abs(got[..., 0] - expected).max() <= 1


def test_pgm_is_scaled_by_its_declared_maximum():
    levels = np.full((4, 4), 1023)
    assert (pixels(b"P5 4 4 1023\n" + levels.astype(">u2").tobytes()) == 255).all()


def test_12_bit_tiff_is_scaled_by_its_declared_depth():
    samples = bytes.fromhex("fff800" * 8)  # 12-bit levels 4095 and 2048, in turn
    tags = [(256, 4), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, len(samples))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(samples)) + samples + directory + struct.pack("<I", 0)
    assert sorted(np.unique(pixels(data)).tolist()) == [128, 255]


def test_16_bit_gray_with_a_transparent_level():
    levels = np.array([[0, 65535], [30000, 65535]])
    got = pixels(gray16(levels, (b"tRNS", struct.pack(">H", 30000))), DecodeRules(background=GREEN))
    assert got[0, 0].tolist() == [0, 0, 0] and got[1, 0].tolist() == list(GREEN)


def test_pixels_without_a_declared_range_are_refused():
    assert "floating" in reason(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    assert "range" in reason(encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"))


def test_transparent_pixels_show_the_background():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert np.abs(pixels(encoded(half))[0, 0].astype(int) - [255, 127, 127]).max() <= 1
    assert np.abs(pixels(encoded(half), DecodeRules(background=(0, 0, 0)))[0, 0].astype(int) - [128, 0, 0]).max() <= 1
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    for data in (encoded(hidden), encoded(hidden, "WEBP", lossless=True), encoded(hidden, "TIFF")):
        assert (pixels(data, DecodeRules(background=BLUE)) == BLUE).all()
    assert (pixels(encoded(Image.new("LA", (4, 4), (10, 0)))) == 255).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_trns_chunks_are_transparency(mode):
    image = Image.new("RGB", (4, 4), (0, 0, 0))
    image.paste((255, 255, 255), (2, 0, 4, 4))
    image = image.convert(mode)
    transparent = (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))
    got = pixels(encoded(image, transparency=transparent), DecodeRules(background=GREEN))
    assert got[0, 0].tolist() == list(GREEN) and got[0, 3].tolist() == [255, 255, 255]


def test_palette_with_several_alphas():
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1, 0, 1])
    got = pixels(encoded(image, transparency=bytes([0, 255])), DecodeRules(background=GREEN))
    assert got[0].tolist() == [list(GREEN), list(BLUE)]


def test_cmyk_and_ycck_jpegs_as_adobe_writes_them_inverted():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    adobe = encoded(cmyk, "JPEG", quality=100)
    assert b"Adobe" in adobe  # Pillow writes the inverted kind, with the marker that says so
    assert np.abs(pixels(adobe).astype(int) - RED).max() < 6
    marker = adobe.index(b"Adobe")
    assert adobe[marker + 11] == 0  # its last byte: no colour transform
    # Y, Cb, Cr of cyan, and no black: what a YCCK file of red holds, inverted.
    ycck = bytearray(encoded(Image.new("CMYK", (16, 16), (76, 84, 254, 0)), "JPEG", quality=100))
    ycck[marker + 11] = 2  # YCCK
    assert np.abs(pixels(bytes(ycck)).astype(int) - RED).max() < 6
    assert np.abs(pixels(encoded(cmyk, "TIFF")).astype(int) - RED).max() < 2


def test_other_colour_spaces():
    assert np.abs(pixels(encoded(Image.new("YCbCr", (8, 8), (76, 85, 255)), "JPEG")).astype(int) - RED).max() < 6
    lab = pixels(encoded(Image.new("LAB", (4, 4), (128, 128, 128)), "TIFF"))  # mid gray
    assert np.ptp(lab[0, 0]) <= 3 and 100 < lab.mean() < 140
    assert set(np.unique(pixels(encoded(Image.new("1", (4, 4), 1))))) == {255}


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_animation_is_read_by_its_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    quality = {"quality": 100} if format in ("MPO", "AVIF", "WEBP") else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **quality)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(pixels(data).astype(int) - RED).max() < 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_truncated_files_are_refused(format):
    data = encoded(noise(size=(64, 64)), format)
    reason(data[: len(data) // 2])


def test_png_with_a_flipped_bit_is_refused():
    data = bytearray(encoded(noise()))
    data[len(data) // 2] ^= 1
    reason(bytes(data))


def test_file_that_is_no_image_is_named_by_its_kind(tmp_path):
    assert "empty" in reason(b"")
    assert "HTML" in reason(b"<!DOCTYPE html><html><body>404</body></html>")
    assert "known format" in reason(b"\x00\x01\x02garbage" * 20)
    assert "convert to JPEG" in reason(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    assert "neither" in reason({"bytes": None, "path": None})
    assert "neither" in reason(None)
    reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")  # PostScript is never run
    assert "gone.png" in reason(tmp_path / "gone.png")
    assert "irectory" in reason(tmp_path)
    reason("null\0byte.png")
    (tmp_path / "empty.jpg").touch()
    assert "empty" in reason(tmp_path / "empty.jpg")


def test_sizes_are_checked_before_decoding():
    bomb = png_chunks(60000, 60000, 8, 0, b"")  # nothing in it: decoding it would fail otherwise
    assert "pixels" in reason(bomb)
    wide = encoded(Image.new("L", (101, 100)))
    assert "101x100" in reason(wide, DecodeRules(max_image_pixels=10000))
    assert pixels(wide, DecodeRules(max_image_pixels=10100)).shape == (100, 101, 3)
    assert "side" in reason(png(size=(1, 1)))
    assert "side" in reason(png(size=(50, 1)))
    assert pixels(png(size=(1, 1)), DecodeRules(min_image_side=1)).shape == (1, 1, 3)


def test_max_image_pixels_above_pillows_limit_is_used(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(Image.new("L", (30, 30)))
    with ThreadPoolExecutor(4) as pool:
        rules = [DecodeRules(max_image_pixels=limit) for limit in (50, 1000) * 20]
        outcomes = list(pool.map(lambda rule: _size_or_none(data, rule), rules))
    assert outcomes == [None, (30, 30)] * 20


def _size_or_none(data: bytes, rules: DecodeRules) -> tuple[int, int] | None:
    try:
        return decode(data, rules).size
    except BadImage:
        return None


def test_truncated_files_are_refused_without_touching_pillows_switch():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_lack_of_memory_is_not_a_bad_image(monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError):
        decode(encoded(Image.new("L", (4, 4))), RULES)


def test_decoding_prints_no_warnings(tmp_path):
    palette = Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    (tmp_path / "p.png").write_bytes(encoded(palette, transparency=bytes([0, 255])))
    (tmp_path / "large.png").write_bytes(png_chunks(10000, 10000, 8, 0, b""))
    (tmp_path / "exif.jpg").write_bytes(encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"))
    code = (
        "import sys; from vit_dist.data.decode import *\n"
        "for path in sys.argv[1:]:\n"
        "    try: decode(path, DecodeRules(max_image_pixels=95_000_000))\n"
        "    except BadImage: pass\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert run.stderr == ""


def test_rules_come_from_the_options(tmp_path):
    rules = DecodeRules.from_options(options("digits", tmp_path, image_background="#010203", min_image_side=5))
    assert rules == DecodeRules(120_000_000, 5, (1, 2, 3))
    for values in ({"image_background": "whitish"}, {"min_image_side": 0}, {"max_image_pixels": 0}):
        with pytest.raises(UserError, match=f"--{next(iter(values))}"):
            DecodeRules.from_options(options("digits", tmp_path, **values))
    assert DecodeRules.from_options(options("digits", tmp_path, image_background="#01020380")).background == (1, 2, 3)


def test_bad_image_exception_is_pickled_between_processes():
    assert pickle.loads(pickle.dumps(BadImage("why"))).reason == "why"


MESSY = shared_data("messy")
REFUSED = (
    "heic/",
    "truncated/",
    "not_an_image/",
    "bomb/",
    "palette/tRNS_null_1x1",
    "tiny_size/blend",
    "tiny_size/orient",
)


@pytest.mark.skipif(MESSY is None, reason="no shared/data/messy beside or above the checkout")
def test_real_messy_files_decode_or_say_why():
    with open(MESSY / "INDEX.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        path = MESSY / row["file"]
        if row["file"].startswith(REFUSED):
            reason(path)
            continue
        image = decode(path, RULES)
        width, height = map(int, row["size"].split("x"))
        turned = row["exif_orientation"] in ("5", "6", "7", "8")
        assert image.size == ((height, width) if turned else (width, height)), row["file"]
        assert np.asarray(image).mean() < 255, row["file"]


@pytest.mark.skipif(MESSY is None, reason="no shared/data/messy beside or above the checkout")
@pytest.mark.parametrize("view", ["landscape", "portrait"])
def test_real_photos_look_the_same_in_all_orientations(view):
    small = [decode(MESSY / f"exif_orientation/{view}_{n}.jpg", RULES).resize((30, 30)) for n in range(2, 9)]
    spread = np.ptp(np.stack([np.asarray(image, int) for image in small]), axis=0)
    assert spread.mean() < 8
