"""One decision of one strategy: what it is shown, what it answers, and what is reported of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.batching import at_once
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
        for number, image, left in zip(images, judged, _left(index, selection), strict=True):
            image.index = left
            image.ordered &= selection.source is None and selection.tokens is None
            self.note(number, tokens.shape[1], left)
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
        if selection.finite is not None:
            self.call.afterwards(selection.finite[None], lambda finite: self.strategy.check_scores(bool(finite)))
        if self.call.decisions is not None:
            self.call.decisions.append(Decision(self.strategy.name, owners, index, selection))
        return selection

    def note(self, image: int, before: int, kept: Tensor) -> None:
        """Remember what was decided about (a part of) an image."""
        self.before[image] = self.before.get(image, 0) + before
        self.kept.setdefault(image, []).append(kept)

    def event(self, seconds: float) -> PruningEvent:
        """What was decided; the kept indices come to the host when the call has ended."""
        kept = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in self.kept.values()]
        for place, index in enumerate(kept):
            self.call.afterwards(index, partial(kept.__setitem__, place))
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


def _left(index: Tensor, selection: Selection) -> Sequence[Tensor]:
    """Raster positions of what is left of `index` [B, N], per image; -1 for a token without one."""
    if selection.source is None:
        return selection.taken(index)

    def left(own: Tensor, columns: Tensor) -> Tensor:
        return torch.where(columns >= 0, own.gather(1, columns.clamp(min=0)), -1)

    return at_once(left, index.unbind(), selection.sources)
