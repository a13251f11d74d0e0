"""Pictures of every kind come out as a person sees them."""

import os

import numpy as np
import pytest
from PIL import Image, ImageCms

from toolkit.datasets import pictures
from toolkit.datasets.pictures import decode, is_picture

ROWS, COLUMNS = np.mgrid[:48, :64]
PIXELS = np.stack([COLUMNS * 4, ROWS * 5, 252 - COLUMNS * 4], axis=-1).astype(np.uint8)
PIXELS[:12, :12], PIXELS[:12, -12:], PIXELS[-12:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
COLOURED = Image.fromarray(PIXELS)
GREY = np.asarray(COLOURED.convert("L"))  # 0 to about 230
DISC = (COLUMNS - 32) ** 2 + (ROWS - 24) ** 2 < 400
CUT_OUT = Image.fromarray(np.dstack([PIXELS, DISC * np.uint8(255)]))
WHITE_ICON = Image.fromarray(np.dstack([np.full_like(PIXELS, 255), DISC * np.uint8(255)]))


def decoded(path, image: Image.Image, **options) -> np.ndarray:
    image.save(path, **options)
    found = decode(path)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape[:2] == expected.shape[:2]
    return np.abs(found - expected).mean()


STORED = {  # how the eight orientations are stored
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    turned = STORED[orientation]
    stored = COLOURED if turned is None else COLOURED.transpose(turned)
    assert difference(decoded(tmp_path / f"a.{suffix}", stored, exif=exif, quality=95), PIXELS) < 4


def test_damaged_metadata_does_not_spoil_a_picture(tmp_path):
    found = decoded(tmp_path / "a.jpg", COLOURED, exif=b"Exif\0\0II*\0garbage\xff\xff", quality=95)
    assert difference(found, PIXELS) < 4


@pytest.mark.parametrize(
    ("name", "format", "mode"),
    [
        ("a.png", "PNG", "RGB"), ("a.PNG", "PNG", "P"), ("a.jpg", "PNG", "RGB"), ("a.JFIF", "JPEG", "RGB"),
        ("a.gif", "GIF", "RGB"), ("a.Webp", "WEBP", "RGB"), ("a.jp2", "JPEG2000", "RGB"),
        ("a.BMP", "BMP", "RGB"), ("a.tga", "TGA", "RGB"), ("a.ppm", "PPM", "RGB"),
        ("a.tiff", "TIFF", "RGB"), ("a.tif", "TIFF", "CMYK"), ("a.jpeg", "JPEG", "CMYK"),
        ("a.tif", "TIFF", "YCbCr"), ("a.tif", "TIFF", "LAB"),
        ("ein Bild, groß — 图.txt", "PNG", "RGB"), ("without_suffix", "JPEG", "RGB"),
    ],
)  # fmt: skip
def test_colours_are_those_of_the_picture_in_any_format_and_mode(tmp_path, name, format, mode):
    if mode == "LAB":
        profiles = [ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")]
        image = ImageCms.profileToProfile(COLOURED, *profiles, outputMode="LAB")
    else:
        image = COLOURED.quantize(256) if mode == "P" else COLOURED.convert(mode)
    found = decoded(tmp_path / name, image, format=format)
    assert difference(found, PIXELS) < 6 and is_picture(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif", "mpo"])
def test_the_first_frame_of_an_animation_is_the_picture(tmp_path, suffix):
    black = Image.new("RGB", COLOURED.size)
    found = decoded(tmp_path / f"a.{suffix}", COLOURED, save_all=True, append_images=[black, black])
    assert difference(found, PIXELS) < 5


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", GREY), ("a.tif", GREY / np.float32(255)), ("a.tif", GREY.astype(np.float32)),
        ("a.png", GREY * np.uint16(257)), ("a.tif", GREY.astype(">u2") * 257),
        ("a.pgm", GREY * np.int32(257)),
    ],
    ids=["8 bits", "0 to 1", "0 to 255", "16 bits", "big-endian", "32 bits"],
)  # fmt: skip
def test_greys_of_any_depth_keep_their_brightness(tmp_path, name, values):
    found = decoded(tmp_path / name, Image.fromarray(values))
    assert difference(found, GREY[..., None]) < 0.6


@pytest.mark.parametrize(
    "values",
    [GREY * np.uint16(16), GREY * np.int32(100_000), -GREY.astype(np.float32)],
    ids=["12 bits", "32 bits", "negative"],
)
def test_greys_that_fill_no_usual_range_are_scaled_by_their_own(tmp_path, values):
    image = Image.fromarray(values)
    found = decoded(tmp_path / "a.tif", image)
    assert (found.min(), found.max()) == (0, 255)
    expected = (values - values.min().astype(float)) / np.ptp(values.astype(float)) * 255
    assert difference(found, expected[..., None]) < 0.6
    assert "scaled" in decode(tmp_path / "a.tif").info


@pytest.mark.parametrize(
    "negative", [65535 - GREY * np.uint16(257), 1 - GREY / np.float32(255)], ids=["16 bits", "float"]
)
def test_greys_whose_zero_is_white_are_not_seen_as_negatives(tmp_path, negative):
    found = decoded(tmp_path / "a.tif", Image.fromarray(negative), tiffinfo={262: 0})
    assert difference(found, GREY[..., None]) < 0.6


def test_single_greys_and_values_that_are_not_finite_are_read(tmp_path):
    half = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    assert (decoded(tmp_path / "a.png", half) == 128).all()
    assert not decoded(tmp_path / "b.png", Image.new("I;16", (8, 8))).any()
    values = GREY / np.float32(255)
    values[0, :3] = np.nan, np.inf, -np.inf
    found = decoded(tmp_path / "a.tif", Image.fromarray(values))
    assert found[0, :3, 0].tolist() == [0, 255, 0] and difference(found[1:], GREY[1:, :, None]) < 0.6
    assert not decoded(tmp_path / "b.tif", Image.fromarray(values * np.float32(np.nan))).any()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "RGBA"), ("a.webp", "RGBA"), ("a.tif", "RGBA"), ("a.gif", "RGBA"), ("a.png", "LA"),
        ("a.tif", "PA"), ("a.png", "P"),
    ],
)  # fmt: skip
def test_transparency_is_composed_on_white_and_white_pictures_on_black(tmp_path, name, mode):
    for image, pixels, background in ((CUT_OUT, PIXELS, 255), (WHITE_ICON, 255, 0)):
        if mode == "P":
            stored = image.quantize(256, method=Image.Quantize.FASTOCTREE)
        else:
            stored = image if mode == "RGBA" else image.convert(mode)
        found = decoded(tmp_path / name, stored, lossless=True)
        if mode == "LA":
            pixels = GREY[..., None] if background else 255
        expected = np.where(DISC[..., None], pixels, background)
        assert (found[~DISC] == background).all()
        assert difference(found, expected) < 6


def test_transparent_colours_and_wholly_transparent_pictures_are_white(tmp_path):
    found = decoded(tmp_path / "a.png", COLOURED, transparency=(255, 0, 0))
    assert found[0, 0].tolist() == [255, 255, 255] and found[0, -1].tolist() == [0, 255, 0]
    assert (decoded(tmp_path / "b.png", Image.new("RGBA", (8, 8))) == 255).all()
    opaque = Image.new("RGBA", (8, 8), (255, 255, 255, 255))
    assert (decoded(tmp_path / "c.png", opaque) == 255).all()


def test_huge_jpegs_are_read_at_a_fraction_of_their_size_and_other_pictures_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 48 // 5)
    found = decoded(tmp_path / "a.jpg", COLOURED, quality=95)
    assert difference(found, np.asarray(COLOURED.reduce(4))) < 8
    COLOURED.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="64 x 48 pixels, more than 614"):
        decode(tmp_path / "a.png")


def test_what_is_not_a_picture_is_said_with_what_reads_it(tmp_path):
    for name, reason in (
        ("a.png", "format that can be read$"), ("a.HEIC", "install pillow-heif"), ("a.DNG", "develop it"),
    ):  # fmt: skip
        COLOURED.save(tmp_path / name, "TIFF")  # the thumbnail in front of raw data
        if name != "a.DNG":
            (tmp_path / name).write_bytes(b"nothing")
        assert is_picture(tmp_path / name)
        with pytest.raises(ValueError, match=reason):
            decode(tmp_path / name)
    (tmp_path / "notes.txt").write_text("nothing")
    assert not is_picture(tmp_path / "notes.txt")
    os.mkfifo(tmp_path / "pipe.png")
    assert not is_picture(tmp_path / "pipe.png")
