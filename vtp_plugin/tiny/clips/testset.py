"""The test clips as the lmms-eval tasks read them: what stays where and how long, questions, a strip of backgrounds.

A clip of 168 x 168 pixels and eight frames takes 250 bytes this way; its frames are drawn when it is shown, in 25 ms.
Many clips share a background; nothing that is asked depends on it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..photos import sample_crop
from ..scenes import SIZE
from .clip import MOST_MOVES, SIDES, VERBS, Clip, read_stays, sample_clip

FOLDER = Path(__file__).parents[2] / "hosts" / "lmms_eval" / "tasks" / "vtp_clips"
PARQUET, STRIP = FOLDER / "clips.parquet", FOLDER / "grounds.jpg"
CLIPS, GROUNDS = 480, 30
TASKS = ("which", "moves", "first", "digit")


@dataclass(frozen=True)
class Stored:
    """A background of the strip."""

    index: int

    def render(self, size: int) -> Image.Image:
        top = self.index * SIZE
        return strip().crop((0, top, SIZE, top + SIZE)).resize((size, size))


@cache
def strip() -> Image.Image:
    """All backgrounds, one below the other."""
    return Image.open(STRIP).convert("RGB")


def select(clips: int = CLIPS) -> list[tuple[int, Clip]]:
    """The first test seeds, as many for each number of moves and each side; the backgrounds in turn."""
    kinds = [(moves, side) for moves in range(1, MOST_MOVES + 1) for side in SIDES]
    taken, left = [], Counter(dict.fromkeys(kinds, clips // len(kinds)))
    for seed in count():
        clip = sample_clip("test", seed, Stored(len(taken) % GROUNDS))
        if left[clip.moves, clip.first]:
            left[clip.moves, clip.first] -= 1
            taken.append((seed, clip))
        if not left.total():
            return taken


def rows(clips: int = CLIPS) -> list[dict[str, Any]]:
    """One row per clip; `which` asks for what came, went and moved in turn."""
    table = []
    for index, (seed, clip) in enumerate(select(clips)):
        asked = clip.questions()
        asked["which"] = asked[VERBS[index % len(VERBS)]]
        row = {"clip": seed, "ground": clip.ground.index, "stays": json.dumps(clip.as_json())}
        for task in TASKS:
            row |= {f"{task}_question": asked[task].text, f"{task}_answer": asked[task].answer}
        table.append(row)
    return table


def documents() -> list[dict[str, Any]]:
    """The rows as they are stored."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(PARQUET).to_pylist()


def read(row: dict[str, Any]) -> Clip:
    """The clip of a row."""
    return Clip(Stored(row["ground"]), read_stays(json.loads(row["stays"])), row["clip"])


def write() -> None:
    """Documents and backgrounds, from scikit-image's photographs."""
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(97)
    grounds = [np.asarray(sample_crop(rng, "test").render(SIZE)) for _ in range(GROUNDS)]
    Image.fromarray(np.concatenate(grounds)).save(STRIP, "JPEG", quality=90, subsampling=0)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), PARQUET, compression="zstd")


if __name__ == "__main__":
    write()
