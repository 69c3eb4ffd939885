"""Procedural scenes: coloured shapes and one digit plate on a photograph, with everything that is true of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .photos import Crop, sample_crop

Split = Literal["train", "validation", "test"]

SIZE, PATCH = 168, 14
GRID = SIZE // PATCH  # 12 x 12 patches, 144 visual tokens
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
COLORS = {
    "red": (215, 35, 35),
    "green": (40, 165, 60),
    "blue": (40, 75, 215),
    "yellow": (240, 215, 40),
    "purple": (145, 50, 175),
    "cyan": (60, 205, 220),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
NUMBERS = ("one", "two", "three", "four")
CORNERS = ("upper-left", "upper-right", "lower-left", "lower-right")
PLATE = "plate"
MARGIN, GAP, MIDLINE = 2, 2, 10  # pixels: to the border, between boxes, from a centre to the mid-lines
SPLIT_SEEDS = {"train": 1, "validation": 2, "test": 3}


@dataclass(frozen=True)
class Thing:
    """A shape, or the plate that carries the digit, in its square box."""

    shape: str
    color: str
    x: int
    y: int
    side: int
    tint: tuple[int, int, int] = (0, 0, 0)
    tilt: float = 0.0
    digit: int | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.x, self.y, self.x + self.side, self.y + self.side

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.side / 2, self.y + self.side / 2

    @property
    def corner(self) -> str:
        x, y = self.center
        return CORNERS[2 * (y > SIZE / 2) + (x > SIZE / 2)]

    def overlaps(self, other: Thing, gap: int = GAP) -> bool:
        near_x = self.x < other.x + other.side + gap and other.x < self.x + self.side + gap
        near_y = self.y < other.y + other.side + gap and other.y < self.y + self.side + gap
        return near_x and near_y


@dataclass(frozen=True)
class PatchLabels:
    """What lies under each patch; 0 means nothing. `center` marks the patch that holds a thing's centre."""

    shape: np.ndarray  # [N] int, 1 + index in SHAPES, or 1 + len(SHAPES) for the plate
    color: np.ndarray  # [N] int, 1 + index in COLORS
    digit: np.ndarray  # [N] int, 1 + digit
    center: np.ndarray  # [N] bool


@dataclass(frozen=True)
class Scene:
    """Background and things; drawn on demand, so that the truth is the object itself."""

    background: Crop
    things: tuple[Thing, ...]

    @cached_property
    def plate(self) -> Thing:
        return next(thing for thing in self.things if thing.shape == PLATE)

    @cached_property
    def counts(self) -> dict[str, int]:
        """How often each shape that is there is there."""
        shapes = [thing.shape for thing in self.things if thing.shape != PLATE]
        return {shape: shapes.count(shape) for shape in SHAPES if shape in shapes}

    @cached_property
    def counted(self) -> str:
        """The shape that the scene was drawn to be counted in; it comes first."""
        return self.things[0].shape

    @cached_property
    def unique(self) -> dict[str, Thing]:
        """The things whose shape appears once: questions about them have one answer."""
        return {thing.shape: thing for thing in self.things if self.counts.get(thing.shape) == 1}

    def render(self) -> Image.Image:
        image = self.background.render(SIZE)
        for thing in self.things:
            tile = draw_plate(thing) if thing.shape == PLATE else draw_shape(thing)
            image.paste(tile, (thing.x, thing.y), tile)
        return image

    def patch_labels(self, coverage: float = 0.3) -> PatchLabels:
        """Each patch takes the thing whose box covers most of it, from `coverage` of its area on."""
        share = np.stack([box_coverage(thing) for thing in self.things])  # [T, N]
        owner = np.where(share.max(0) >= coverage, share.argmax(0) + 1, 0)  # [N], 0 is nobody
        colors = list(COLORS)
        shape = [0] + [1 + (*SHAPES, PLATE).index(thing.shape) for thing in self.things]
        color = [0] + [1 + colors.index(thing.color) if thing.color else 0 for thing in self.things]
        digit = [0] + [0 if thing.digit is None else 1 + thing.digit for thing in self.things]
        center = np.zeros(GRID * GRID, bool)
        for thing in self.things:
            x, y = (int(value // PATCH) for value in thing.center)
            center[y * GRID + x] = True
        return PatchLabels(np.array(shape)[owner], np.array(color)[owner], np.array(digit)[owner], center)


def box_coverage(thing: Thing) -> np.ndarray:  # [N]
    """Share of each patch's area under the box."""
    edges = np.arange(GRID) * PATCH
    x0, y0, x1, y1 = thing.box
    columns = np.clip(np.minimum(edges + PATCH, x1) - np.maximum(edges, x0), 0, PATCH) / PATCH
    rows = np.clip(np.minimum(edges + PATCH, y1) - np.maximum(edges, y0), 0, PATCH) / PATCH
    return np.outer(rows, columns).ravel()


# -- sampling ----------------------------------------------------------------------------------------------------------


def sample_scene(split: Split, seed: int) -> Scene:
    """The scene of a seed: always the same one, and never the same in two splits."""
    rng = np.random.default_rng([SPLIT_SEEDS[split], seed])
    counted, *others = rng.permutation(SHAPES)[: 1 + rng.integers(1, 4)].tolist()
    shapes = [counted] * int(rng.integers(1, 5)) + others
    return Scene(sample_crop(rng, split), place(rng, shapes))


def place(rng: np.random.Generator, shapes: list[str]) -> tuple[Thing, ...]:
    """Put every shape and a plate on free ground; start over when the ground runs out."""
    while True:
        placed: list[Thing] = []
        for shape in [*shapes, PLATE]:
            thing = next((thing for thing in candidates(rng, shape) if not any(map(thing.overlaps, placed))), None)
            if thing is None:
                break
            placed.append(thing)
        else:
            return tuple(placed)


def candidates(rng: np.random.Generator, shape: str, tries: int = 60):
    """Random things of one shape whose centres keep clear of the mid-lines."""
    for _ in range(tries):
        side = int(rng.integers(28, 35)) if shape == PLATE else int(rng.integers(28, 41))
        x, y = (int(value) for value in rng.integers(MARGIN, SIZE - side - MARGIN + 1, 2))
        if min(abs(x + side / 2 - SIZE / 2), abs(y + side / 2 - SIZE / 2)) < MIDLINE:
            continue
        if shape == PLATE:
            yield Thing(PLATE, "", x, y, side, digit=int(rng.integers(10)))
        else:
            color = str(rng.choice(list(COLORS)))
            tint = np.clip(np.array(COLORS[color]) + rng.integers(-15, 16, 3), 0, 255).tolist()
            yield Thing(shape, color, x, y, side, tuple(tint), float(rng.uniform(-8, 8)))


# -- drawing -----------------------------------------------------------------------------------------------------------

SUPERSAMPLING = 4


def draw_shape(thing: Thing) -> Image.Image:
    """An RGBA tile: the shape with a contrasting outline, anti-aliased."""
    size, outline = thing.side * SUPERSAMPLING, outline_of(thing.tint)
    tile = Image.new("RGBA", (size, size), (*outline, 0))
    draw, width = ImageDraw.Draw(tile), 2 * SUPERSAMPLING
    if thing.shape in ("circle", "ring"):
        draw.ellipse((2, 2, size - 3, size - 3), thing.tint, outline, width)
    else:
        points = [((1 + x) * size / 2, (1 + y) * size / 2) for x, y in polygon(thing.shape)]
        draw.polygon(points, thing.tint, outline, width)
    if thing.shape == "ring":
        hole = (size * 0.31, size * 0.31, size * 0.69, size * 0.69)
        draw.ellipse(hole, (*outline, 0), outline, width)
    tile = tile.rotate(thing.tilt, Image.Resampling.BICUBIC, fillcolor=(*outline, 0))
    return tile.resize((thing.side, thing.side), Image.Resampling.BOX)


def outline_of(color: tuple[int, int, int]) -> tuple[int, int, int]:
    return (235, 235, 235) if sum(color) < 150 else (25, 25, 25)


def polygon(shape: str) -> list[tuple[float, float]]:
    """Corner points in [-1, 1]."""
    a, b = 0.36, 0.95  # half the width of an arm, half the length
    cross = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    outlines = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
        "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
        "cross": cross,
    }
    return outlines[shape] if shape in outlines else curve(shape)


def curve(shape: str) -> list[tuple[float, float]]:
    if shape == "star":
        turns = [(math.pi * step / 5, 1.0 if step % 2 == 0 else 0.42) for step in range(10)]
        return [(radius * math.sin(turn), 0.05 - radius * math.cos(turn)) for turn, radius in turns]
    angles = [2 * math.pi * step / 80 for step in range(80)]  # heart
    return [(math.sin(a) ** 3 * 0.95, (-13 * math.cos(a) + 5 * math.cos(2 * a) + 2 * math.cos(3 * a)
             + math.cos(4 * a)) / 17.5) for a in angles]  # fmt: skip


def draw_plate(thing: Thing) -> Image.Image:
    """An ivory plate with its digit."""
    size = thing.side * SUPERSAMPLING
    tile = Image.new("RGBA", (size, size), (60, 50, 40, 0))
    draw = ImageDraw.Draw(tile)
    draw.rounded_rectangle((2, 2, size - 3, size - 3), size // 8, (238, 228, 200), (60, 50, 40), 2 * SUPERSAMPLING)
    font = ImageFont.load_default(size * 0.8)
    draw.text((size / 2, size / 2), str(thing.digit), (25, 20, 20), font, anchor="mm", stroke_width=SUPERSAMPLING)
    return tile.resize((thing.side, thing.side), Image.Resampling.BOX)
