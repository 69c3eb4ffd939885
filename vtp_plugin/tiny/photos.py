"""Backgrounds: free photographs from the scikit-image wheel, cut into regions that never meet between splits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

REGIONS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  # columns of every photograph


@dataclass(frozen=True)
class Photo:
    """One bundled photograph: its file, what it shows, where it is from and on which terms."""

    file: str
    title: str
    source: str
    licence: str


UNRESTRICTED = "no known copyright restrictions"
PHOTOS = (
    Photo("astronaut.png", "Eileen Collins", "NASA Great Images, flic.kr/p/r9qvLn", "public domain"),
    Photo("brick.png", "brick wall", "CC0Textures, Bricks25", "CC0"),
    Photo("camera.png", "photographer", "Lav Varshney", "CC0"),
    Photo("chelsea.png", "Chelsea the cat", "Stefan van der Walt", "CC0"),
    Photo("clock_motion.png", "wall clock", "Stefan van der Walt", "public domain"),
    Photo("coffee.png", "coffee cup", "Rachel Michetti, courtesy of Pikolo Espresso Bar", "CC0"),
    Photo("coins.png", "Greek coins", "Brooklyn Museum Collection, 51611", UNRESTRICTED),
    Photo("grass.png", "grass", "linolafett, DeviantArt, Grass-01", "CC0"),
    Photo("gravel.png", "gravel", "CC0Textures, Gravel04", "CC0"),
    Photo("hubble_deep_field.jpg", "Hubble eXtreme Deep Field", "NASA, HubbleSite 2012/37", "public domain"),
    Photo("ihc.png", "colonic glands", "Center for Microscopy and Molecular Imaging", UNRESTRICTED),
    Photo("retina.jpg", "human retina", "Mikael Häggström, Wikimedia Commons", "CC0"),
    Photo("rocket.jpg", "Falcon 9 launch", "SpaceX, flickr 16511594820", "public domain"),
)


@cache
def load(file: str) -> Image.Image:
    """A photograph as RGB, read from the installed wheel without importing scikit-image."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("drawing scenes needs the photographs of scikit-image: pip install scikit-image")
    return Image.open(Path(spec.origin).parent / "data" / file).convert("RGB")


@dataclass(frozen=True)
class Crop:
    """A square window of a photograph, flipped and brightened."""

    file: str
    x: int
    y: int
    side: int
    flip: bool
    brightness: float

    def render(self, size: int) -> Image.Image:
        window = (self.x, self.y, self.x + self.side, self.y + self.side)
        image = load(self.file).resize((size, size), Image.Resampling.BICUBIC, box=window)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.point([min(255, round(value * self.brightness)) for value in range(256)] * 3)


def sample_crop(rng: np.random.Generator, split: str) -> Crop:
    """A window of 70 to 300 photograph pixels inside the columns that belong to the split."""
    photo = PHOTOS[rng.integers(len(PHOTOS))]
    width, height = load(photo.file).size
    left, right = (round(edge * width) for edge in REGIONS[split])
    side = int(rng.integers(70, min(right - left, height, 300) + 1))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(height - side + 1))
    return Crop(photo.file, x, y, side, bool(rng.integers(2)), float(rng.uniform(0.6, 1.2)))
