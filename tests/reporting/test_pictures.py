"""Pictures in all modes and depths come out as the hosts' loaders see them, or are refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.pictures import open_picture

GREY = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
COLOURS = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def opened(path: Path) -> np.ndarray:
    picture = open_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def refusal(path: Path) -> str:
    with pytest.raises(PruningError) as error:
        open_picture(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("levels", "ending"),
    [
        (GREY, "png"),
        (GREY.astype(np.uint16) * 257, "png"),
        (GREY.astype(np.uint16) * 257, "tif"),
        (GREY.astype(">u2") * 257, "tif"),
        (GREY.astype(np.float32) / 255, "tif"),
    ],
    ids=["8 bits", "16 bits", "16-bit TIFF", "16-bit TIFF, big end first", "floats"],
)
def test_grey_of_every_depth_is_the_same_picture(levels: np.ndarray, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"grey.{ending}"
    Image.fromarray(levels).save(path)
    assert np.array_equal(opened(path), np.repeat(GREY[..., None], 3, axis=2))


def test_a_16_bit_graymap_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "grey.pgm"
    path.write_bytes(b"P5 30 20 65535\n" + (GREY.astype(">u2") * 257).tobytes())
    assert np.array_equal(opened(path)[..., 0], GREY)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_of_8_bits_is_what_pillow_makes_of_it(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    Image.fromarray(COLOURS).convert(mode).save(path)
    assert np.array_equal(opened(path), np.asarray(Image.open(path).convert("RGB")))


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    Image.fromarray(COLOURS).quantize(8).save(path, transparency=0)
    assert np.array_equal(opened(path), np.asarray(Image.open(path).convert("RGB")))


def test_the_exif_mark_turns_the_picture_as_the_hosts_do(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    path = tmp_path / "turned.png"
    Image.fromarray(COLOURS).save(path, exif=exif)
    assert np.array_equal(opened(path), np.rot90(COLOURS, -1))


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    path = tmp_path / "moving.png"
    Image.fromarray(COLOURS).save(path, save_all=True, append_images=[Image.fromarray(255 - COLOURS)])
    assert np.array_equal(opened(path), COLOURS)


@pytest.mark.parametrize(
    "levels",
    [
        GREY.astype(np.float32),
        GREY.astype(np.float32) / -255,
        np.full((4, 4), np.nan, np.float32),
        GREY.astype(np.int32),
    ],
    ids=["floats up to 255", "below 0", "no number", "32 bits"],
)
def test_levels_without_a_known_white_are_refused(levels: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    Image.fromarray(levels).save(path)
    assert "have no known white" in refusal(path)


def test_what_is_no_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some hosts leave it
    whole = tmp_path / "whole.png"
    Image.fromarray(np.repeat(COLOURS, 20, axis=0)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:2000])
    text = tmp_path / "text.png"
    text.write_text("[/red] no picture")
    narrow = tmp_path / "narrow.png"
    Image.new("L", (1, 5000)).save(narrow)
    bomb = tmp_path / "bomb.png"
    header = bytearray(whole.read_bytes())
    header[16:24] = (60000).to_bytes(4, "big") * 2
    bomb.write_bytes(bytes(header))
    for path in (cut, text, bomb, tmp_path):
        assert refusal(path).startswith("not a picture that can be read")
    assert "too narrow" in refusal(narrow)
    assert refusal(tmp_path / "nowhere.png").startswith("picture not found")
    assert refusal(tmp_path / ("x" * 300)).startswith(("picture not found", "not a picture"))
