"""What a strategy's free numbers should be: thresholds for a wanted share of patches, signals of an unpruned model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.config import build
from vtp_plugin.errors import PruningError
from vtp_plugin.pruning import prune
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens

STEPS = 24  # halvings of the threshold's interval [0, 1]


@dataclass(kw_only=True)
class Witness(PruningStrategy):
    """Keeps everything and remembers what it saw behind every decoder layer but the last."""

    name = "witness"
    paper = "none"
    stage = Stage.LLM
    budgeted = False

    needs: Collection[str] = ()
    seen: list[VisualTokens] = field(default_factory=list)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth))

    def select(self, visual: VisualTokens) -> Selection:
        self.seen.append(visual)
        return Selection(torch.ones_like(visual.index, dtype=torch.bool))


def witnessed(
    model: nn.Module, processor: Any, needs: Collection[str], calls: Sequence[Callable[[], Any]]
) -> list[list[VisualTokens]]:
    """The signals behind every decoder layer but the last, per call of the model with one prompt with one image."""
    samples = []
    for call in calls:
        witness = Witness(needs=tuple(needs))
        with prune(model, witness, processor=processor), torch.no_grad():
            call()
        samples.append(witness.seen)
    return samples


def removed_share(strategy: PruningStrategy, images: Sequence[Tensor], side: int) -> float:
    """Mean share of the patches that a pixels-stage strategy removes from images [1, side * side, 3, p, p] uint8."""
    shares = []
    for pixels in images:
        index = torch.arange(pixels.shape[1])[None]
        visual = VisualTokens(tokens=pixels.flatten(2), grid=(side, side), index=index, pixels=pixels)
        shares.append(1 - strategy.decide(visual).keep.float().mean().item())
    return sum(shares) / len(shares)


def calibrate(
    name: str, field: str, fixed: Mapping[str, Any], images: Sequence[Tensor], side: int, target: float
) -> PruningStrategy:
    """The strategy whose `field` in [0, 1] removes the share nearest to the target; a higher value removes less.

    PruningError if the other parameters do not let it remove that much.
    """
    if field in fixed:
        raise PruningError(f"{field} is what is looked for; it cannot be given")
    low, high = 0.0, 1.0
    most = removed_share(build(name, {**fixed, field: low}), images, side)
    if most < target:
        raise PruningError(
            f"{name}: at most {most:.1%} can be removed here, {target:.1%} asked; loosen the other parameters"
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        enough = removed_share(build(name, {**fixed, field: middle}), images, side) >= target
        low, high = (middle, high) if enough else (low, middle)
    candidates = [build(name, {**fixed, field: round(value, 6)}) for value in (low, high)]
    return min(candidates, key=lambda strategy: abs(removed_share(strategy, images, side) - target))
