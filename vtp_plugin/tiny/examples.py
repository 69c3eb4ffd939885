"""A few of the shipped test scenes, with questions."""

from __future__ import annotations

import io
from itertools import cycle
from pathlib import Path
from typing import Any

PARQUET = Path(__file__).parents[1] / "hosts" / "lmms_eval" / "tasks" / "vtp_scenes" / "scenes.parquet"
TASKS = ("attribute", "count", "position", "digit", "presence")


def examples(number: int) -> list[tuple[Any, str, str]]:
    """The first scenes as PIL images, each with the question of another task and its answer."""
    import pyarrow.parquet
    from PIL import Image

    rows = pyarrow.parquet.read_table(PARQUET).slice(0, number).to_pylist()
    pictures = (Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows)
    asked = [(row[f"{task}_question"], str(row[f"{task}_answer"])) for row, task in zip(rows, cycle(TASKS))]
    return [(picture, *said) for picture, said in zip(pictures, asked, strict=True)]
