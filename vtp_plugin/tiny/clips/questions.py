"""Questions about test clips, put to the embedded video model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..asked import Asked
from .testset import documents, read


class ClipQuestions(Asked):
    """Of the tasks that need time and that the model has learnt."""

    name, kind, tasks = "vtp-tiny-video", "video", ("which", "moves")

    def __init__(self) -> None:
        super().__init__()
        self.documents = documents()

    def shown(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        from PIL import Image

        return {"videos": [[Image.fromarray(frame) for frame in read(row).frames()] for row in rows]}

    def parts(self) -> Iterable[nn.Module]:
        blocks = self.model.model.vision_tower.encoder.layers
        return [part for block in blocks for part in (block.self_attn, block.mlp)]
