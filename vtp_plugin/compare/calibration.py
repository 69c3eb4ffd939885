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
NEAR, FAR = 0.01, 0.1  # of the target: met; refused
FACTORS = (2, 0.5, 10, 0.1)  # by which other parameters are changed, to see which one limits


@dataclass(kw_only=True)
class Recording(PruningStrategy):
    """Keeps everything and remembers what it saw behind every decoder layer but the last."""

    name = "recording"
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


def recorded(
    model: nn.Module, processor: Any, needs: Collection[str], calls: Sequence[Callable[[], Any]]
) -> list[list[VisualTokens]]:
    """The signals behind every decoder layer but the last, per call of the model with one prompt with one image."""
    samples = []
    for call in calls:
        recording = Recording(needs=tuple(needs))
        with prune(model, recording, processor=processor), torch.no_grad():
            call()
        samples.append(recording.seen)
    return samples


def removed_share(strategy: PruningStrategy, images: Sequence[Tensor], side: int) -> float:
    """Mean share of the patches that a pixels-stage strategy removes from images [1, side * side, 3, p, p] uint8."""
    shares = []
    for pixels in images:
        index = torch.arange(pixels.shape[1])[None]
        visual = VisualTokens(tokens=pixels.flatten(2), grid=(side, side), index=index, pixels=pixels)
        shares.append(1 - strategy.decide(visual).keep.float().mean().item())
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class Calibrated:
    """The strategy that comes nearest to a target, the share that it removes, and what keeps it from the target."""

    strategy: PruningStrategy
    share: float
    remark: str = ""  # "" where the target is met


def calibrate(
    name: str, field: str, fixed: Mapping[str, Any], images: Sequence[Tensor], side: int, target: float
) -> Calibrated:
    """The strategy whose `field` in [0, 1] removes the share nearest to the target; a higher value removes less.

    PruningError, with the parameter that limits it, if that share is more than FAR from the target.
    """
    if field in fixed:
        raise PruningError(f"{field} is what is looked for; it cannot be given")

    def at(value: float) -> tuple[float, PruningStrategy]:
        strategy = build(name, {**fixed, field: value})
        return removed_share(strategy, images, side), strategy

    (most, _), (least, _) = at(0.0), at(1.0)
    low, high = bisected(lambda value: at(value)[0] >= target)
    share, chosen = min((at(round(value, 6)) for value in (low, high)), key=lambda found: abs(found[0] - target))
    if abs(share - target) <= NEAR:
        return Calibrated(chosen, share)
    bound = f"at most {most:.1%}" if most < target else f"at least {least:.1%}" if least > target else ""
    remark = (
        f"{name}: {bound} can be removed here whatever {field} is, {target:.1%} asked"
        if bound
        else (f"{name}: {field} goes from {at(low)[0]:.1%} to {at(high)[0]:.1%} in one step here, {target:.1%} asked")
    )
    remark += "; " + limits(name, field, fixed, images, side, target)
    if abs(share - target) > FAR:
        raise PruningError(remark)
    return Calibrated(chosen, share, remark)


def limits(name: str, field: str, fixed: Mapping[str, Any], images: Sequence[Tensor], side: int, target: float) -> str:
    """Which other parameters, changed one by one, let the target be met: `it is limited by chi2_threshold=5 (...)`."""
    config = build(name, dict(fixed)).config()
    found = []
    for other, value in config.items():
        if other == field or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        for factor in FACTORS:
            tried = {**fixed, other: type(value)(value * factor)}
            if tried[other] != value and _reaches(name, field, tried, images, side, target):
                found.append(f"{other}={value:g} ({tried[other]:g} lets it)")
                break
    if found:
        return f"it is limited by {' and by '.join(found)}"
    return "no other number lets it: the pictures' patches are equal, or too few; take more pictures"


def _reaches(
    name: str, field: str, fixed: Mapping[str, Any], images: Sequence[Tensor], side: int, target: float
) -> bool:
    """Whether some value of the field comes near the target."""
    try:
        shares = [removed_share(build(name, {**fixed, field: value}), images, side) for value in (0.0, 1.0)]
        if not shares[0] + NEAR >= target >= shares[1] - NEAR:
            return False
        ends = bisected(lambda v: removed_share(build(name, {**fixed, field: v}), images, side) >= target)
        return any(abs(removed_share(build(name, {**fixed, field: v}), images, side) - target) <= NEAR for v in ends)
    except PruningError:  # a value that this parameter cannot have
        return False


def bisected(enough: Callable[[float], bool]) -> tuple[float, float]:
    """Neighbours in [0, 1] between which `enough` ends to be true, to 2^-STEPS."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low, high
