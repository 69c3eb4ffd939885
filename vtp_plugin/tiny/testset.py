"""The test scenes as the parquet that the lmms-eval tasks read: one row per scene, six questions, one picture."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np

from .pool import encode_jpeg
from .questions import Question, ask_all, ask_caption, ask_presence
from .scenes import NUMBERS, Scene, sample_scene

PARQUET = Path(__file__).parents[1] / "hosts" / "lmms_eval" / "tasks" / "vtp_scenes" / "scenes.parquet"
SCENES = 1000


def select(scenes: int = SCENES) -> list[tuple[int, Scene]]:
    """The first test seeds, as many for each number of the counted shape."""
    taken, left = [], Counter(dict.fromkeys(range(1, len(NUMBERS) + 1), scenes // len(NUMBERS)))
    for seed in count():
        scene = sample_scene("test", seed)
        number = scene.counts[scene.counted]
        if left[number]:
            left[number] -= 1
            taken.append((seed, scene))
        if not left.total():
            return taken


def ask(index: int, seed: int, scene: Scene) -> dict[str, Question]:
    """One question per task; presence is yes, random no, yes, hard no, in turn."""
    rng = np.random.default_rng([99, seed])
    presence = ask_presence(scene, rng, present=index % 2 == 0, hard=index % 4 == 3)
    return ask_all(scene, rng) | {"presence": presence}


def rows(scenes: int = SCENES) -> list[dict]:
    """Rows in the shape that `datasets` reads as pictures."""
    table = []
    for index, (seed, scene) in enumerate(select(scenes)):
        row = {"scene": seed, "image": {"bytes": encode_jpeg(scene.render()), "path": None}}
        for task, question in (ask(index, seed, scene) | {"caption": ask_caption(scene)}).items():
            row |= {f"{task}_question": question.text, f"{task}_answer": question.answer}
        table.append(row)
    return table


def write(path: Path = PARQUET, scenes: int = SCENES) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    picture = {"image": datasets.Image()}
    table = pyarrow.Table.from_pylist(rows(scenes))
    names = [name for name in table.column_names if name not in ("scene", "image")]
    features = {"scene": datasets.Value("int64"), **picture, **{name: datasets.Value("string") for name in names}}
    schema = datasets.Features(features).arrow_schema
    pyarrow.parquet.write_table(table.select(schema.names).cast(schema), path, compression="zstd")


if __name__ == "__main__":
    write()
