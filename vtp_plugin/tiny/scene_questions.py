"""Questions about test scenes, put to the embedded model with a merger."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .asked import Asked
from .examples import PARQUET
from .questions import TASKS


class SceneQuestions(Asked):
    """Of the five tasks of `vtp_scenes`."""

    name, kind, tasks = "vtp-tiny-qwen", "image", tuple(TASKS)

    def __init__(self) -> None:
        import pyarrow.parquet

        super().__init__()
        self.documents = pyarrow.parquet.read_table(PARQUET).to_pylist()

    def shown(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        from PIL import Image

        return {"images": [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]}

    def parts(self) -> Iterable[nn.Module]:
        return [part for block in self.model.model.visual.blocks for part in (block.attn, block.mlp)]
