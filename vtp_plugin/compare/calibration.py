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


Views = Sequence[VisualTokens]  # what strategies of the pixels stage see of one picture: all of it, or its tiles


def removed_share(strategies: PruningStrategy | Sequence[PruningStrategy], pictures: Sequence[Views]) -> float:
    """Mean over pictures of the share of the patches that strategies of the pixels stage remove together."""
    shares = [1 - left(strategies, views) / total(views) for views in pictures]
    return sum(shares) / len(shares)


def total(views: Views) -> int:
    """Patches of a picture."""
    return sum(view.index.shape[1] for view in views)


def left(strategies: PruningStrategy | Sequence[PruningStrategy], views: Views) -> int:
    """How many patches of a picture strategies of the pixels stage leave."""
    return sum(len(index) for index in kept(strategies, views))


def kept(strategies: PruningStrategy | Sequence[PruningStrategy], views: Views) -> list[Tensor]:
    """The raster positions [K] that strategies leave of every view, each seeing what the one before left."""
    chain, found = [strategies] if isinstance(strategies, PruningStrategy) else list(strategies), []
    for view in views:
        for strategy in chain:
            columns = strategy.decide(view).sources[0]
            pixels, index = view.pixels[:, columns], view.index[:, columns]
            view = VisualTokens(pixels.flatten(2), view.grid, index, pixels=pixels)
        found.append(view.index[0])
    return found


@dataclass(frozen=True)
class Calibrated:
    """The strategy that comes nearest to a target, the share that it removes, and what keeps it from the target."""

    strategy: PruningStrategy
    share: float
    remark: str = ""  # "" where the target is met


def nearest(name: str, field: str, fixed: Mapping[str, Any], pictures: Sequence[Views], target: float) -> Calibrated:
    """The strategy whose `field` in [0, 1] removes the share nearest to the target; a higher value removes less.

    The remark says, where the share is more than NEAR from the target, why no value comes nearer.
    """
    if field in fixed:
        raise PruningError(f"{field} is what is looked for; it cannot be given")

    def at(value: float) -> tuple[float, PruningStrategy]:
        strategy = build(name, {**fixed, field: value})
        return removed_share(strategy, pictures), strategy

    ends = {"at most": at(0.0), "at least": at(1.0)}
    beyond = [ends["at most"][0] < target, ends["at least"][0] > target]
    if any(beyond):
        bound, (share, chosen) = next(pair for pair, is_it in zip(ends.items(), beyond, strict=True) if is_it)
        said = f"{name}: {bound} {share:.1%} can be removed here whatever {field} is, {target:.1%} asked"
    else:
        tried = [at(round(value, 6)) for value in bisected(lambda value: at(value)[0] >= target)]
        share, chosen = min(tried, key=lambda found: abs(found[0] - target))
        step = " to ".join(f"{found[0]:.1%}" for found in tried)
        said = f"{name}: {field} goes from {step} in one step here, {target:.1%} asked"
    return Calibrated(chosen, share, "" if abs(share - target) <= NEAR else said)


def calibrate(name: str, field: str, fixed: Mapping[str, Any], pictures: Sequence[Views], target: float) -> Calibrated:
    """The nearest strategy; where it is off, its remark also says which other parameter limits it.

    PruningError, with that remark, if its share is more than FAR from the target.
    """
    found = nearest(name, field, fixed, pictures, target)
    if not found.remark:
        return found
    remark = f"{found.remark}; {limits(name, field, fixed, pictures, target)}"
    if abs(found.share - target) > FAR:
        raise PruningError(remark)
    return Calibrated(found.strategy, found.share, remark)


def limits(name: str, field: str, fixed: Mapping[str, Any], pictures: Sequence[Views], target: float) -> str:
    """Which other parameters, changed one by one, let the target be met: `it is limited by chi2_threshold=5 (...)`."""
    config = build(name, dict(fixed)).config()
    found = []
    for other, value in config.items():
        if other == field or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        for factor in FACTORS:
            tried = {**fixed, other: type(value)(value * factor)}
            if tried[other] != value and _reaches(name, field, tried, pictures, target):
                found.append(f"{other}={value:g} ({tried[other]:g} lets it)")
                break
    if found:
        return f"it is limited by {' and by '.join(found)}"
    return "no other number lets it: the pictures' patches are equal, or too few; take more pictures"


def _reaches(name: str, field: str, fixed: Mapping[str, Any], pictures: Sequence[Views], target: float) -> bool:
    """Whether some value of the field comes near the target."""
    try:
        shares = [removed_share(build(name, {**fixed, field: value}), pictures) for value in (0.0, 1.0)]
        if not shares[0] + NEAR >= target >= shares[1] - NEAR:
            return False
        ends = bisected(lambda v: removed_share(build(name, {**fixed, field: v}), pictures) >= target)
        return any(abs(removed_share(build(name, {**fixed, field: v}), pictures) - target) <= NEAR for v in ends)
    except PruningError:  # a value that this parameter cannot have
        return False


def bisected(enough: Callable[[float], bool]) -> tuple[float, float]:
    """Neighbours in [0, 1] between which `enough` ends to be true, to 2^-STEPS."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low, high
