"""Random: the control that a method has to beat. Seeded, kept in raster order.

The numbers are drawn per image from (`seed`, the image's own content), so the choice does not depend on the batch, the
order of the samples or the number of processes, and differs from image to image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import VisualTokens


@dataclass(kw_only=True)
class Random(PruningStrategy):
    """Keep a uniformly random subset."""

    name = "random"
    paper = "control"
    needs = ("fingerprint",)

    at: str = "projector"  # the stage: vit, projector or llm
    layer: int = 2  # for at=llm: the first decoder layer that does not see the dropped tokens
    seed: int = 0

    def validate(self) -> None:
        self.check_choice("at", ("vit", "projector", "llm"))
        self.check_whole("layer", 1)
        self.check_whole("seed", 0)

    @property
    def stage(self) -> Stage:
        return Stage(self.at)

    @property
    def decoder_layer(self) -> int | None:
        return self.layer if self.stage is Stage.LLM else None

    def score(self, visual: VisualTokens) -> Tensor:
        n, device = visual.tokens.shape[1], visual.tokens.device
        draws = [torch.rand(n, generator=self._generator(image)) for image in visual.fingerprint]
        return torch.stack(draws).to(device)

    def _generator(self, fingerprint: int) -> torch.Generator:
        mixed = (fingerprint + self.seed * 0x9E3779B1) % 2**32  # the generator reads the lower 32 bits only
        return torch.Generator().manual_seed(mixed)
