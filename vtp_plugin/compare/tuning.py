"""The smallest keep ratio that costs little enough accuracy, by bisection over a grid, in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp_plugin import config
from vtp_plugin.compare import matrix, sweep
from vtp_plugin.errors import Failed, PruningError
from vtp_plugin.reporting import rows, verdicts
from vtp_plugin.reporting.statistics import Estimate


@dataclass(frozen=True)
class Tuned:
    """What was found for one strategy."""

    spec: str
    drop: float  # allowed, of the mean accuracy
    keep: float | None  # None: no keep ratio of the grid stays within it
    tried: dict[float, Estimate]  # keep ratio -> difference from the unpruned model

    def sentence(self) -> str:
        """The outcome, with the interval that decided it."""
        allowed = f"within a drop of {100 * self.drop:g} points"
        if self.keep is None:
            best = max(self.tried)
            return (
                f"{self.spec}: no keep ratio stays {allowed}; "
                f"at {best:g} the difference is {verdicts.points(self.tried[best])}"
            )
        return f"{self.spec}: keep_ratio={self.keep:g} stays {allowed}: {verdicts.points(self.tried[self.keep])}"


def check(spec: str) -> None:
    """Refuse what has no keep ratio."""
    if not any(strategy.budgeted for strategy in config.resolve(spec)):
        raise PruningError(f"{spec} has no keep ratio to tune, its thresholds decide")


def grid(step: float) -> list[float]:
    """Keep ratios step, 2 step, ... below 1."""
    if not 0.01 <= step <= 0.5:
        raise PruningError(f"--step must be in [0.01, 0.5], got {step:g}")
    return [round(number * step, 6) for number in range(1, round(1 / step) + 1) if round(number * step, 6) < 1]


def tune(folder: Path, spec: str, ratios: Sequence[float], drop: float, **host: Any) -> Tuned:
    """The smallest of the ascending ratios whose interval's lower end is not below -drop.

    Bisection: a larger ratio is taken to cost no more than a smaller one. `host`: arguments of `sweep.run`.
    """
    tried: dict[float, Estimate] = {}

    def passes(ratio: float) -> bool:
        tried[ratio] = _measured(folder, spec, ratio, **host)
        return tried[ratio].low >= -drop - 1e-12

    return Tuned(spec, drop, smallest(ratios, passes), tried)


def smallest(ratios: Sequence[float], passes: Callable[[float], bool]) -> float | None:
    """The first of the ascending ratios that passes, if all behind one that passes do, too; None if the last fails."""
    if not passes(ratios[-1]):
        return None
    low, high = 0, len(ratios) - 1  # ratios[high] passes
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(ratios[middle]) else (middle + 1, high)
    return ratios[high]


def _measured(folder: Path, spec: str, ratio: float, **host: Any) -> Estimate:
    """The difference of one cell from the unpruned model, run if it has not been."""
    cell = matrix.cell(spec, ratio)
    run = sweep.run(folder, [matrix.UNPRUNED, cell], **host)
    if run[cell.id].error:
        raise Failed(f"{cell.id} failed: {run[cell.id].error}")
    unpruned = rows.Row([run.baseline], run.tasks)
    return rows.difference(rows.Row([run[cell.id]], run.tasks), unpruned)
