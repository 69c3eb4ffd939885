"""Random: the control that a method has to beat. Seeded, kept in raster order.

The numbers are drawn per image from (`seed`, the image's own content), so the choice does not depend on the batch, the
order of the samples or the number of processes, and differs from image to image.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.strategy import PlacedStrategy
from vtp_plugin.tokens import VisualTokens


@dataclass(kw_only=True)
class Random(PlacedStrategy):
    """Keep a uniformly random subset."""

    name = "random"
    paper = "control"
    needs = ("fingerprint",)

    seed: int = 0

    def validate(self) -> None:
        super().validate()
        self.check_whole("seed", 0)

    def score(self, visual: VisualTokens) -> Tensor:
        n, device = visual.tokens.shape[1], visual.tokens.device
        draws = [torch.rand(n, generator=self._generator(image)) for image in visual.fingerprint]
        return torch.stack(draws).to(device)

    def _generator(self, fingerprint: int) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {fingerprint}".encode()))
