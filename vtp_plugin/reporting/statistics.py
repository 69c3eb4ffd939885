"""What a difference between two configurations is worth: intervals, paired tests, flipped answers.

All functions are pure: arrays in, numbers out. Values are those of `vtp_plugin.reporting.runs.value`, in [0, 1] for
nearly all tasks; an answer is *right* when its value is at least one half. Intervals are 95 % percentile intervals of
RESAMPLES bootstrap samples, except that of an accuracy of plain right and wrong answers, which is Wilson's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
FLIPS, CHUNK = 4999, 1000
ROUNDING = 1e-9  # of sums in another order
RIGHT = 0.5
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Estimate:
    """A number and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Flips:
    """Answers that changed sides, and how unlikely that is if both configurations were equally good."""

    lost: int  # right before, wrong now
    won: int  # wrong before, right now
    p: float  # McNemar's exact test, two-sided


@dataclass(frozen=True)
class YesNo:
    """Of a task whose answers are yes and no; what is neither counts as not yes. 0 where a denominator is 0."""

    yes_ratio: float
    precision: float
    recall: float
    f1: float


def accuracy(values: ArrayLike) -> Estimate:
    """Mean of one task's values [N]: Wilson's interval where they are 0 or 1, the bootstrap's where they are not."""
    values = np.asarray(values, dtype=float)
    if not np.isin(values, (0, 1)).all():
        return difference([values])
    found = stats.binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, method="wilson")
    return Estimate(float(values.mean()), float(found.low), float(found.high))


def difference(differences: Sequence[ArrayLike]) -> Estimate:
    """Mean over tasks of the mean of each task's paired differences [N of the task]; tasks are resampled apart."""
    parts = [np.asarray(part, dtype=float) for part in differences]
    value = float(np.mean([part.mean() for part in parts]))
    if all(np.ptp(part) == 0 for part in parts):
        return Estimate(value, value, value)
    found = stats.bootstrap(
        parts,
        _mean_of_means,
        vectorized=True,
        paired=False,  # within a task the pairs are already differences
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // max(map(len, parts))),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))


def _mean_of_means(*parts: NDArray, axis: int = -1) -> NDArray:
    return np.mean([part.mean(axis=axis) for part in parts], axis=0)


def flipped_signs(differences: Sequence[ArrayLike]) -> float:
    """Whether the mean over tasks of paired differences [N of the task] is 0: sign-flip permutation test, two-sided.

    If two configurations were equally good, every difference could as well have the other sign. p of FLIPS random
    choices of signs, the observed one included (Phipson and Smyth 2010), so at least 1 / (FLIPS + 1).
    """
    draw, drawn, value = np.random.default_rng(0), np.zeros(FLIPS), 0.0
    for part in (np.asarray(part, dtype=float) for part in differences):
        value += part.mean()
        changed = part[part != 0]
        for start in range(0, len(changed), CHUNK):
            some = changed[start : start + CHUNK]
            drawn += (2 * draw.integers(0, 2, (FLIPS, len(some)), dtype=np.int8) - 1) @ some / len(part)
    return float((np.sum(np.abs(drawn) >= abs(value) - ROUNDING) + 1) / (FLIPS + 1))


def holm(p: Sequence[float]) -> list[float]:
    """p of several tests, adjusted so that all together err as rarely as one (Holm 1979, step-down); same order."""
    order = np.argsort(p)
    adjusted = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order)].tolist()


def right(values: ArrayLike) -> NDArray:
    """Which answers count as right, bool [N]."""
    return np.asarray(values, dtype=float) >= RIGHT


def flips(before: ArrayLike, now: ArrayLike) -> Flips:
    """Between the values of two configurations for the same questions, [N] each."""
    before, now = right(before), right(now)
    lost, won = int((before & ~now).sum()), int((~before & now).sum())
    return Flips(lost, won, float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0)


def normal(answer: str) -> str:
    """An answer in lower case, without blanks around it and without a full stop."""
    return answer.strip().rstrip(".").strip().lower()


def agreement(before: Sequence[str], now: Sequence[str]) -> float:
    """The share of questions with the same answer, right or wrong."""
    return float(np.mean([normal(a) == normal(b) for a, b in zip(before, now, strict=True)]))


def is_yes_no(targets: Sequence[str]) -> bool:
    """Whether a task asks for yes or no, as POPE does."""
    return {normal(target) for target in targets} <= {YES, NO}


def yes_no(answers: Sequence[str], targets: Sequence[str]) -> YesNo:
    """Of the answers to a task of yes and no."""
    said = np.array([normal(answer) == YES for answer in answers])
    true = np.array([normal(target) == YES for target in targets])
    precision, recall = _share((said & true).sum(), said.sum()), _share((said & true).sum(), true.sum())
    return YesNo(float(said.mean()), precision, recall, _share(2 * precision * recall, precision + recall))


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def pooled(seeds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean value of every question over several runs that differ in their random seed."""
    return {number: float(np.mean([run[number] for run in seeds])) for number in seeds[0]}
