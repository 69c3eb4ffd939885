"""The numbers of one cell of a run against the unpruned one: accuracy, flips, and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vtp_plugin.reporting import statistics
from vtp_plugin.reporting.runs import Cell
from vtp_plugin.reporting.statistics import Estimate, Flips


@dataclass(frozen=True)
class Measures:
    """Of `cell`, over the tasks that have a value per question. Ratios are relative to `baseline`."""

    cell: Cell
    baseline: Cell

    @cached_property
    def accuracies(self) -> dict[str, Estimate]:
        return {task: statistics.accuracy(self._values(self.cell, task)) for task in self.tasks}

    @cached_property
    def mean(self) -> Estimate:
        """Over the tasks, every one of them counting the same."""
        return statistics.difference([self._values(self.cell, task) for task in self.tasks])

    @cached_property
    def change(self) -> Estimate:
        """Of the mean accuracy, question by question."""
        pairs = ((self._values(self.cell, task), self._values(self.baseline, task)) for task in self.tasks)
        return statistics.difference([now - before for now, before in pairs])

    @cached_property
    def flips(self) -> Flips:
        """Over the questions of all tasks."""
        before, now = (
            np.concatenate([self._values(cell, task) for task in self.tasks]) for cell in (self.baseline, self.cell)
        )
        return statistics.flips(before, now)

    @cached_property
    def agreement(self) -> float:
        """The share of all questions with the unpruned model's answer."""
        before, now = (
            [answer.answer for task in self.tasks for answer in _ordered(cell, task)]
            for cell in (self.baseline, self.cell)
        )
        return statistics.agreement(before, now)

    @property
    def tasks(self) -> list[str]:
        return list(self.baseline.accuracies)

    @property
    def tokens(self) -> Mapping[str, Any]:
        """Of the record: mean_before and mean_after per image."""
        return self.cell.record["visual_tokens"]

    @property
    def kept(self) -> float:
        """Visual tokens that are left / all."""
        return self.tokens["after"] / max(1, self.tokens["before"])

    @property
    def flops(self) -> float | None:
        """FLOPs of the whole prefill, relative to the same prompts unpruned; None where they were not counted."""
        counted = self.cell.record["prefill_flops"]
        return counted["ratio"] if counted["before"] else None

    @property
    def first_token(self) -> float | None:
        """Time to the first token relative to the unpruned run; None where it was not measured."""
        own, before = first_token(self.cell.record), first_token(self.baseline.record)
        return own / before if own and before else None

    @staticmethod
    def _values(cell: Cell, task: str) -> np.ndarray:
        return np.array([answer.correct for answer in _ordered(cell, task)], dtype=float)


def first_token(record: Mapping[str, Any]) -> float:
    """Seconds per sample until the first token: vision tower and decoder layers, selection included."""
    seconds = record["seconds"]
    return (seconds["tower"] + seconds["prefill"]) / max(1, record["samples"]["total"])


def _ordered(cell: Cell, task: str) -> list[Any]:
    answers = cell.answers(task)
    return [answers[number] for number in sorted(answers)]
