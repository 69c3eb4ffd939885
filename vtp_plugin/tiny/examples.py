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
    rows = _rows(number)
    asked = [(row[f"{task}_question"], str(row[f"{task}_answer"])) for row, task in zip(rows, cycle(TASKS))]
    return [(picture, *said) for picture, said in zip(pictures(number), asked, strict=True)]


def pictures(number: int) -> list[Any]:
    """The first scenes as PIL images."""
    from PIL import Image

    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in _rows(number)]


def _rows(number: int) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(PARQUET).slice(0, number).to_pylist()
