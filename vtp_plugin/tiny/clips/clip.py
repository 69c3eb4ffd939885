"""Procedural clips: eight frames of one scene in which a shape comes, one goes and one moves, and what is true of it.

The background, two shapes and the plate stay. Nothing that is asked of what happens shows in a single frame: the shape
that came is one of four that are there at the end, the one that went one of four that were there at the beginning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..photos import sample_crop
from ..questions import Question
from ..scenes import (
    MARGIN,
    MIDLINE,
    NUMBERS,
    PLATE,
    SHAPES,
    SIZE,
    SPLIT_SEEDS,
    Split,
    Thing,
    candidates,
    draw_plate,
    draw_shape,
)

FRAMES = 8
NOISE = 3.0  # standard deviation of every pixel of every frame, of 255 levels: as a camera's
MOST_MOVES = 3
LARGEST = 36  # pixels: a clip has up to nine places
SIDES = ("left", "right")
VERBS = ("came", "went", "moved")
ASKED = {  # task: questions, and what a model says that knows the kind of question and no more
    "came": ("what came", 1 / len(SHAPES)),
    "went": ("what went", 1 / len(SHAPES)),
    "moved": ("what moved", 1 / len(SHAPES)),
    "moves": ("how many moves", 1 / MOST_MOVES),
    "first": ("left or right first", 1 / len(SIDES)),
    "digit": ("what is the digit", 1 / 10),
}


class Ground(Protocol):
    """What lies behind the things."""

    def render(self, size: int) -> Image.Image: ...


@dataclass(frozen=True)
class Stay:
    """A thing at one place, from a frame on until before another."""

    thing: Thing
    start: int = 0
    stop: int = FRAMES

    @property
    def side(self) -> str:
        return SIDES[self.thing.center[0] > SIZE / 2]


@dataclass(frozen=True)
class Clip:
    """A background and what stays where and how long; a shape that moves has several stays."""

    ground: Ground
    stays: tuple[Stay, ...]
    grain: int  # seed of the noise

    @cached_property
    def of_shape(self) -> dict[str, list[Stay]]:
        """The stays of every shape, in time."""
        shapes = dict.fromkeys(stay.thing.shape for stay in self.stays)
        return {
            shape: sorted((s for s in self.stays if s.thing.shape == shape), key=lambda stay: stay.start)
            for shape in shapes
        }

    @property
    def came(self) -> str:
        return next(shape for shape, stays in self.of_shape.items() if stays[0].start > 0)

    @property
    def went(self) -> str:
        return next(shape for shape, stays in self.of_shape.items() if stays[-1].stop < FRAMES)

    @property
    def moved(self) -> str:
        return next(shape for shape, stays in self.of_shape.items() if len(stays) > 1)

    @property
    def moves(self) -> int:
        return len(self.of_shape[self.moved]) - 1

    @property
    def first(self) -> str:
        """The side of the first thing that comes, goes or moves."""
        changes = [(stay.start, stay.side) for stay in self.stays if stay.start > 0]
        changes += [(stay.stop, stay.side) for stay in self.stays if stay.stop < FRAMES]
        return min(changes)[1]

    @property
    def digit(self) -> int:
        return next(stay.thing.digit for stay in self.stays if stay.thing.shape == PLATE)

    @property
    def changes(self) -> list[int]:
        """The frames in which something is not as in the frame before."""
        return sorted({time for stay in self.stays for time in (stay.start, stay.stop)} - {0, FRAMES})

    def backwards(self) -> Clip:
        """The same clip from its end to its beginning: what came goes."""
        turned = (replace(stay, start=FRAMES - stay.stop, stop=FRAMES - stay.start) for stay in self.stays)
        return Clip(self.ground, tuple(turned), self.grain)

    def retimed(self, rng: np.random.Generator) -> tuple[Clip, np.ndarray]:
        """The same changes in the same order at other times; and which of this clip's frames shows every new one."""
        old = [0, *self.changes, FRAMES]
        new = [0, *sorted((1 + rng.permutation(FRAMES - 1)[: len(old) - 2]).tolist()), FRAMES]
        at = dict(zip(old, new, strict=True))
        stays = tuple(replace(stay, start=at[stay.start], stop=at[stay.stop]) for stay in self.stays)
        spans = zip(pairwise(old), pairwise(new), strict=True)
        order = np.concatenate([rng.integers(*was, size=now[1] - now[0]) for was, now in spans])
        return Clip(self.ground, stays, self.grain), order

    def excerpt(self, rng: np.random.Generator) -> tuple[Clip, np.ndarray]:
        """One of the changes at another time, and nothing else; and which of this clip's frames shows every new one."""
        times = [0, *self.changes, FRAMES]
        number, time = int(rng.integers(1, len(times) - 1)), int(rng.integers(1, FRAMES))
        at, stays = times[number], []
        for stay in self.stays:
            before, after = (stay.start <= t < stay.stop for t in (at - 1, at))
            if before or after:
                stays.append(replace(stay, start=0 if before else time, stop=FRAMES if after else time))
        spans = (times[number - 1], at, time), (at, times[number + 1], FRAMES - time)
        order = np.concatenate([rng.integers(start, stop, size=size) for start, stop, size in spans])
        return Clip(self.ground, tuple(stays), self.grain), order

    def one_change(self) -> list[Question]:
        """Of an excerpt: what it was that happened, on which side, and the digit."""
        (shape,) = {stay.thing.shape for stay in self.stays if (stay.start, stay.stop) != (0, FRAMES)}
        stays = self.of_shape[shape]
        verb = "moved" if len(stays) == 2 else "came" if stays[0].start else "went"
        asked = {verb: shape, "first": self.first, "digit": str(self.digit)}
        return [Question(task, ASKED[task][0], answer) for task, answer in asked.items()]

    def questions(self) -> dict[str, Question]:
        """One of every kind; `digit` needs no time."""
        answers = {"moves": NUMBERS[self.moves - 1], "first": self.first, "digit": str(self.digit)}
        answers |= {verb: getattr(self, verb) for verb in VERBS}
        return {task: Question(task, text, answers[task]) for task, (text, _) in ASKED.items()}

    def frames(self) -> np.ndarray:  # uint8 [FRAMES, H, W, 3]
        ground, tiles = self.ground.render(SIZE), {stay: draw(stay.thing) for stay in self.stays}
        return np.stack([grainy(self._frame(ground, tiles, t), [self.grain, t]) for t in range(FRAMES)])

    def _frame(self, ground: Image.Image, tiles: dict[Stay, Image.Image], time: int) -> np.ndarray:
        image = ground.copy()
        for stay, tile in tiles.items():
            if stay.start <= time < stay.stop:
                image.paste(tile, (stay.thing.x, stay.thing.y), tile)
        return np.asarray(image)

    def as_json(self) -> list[dict[str, Any]]:
        """What stays where, for a file; the background is kept elsewhere."""
        return [asdict(stay) for stay in self.stays]


def read_stays(said: list[dict[str, Any]]) -> tuple[Stay, ...]:
    """From `as_json`."""
    stays = ((stay, stay["thing"]) for stay in said)
    return tuple(Stay(Thing(**thing | {"tint": tuple(thing["tint"])}), s["start"], s["stop"]) for s, thing in stays)


def draw(thing: Thing) -> Image.Image:
    return draw_plate(thing) if thing.shape == PLATE else draw_shape(thing)


def grainy(frame: np.ndarray, seed: list[int]) -> np.ndarray:  # uint8 -> uint8
    noise = np.random.default_rng(seed).standard_normal(frame.shape, np.float32)
    return (frame + NOISE * noise).round().clip(0, 255).astype(np.uint8)


# -- sampling ----------------------------------------------------------------------------------------------------------


def sample_clip(split: Split, seed: int, ground: Ground | None = None) -> Clip:
    """The clip of a seed: always the same one, and never the same in two splits; on a given background or its own."""
    rng = np.random.default_rng([10 + SPLIT_SEEDS[split], seed])
    own, wanted = sample_crop(rng, split), plot(rng)
    while (stays := place(rng, wanted)) is None:
        pass
    return Clip(ground or own, stays, seed)


Wanted = tuple[str, str, int, int]  # a shape, a side or "", the frames in which it is there


def plot(rng: np.random.Generator) -> list[Wanted]:
    """What happens: arrival, departure and every move at times of their own, the first two on opposite sides."""
    came, went, moved, *still = rng.permutation(SHAPES)[:5].tolist()
    moves = int(rng.integers(1, MOST_MOVES + 1))
    arrives, leaves, *steps = rng.permutation(np.arange(1, FRAMES))[: 2 + moves].tolist()
    (left, right), own = rng.permutation(SIDES).tolist(), str(rng.choice(SIDES))
    edges = [0, *sorted(steps), FRAMES]
    path: list[Wanted] = [(moved, own, start, stop) for start, stop in pairwise(edges)]
    stays: list[Wanted] = [(shape, "", 0, FRAMES) for shape in (*still, PLATE)]
    return [*path, (came, left, arrives, FRAMES), (went, right, 0, leaves), *stays]


def place(rng: np.random.Generator, wanted: list[Wanted]) -> tuple[Stay, ...] | None:
    """Places where nothing else ever is; None if the ground runs out."""
    taken: list[Stay] = []
    for shape, side, start, stop in wanted:
        same = next((stay.thing for stay in taken if stay.thing.shape == shape), None)
        found = (Stay(like(same, thing), start, stop) for thing in candidates(rng, shape))
        stay = next((stay for stay in found if free(stay, side, taken)), None)
        if stay is None:
            return None
        taken.append(stay)
    return tuple(taken)


def like(same: Thing | None, thing: Thing) -> Thing:
    """A shape that moves stays what it is."""
    return replace(same, x=thing.x, y=thing.y) if same else thing


def free(stay: Stay, side: str, taken: list[Stay]) -> bool:
    """Inside the frame, clear of the mid-lines, on its side, and nothing there at any time."""
    thing = stay.thing
    inside = max(thing.x, thing.y) + thing.side <= SIZE - MARGIN and thing.side <= LARGEST
    clear = all(abs(middle - SIZE / 2) >= MIDLINE for middle in thing.center)
    return inside and clear and side in ("", stay.side) and not any(thing.overlaps(other.thing) for other in taken)
