"""What a method is held against: controls of the same budget, and how sure a difference is among many methods.

There are two budgets, because methods between decoder layers leave few tokens behind and still pay for many: the tokens
that the last layer sees, and tokens x layers, what all layers see on average. Before the language model they are one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vtp_plugin.reporting import statistics
from vtp_plugin.reporting.rows import Row, difference, paired
from vtp_plugin.reporting.runs import BASELINE
from vtp_plugin.reporting.statistics import Estimate

CONTROLS = ("random", "stride")  # what a method has to beat
SURE = 0.05  # of Holm's adjusted p
FINAL, SPENT = "final tokens", "tokens x layers"
BUDGETS: Mapping[str, Callable[[Row], float]] = {FINAL: lambda row: row.final, SPENT: lambda row: row.spent}


@dataclass(frozen=True)
class Held:
    """A row against a control."""

    row: Row
    control: Row
    gain: Estimate  # of the mean over the tasks
    p: float  # sign-flip permutation test, adjusted for all rows that are held against this control (Holm)

    @property
    def shown(self) -> bool:
        """Whether the row is shown to be better."""
        return self.gain.value > 0 and self.p <= SURE

    def numbers(self) -> dict[str, float]:
        return {**asdict(self.gain), "p": self.p}


class Controls:
    """All rows of a run against the controls; every comparison is made once."""

    def __init__(self, everything: Sequence[Row]) -> None:
        self.everything = everything
        self._compared: dict[tuple[str, str], tuple[Estimate, float]] = {}
        self._held: dict[tuple[str, str], dict[str, Held]] = {}

    def held(self, control: str = CONTROLS[0], budget: str = FINAL) -> dict[str, Held]:
        """The rows that there is such a control for, by their id."""
        if (control, budget) not in self._held:
            pairs = [(row, other) for row in self.everything if (other := self._within(row, control, budget))]
            found = [self._compare(*pair) for pair in pairs]
            adjusted = statistics.holm([p for _, p in found])
            self._held[control, budget] = {
                row.id: Held(row, other, gain, p)
                for (row, other), (gain, _), p in zip(pairs, found, adjusted, strict=True)
            }
        return self._held[control, budget]

    def of(self, row: Row, budget: str = FINAL) -> dict[str, Any]:
        """The numbers of one row, by control."""
        found = {control: self.held(control, budget).get(row.id) for control in CONTROLS}
        return {control: held.numbers() for control, held in found.items() if held is not None}

    def behind(self) -> dict[tuple[str, str], list[Held]]:
        """(control, budget) -> the rows that are not shown to be better, if there are any; each pair of rows once."""
        said: set[tuple[str, str]] = set()
        found = {}
        for control in CONTROLS:
            for budget in BUDGETS:
                behind = [held for held in self.held(control, budget).values() if not held.shown]
                pairs = {(held.row.id, held.control.id): held for held in behind}
                if new := {pair: held for pair, held in pairs.items() if pair not in said}:
                    found[control, budget] = list(new.values())
                said |= set(pairs)
        return found

    def unmatched(self) -> list[Row]:
        """Rows that spend more than they leave, and have no random control that spends as much."""
        there, alone = self.held(CONTROLS[0], SPENT), self.held(CONTROLS[0], FINAL)
        return [row for row in self.everything if row.id in alone and row.id not in there]

    def _within(self, row: Row, control: str, budget: str) -> Row | None:
        """The control's largest budget within the row's; None without one, and for a control.

        A control with less than half of the row's budget is none: anything beats it.
        """
        if row.cells[0].pruning in (BASELINE, *CONTROLS):
            return None
        spends = BUDGETS[budget]
        rows = [other for other in self.everything if other.cells[0].pruning == control]
        within = [other for other in rows if spends(row) / 2 <= spends(other) <= spends(row) + 0.5]
        return max(within, key=spends, default=None)

    def _compare(self, row: Row, other: Row) -> tuple[Estimate, float]:
        if (row.id, other.id) not in self._compared:
            p = statistics.flipped_signs([paired(row, other, task) for task in row.tasks])
            self._compared[row.id, other.id] = difference(row, other), p
        return self._compared[row.id, other.id]
