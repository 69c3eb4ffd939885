"""One decision of one strategy: what it is shown, what it answers, and what is reported of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call, Decision, PruningEvent
from vtp_plugin.tokens import Selection, VisualTokens


class Judgement:
    """One decision of one strategy over images with equally many tokens."""

    def __init__(self, call: Call, strategy: PruningStrategy, layer: int | None) -> None:
        self.call, self.strategy, self.layer = call, strategy, layer
        self.before: dict[int, int] = {}  # by image number
        self.kept: dict[int, list[Tensor]] = {}

    def decide(
        self, tokens: Tensor, images: Sequence[int], grid: tuple[int, int], signals: Mapping[str, Any], **facts: Any
    ) -> Selection:
        """Ask the strategy about tokens [B, N, D] of the given images, and remember what is left of them."""
        judged = [self.call.images[number] for number in images]
        index = torch.stack([image.index for image in judged]).to(tokens.device)
        selection = self.ask(tokens, index, grid, signals, [(number, 0) for number in images], **facts)
        for number, image, columns, row in zip(images, judged, selection.sources, index, strict=True):
            image.index = torch.where(columns >= 0, row[columns.clamp(min=0)], -1)
            self.note(number, tokens.shape[1], image.index)
        return selection

    def ask(
        self,
        tokens: Tensor,
        index: Tensor,
        grid: tuple[int, int],
        signals: Mapping[str, Any],
        owners: Sequence[tuple[int, int]] = (),
        **facts: Any,
    ) -> Selection:
        """Ask the strategy about rows of tokens [B, N, D] that need not be images; `owners` as in `Decision`."""
        visual = VisualTokens(tokens=tokens, grid=grid, index=index, layer=self.layer, signals=signals, **facts)
        selection = self.strategy.decide(visual)
        if self.call.decisions is not None:
            self.call.decisions.append(Decision(self.strategy.name, owners, index, selection))
        return selection

    def note(self, image: int, before: int, kept: Tensor) -> None:
        """Remember what was decided about (a part of) an image."""
        self.before[image] = self.before.get(image, 0) + before
        self.kept.setdefault(image, []).append(kept.cpu())

    def event(self, seconds: float) -> PruningEvent:
        kept = [torch.cat(parts) for parts in self.kept.values()]
        return PruningEvent(
            self.strategy.name,
            self.strategy.stage,
            self.layer,
            list(self.before),
            list(self.before.values()),
            [len(index) for index in kept],
            kept,
            seconds,
        )
