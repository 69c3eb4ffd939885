"""Pictures from files as the hosts' loaders see them: turned by their EXIF mark, the first frame, in RGB of 8 bits.

What would come out white, black or guessed is scaled where its range is known (16-bit grey, floats in [0, 1]) and
refused where it is not.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp_plugin.errors import PruningError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "ICO", "TGA", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
BYTES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")  # modes of 8 bits
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # 16-bit grey
OF_16_BITS = ("PNG", "PPM")  # formats whose 32-bit mode is Pillow's way to hold 16 bits
WIDEST = 200  # a side over the other; no image processor makes anything of more


def open_picture(path: str | Path) -> Image:
    """The picture in RGB. PruningError for a file that is none, is cut short, or whose levels have no known range."""
    path = Path(path)
    _there(path)
    try:
        return _read(path)
    except PruningError:
        raise
    except Exception as error:  # Pillow's readers raise whatever their parsers meet
        raise PruningError(f"not a picture that can be read: {path} ({one_line(str(error))})") from None


def _there(path: Path) -> None:
    try:
        found, whole = path.exists(), path.is_file()
    except (OSError, ValueError):
        found = whole = False
    if not whole:
        raise PruningError(f"not a picture that can be read: {path}" if found else f"picture not found: {path}")


def _read(path: Path) -> Image:
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as large is an error
        with Image.open(path, formats=[name for name in FORMATS if name in _known(Image)]) as opened:
            if max(opened.size) > WIDEST * min(opened.size):
                raise PruningError(f"{path}: a picture of {opened.width} x {opened.height} pixels is too narrow")
            _load_whole(opened)
            turned = ImageOps.exif_transpose(opened)
    return in_bytes(turned, f"{path}", opened.format)


def _load_whole(opened: Any) -> None:
    """Read a picture to its end. Some hosts let PIL fill up what a file lacks, for the whole process: not here."""
    from PIL import ImageFile

    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        opened.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _known(image: Any) -> set[str]:
    image.init()
    return set(image.OPEN)


def in_bytes(picture: Image, named: str, format: str | None = None) -> Image:
    """A picture of any mode in RGB of 8 bits; `named` goes in front of what is said about one that is refused."""
    if picture.mode in BYTES:
        return picture.convert("RGB")
    levels = np.asarray(picture)
    if picture.mode in DEEP or (picture.mode == "I" and format in OF_16_BITS):
        return _grey(levels.astype(np.float64) / 65535)
    if picture.mode == "F" and np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 1:
        return _grey(levels.astype(np.float64))
    raise PruningError(
        f"{named}: levels from {levels.min():g} to {levels.max():g} (mode {picture.mode}) have no known white; "
        "save it with 8 or 16 bits, or as floats from 0 to 1"
    )


def _grey(shares: np.ndarray) -> Image:
    """Grey of 8 bits, three times, from shares of white [H, W]."""
    from PIL import Image

    return Image.fromarray(np.round(shares * 255).astype(np.uint8)).convert("RGB")
