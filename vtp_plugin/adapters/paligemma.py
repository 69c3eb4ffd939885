"""PaliGemma and PaliGemma 2: SigLIP tower, a linear projector, Gemma as a prefix language model, whose whole prompt
attends both ways. The second has Gemma 2: every other layer has a window, and attention's logits are bounded.

One image is one run of placeholders; a token is one patch. SigLIP has no class token: the attention that a patch
receives, mean over queries, stands in for the class token's. What is left of the prompt still sees all of it. Positions
count from 1 and are renumbered after a cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapters.rows import RowsAdapter, flat_tower, pooled_macs
from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers import contract
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image


class PaliGemma(RowsAdapter):
    """transformers' PaliGemma."""

    family = "paligemma"
    touches = (*contract.ROWS, *contract.clip(contract.TOWER))
    models = "PaliGemma"
    names = ("PaliGemmaForConditionalGeneration",)
    facts = {"vision_config.model_type": "siglip_vision_model", "text_config.model_type": "gemma"}
    stages = dict.fromkeys(Stage, "")
    tokenwise = True
    first_position = 1

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = flat_tower(self.core.vision_tower, -1)

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        n, values = self.tower.grid[0] * self.tower.grid[1], inputs["pixel_values"]
        index = torch.arange(n, device=values.device)
        return [Image(total=n, index=index.clone(), patches=n, projectable=n) for _ in values]

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of all tiles [T, N, C] -> rows per image [n, C]: a row for every patch."""
        return list(maps)

    def pack(self, rows: Sequence[Tensor], kind: str, host: Tensor) -> Tensor:
        """[images, K, D] as in the host, [rows, D] where images keep unequal numbers."""
        even = len({len(image) for image in rows}) == 1
        return torch.stack(list(rows)) if even else torch.cat(list(rows))

    def pooling_macs(self, tokens: int) -> int:
        return pooled_macs(self.core.vision_tower, tokens)


class PaliGemma2(PaliGemma):
    """transformers' PaliGemma 2."""

    family = "paligemma2"
    touches = (
        *PaliGemma.touches,
        TouchPoint(
            TRANSFORMERS,
            ".model.language_model.layers.0.self_attn",
            "attention rows",
            has=("attn_logit_softcapping", "sliding_window"),
        ),
    )
    models = "PaliGemma 2"
    facts = {**PaliGemma.facts, "text_config.model_type": "gemma2"}
