"""Pictures of any kind, decoded as upright 8-bit RGB images."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from toolkit.files import read_bounded

with contextlib.suppress(ImportError):  # optional: without it HEIC pictures are left out
    import pillow_heif

    pillow_heif.register_heif_opener()

MOST_BYTES = 2**28  # of a file
MOST_TEXT_BYTES = 2**24  # of one that is decoded as text, at a megapixel a second
TEXTS = (b"P1", b"P2", b"P3", b"/* XPM", b"#define")  # beginnings of PNM, XPM and XBM
MAX_PIXELS = 40_000_000  # JPEGs are decoded at a fraction of their size beyond it, other pictures refused
WHITE = 240  # mean brightness of visible pixels from which a transparent picture is composed on black
HEIC = (".heic", ".heif", ".hif")
# Cameras' raw data: Pillow would read the thumbnail that some of them start with.
RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw")
OTHERS = (*HEIC, *RAW, ".jxl", ".svg")  # pictures that Pillow alone does not read


def formats() -> list[str]:
    """The formats that Pillow and its plugins decode by themselves: PostScript would run a program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name, or by its first bytes if the name does not say so."""
    if path.exists() and not path.is_file():  # a pipe would keep whoever reads it waiting
        return False
    if path.suffix.lower() in OTHERS or path.suffix.lower() in Image.registered_extensions():
        return True
    try:
        with Image.open(path, formats=("BMP", "GIF", "JPEG", "PNG", "WEBP")):
            return True
    except Exception:  # whatever other content leads to
        return False


def read(path: Path) -> bytes:
    """The content of a file; raises `ValueError` for a pipe, a device, or what is too large for a picture."""
    return read_bounded(path, MOST_BYTES)


def decode(path: Path, content: bytes | None = None) -> Image.Image:
    """Return the picture in a file, the first one of several, as an upright RGB image.

    `content`: of the file, if it has been read.

    Transparency is composed on white, or on black if what is visible is white.  Greys of more than 8 bits
    are scaled by their range, which sets `info["scaled"]`.

    Raises whatever Pillow raises for damaged content, and `ValueError` for no picture or too large a one.
    """
    if path.suffix.lower() in RAW:
        raise ValueError("raw data of a camera; develop it to a JPEG or PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata, and about sizes, which are checked here
        try:
            # The content decides, not the name.
            with Image.open(io.BytesIO(_bounded(content or read(path))), formats=formats()) as image:
                _draft(image)
                check_size(image)
                image.load()
                with contextlib.suppress(Exception):  # damaged metadata does not spoil a picture
                    ImageOps.exif_transpose(image, in_place=True)
                return _rgb(image)
        except UnidentifiedImageError as error:
            hint = "; install pillow-heif to read HEIC" if path.suffix.lower() in HEIC else ""
            raise ValueError(f"not a picture in a format that can be read{hint}") from error


def _bounded(content: bytes) -> bytes:
    """`content`, of bounded length if it is text, and without comments, which Pillow reads slowly."""
    if content.startswith(TEXTS) and len(content) > MOST_TEXT_BYTES:
        raise ValueError(f"{len(content):,} bytes of text, more than {MOST_TEXT_BYTES:,}")
    return re.sub(rb"(#[^\r\n]*|\s)+", b" ", content) if content.startswith(TEXTS[:3]) else content


def check_size(image: Image.Image) -> None:
    """Raise `ValueError` before a decompression bomb is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")


def _draft(image: Image.Image) -> None:
    """Have a huge JPEG decoded at a half, a quarter or an eighth of its size."""
    pixels = image.width * image.height
    divisor = next((divisor for divisor in (1, 2, 4) if pixels <= MAX_PIXELS * divisor**2), 8)
    if divisor > 1:
        image.draft(image.mode, (image.width // divisor, image.height // divisor))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        rgb = _eight_bits(image).convert("RGB")
        rgb.info["scaled"] = True
        return rgb
    if image.has_transparency_data:
        return _composed(image.convert("RGBA"))
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale greys by the usual range that holds them, if they fill half of it, else by their own.

    Values that are not finite do not count and are clipped; NaN is black.
    """
    values = np.asarray(image).astype(np.float32)
    finite = np.isfinite(values)
    low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
    for most in (1, 255, 65535):
        if low >= 0 and most / 2 <= high <= most:
            low, high = 0, most
    if not low < high:  # a single grey, or none
        low, high = 0, 65535
    scaled = (values - low) / (high - low) * 255
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0:  # white; Pillow inverts 8 bits only
        scaled = 255 - scaled
    return Image.fromarray(np.nan_to_num(scaled, nan=0.0).clip(0, 255).round().astype(np.uint8))


def _composed(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    alpha = pixels[..., 3]
    brightness = pixels[..., :3].min(axis=2)
    white = alpha.any() and np.average(brightness, weights=alpha) >= WHITE
    background = Image.new("RGBA", image.size, "black" if white else "white")
    return Image.alpha_composite(background, image).convert("RGB")
