"""Intervals, tests and flips: against scipy on fixed data, and against slow restatements."""

from __future__ import annotations

import itertools
import math
import random
from math import comb

import numpy as np
import pytest
from scipy import stats

from vtp_plugin.reporting import statistics

DRAW = np.random.default_rng(1)
BEFORE = (DRAW.random(120) < 0.8).astype(float)
NOW = np.where(DRAW.random(120) < 0.2, 1 - BEFORE, BEFORE)
GRADED = DRAW.choice([0, 0.3, 0.6, 0.9, 1.0], 90)


def test_accuracy_of_right_and_wrong_has_wilsons_interval() -> None:
    found = statistics.accuracy(BEFORE)
    n, p, z = len(BEFORE), BEFORE.mean(), stats.norm.ppf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert found.value == pytest.approx(p)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
    assert statistics.accuracy(np.ones(50)).low < 1 == statistics.accuracy(np.ones(50)).high


def test_accuracy_of_graded_answers_has_a_bootstrap_interval() -> None:
    found = statistics.accuracy(GRADED)
    normal = 1.96 * GRADED.std() / math.sqrt(len(GRADED))
    assert found.value == pytest.approx(GRADED.mean())
    assert (found.low, found.high) == pytest.approx((found.value - normal, found.value + normal), abs=0.015)


def test_the_paired_bootstrap_equals_scipys() -> None:
    found = statistics.difference([NOW - BEFORE])
    expected = stats.bootstrap(
        (BEFORE, NOW),
        lambda a, b, axis: (b - a).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=statistics.RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found.value == pytest.approx((NOW - BEFORE).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def slow_bootstrap(parts: list[np.ndarray], resamples: int) -> tuple[float, float]:
    """Every task drawn apart with Python's own generator, one question at a time."""
    draw, means = random.Random(5), []
    for _ in range(resamples):
        drawn = [[draw.choice(part) for _ in part] for part in parts]
        means.append(sum(sum(part) / len(part) for part in drawn) / len(parts))
    means.sort()
    return means[round(0.025 * resamples)], means[round(0.975 * resamples)]


def test_tasks_of_unequal_size_weigh_the_same() -> None:
    parts = [NOW - BEFORE, GRADED[:20] - 0.5, GRADED[20:50] ** 2]
    found = statistics.difference(parts)
    assert found.value == pytest.approx(np.mean([part.mean() for part in parts]))
    assert (found.low, found.high) == pytest.approx(slow_bootstrap([list(p) for p in parts], 2000), abs=0.02)


def test_no_difference_has_no_width() -> None:
    assert statistics.difference([np.zeros(9)]) == statistics.Estimate(0, 0, 0)
    assert statistics.difference([np.full(9, 0.25)]) == statistics.Estimate(0.25, 0.25, 0.25)


def test_an_interval_is_reproducible() -> None:
    assert statistics.difference([NOW - BEFORE]) == statistics.difference([NOW - BEFORE])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        found = statistics.difference([draw.choice([-1.0, 0.0, 1.0], 100, p=[0.2, 0.7, 0.1])])
        covered += found.low <= -0.1 <= found.high
    assert stats.binomtest(covered, 200, 0.95).pvalue > 1e-3


@pytest.mark.parametrize(("lost", "won"), itertools.product((0, 1, 5, 20), (0, 2, 9)))
def test_flips_and_mcnemar(lost: int, won: int) -> None:
    before = [1.0] * lost + [0.0] * won + [1.0, 0.0, 0.6, 0.4]
    now = [0.0] * lost + [1.0] * won + [1.0, 0.0, 0.9, 0.1]
    found = statistics.flips(before, now)
    assert (found.lost, found.won) == (lost, won)
    n = lost + won
    tail = sum(comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    assert found.p == pytest.approx(min(1.0, 2 * tail))


def test_agreement_is_about_answers_not_about_being_right() -> None:
    assert statistics.agreement(["Yes.", "no", "a cat"], ["yes", " no ", "a dog"]) == pytest.approx(2 / 3)


def test_yes_and_no() -> None:
    targets = ["yes", "yes", "yes", "no", "no", "no"]
    answers = ["Yes.", "yes", "no", "yes", "no", "a cat"]
    found = statistics.yes_no(answers, targets)
    assert found.yes_ratio == pytest.approx(3 / 6)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    assert statistics.yes_no(["no", "no"], ["yes", "no"]) == statistics.YesNo(0, 0, 0, 0)
    assert statistics.is_yes_no(targets)
    assert not statistics.is_yes_no([*targets, "red"])


def test_yes_and_no_as_popes_own_scores() -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks.pope import utils

    draw = random.Random(2)  # POPE does not miss a yes that was answered neither way: there the two recalls differ
    targets, answers = draw.choices(["yes", "no"], k=60), draw.choices(["yes", "no"], k=60)
    entries = [{"prediction": a, "ground_truth": t} for a, t in zip(answers, targets, strict=True)]
    found = statistics.yes_no(answers, targets)
    assert found.precision == pytest.approx(utils.pope_aggregate_precision(entries))
    assert found.recall == pytest.approx(utils.pope_aggregate_recall(entries))
    assert found.f1 == pytest.approx(utils.pope_aggregate_f1_score(entries))
    assert found.yes_ratio == pytest.approx(answers.count("yes") / 60)  # the host's is the share among the targets
    assert utils.pope_aggregate_yes_ratio(entries) == pytest.approx(targets.count("yes") / 60)


def test_seeds_are_pooled_by_question() -> None:
    runs = [{0: 1.0, 1: 0.0}, {1: 1.0, 0: 1.0}, {0: 0.0, 1: 1.0}]
    assert statistics.pooled(runs) == {0: pytest.approx(2 / 3), 1: pytest.approx(2 / 3)}


def test_signs_are_flipped_as_scipy_swaps_pairs() -> None:
    """One task: the same test as scipy's of paired samples; its own draws, so close and not equal."""
    draw = np.random.default_rng(3)
    for shift in (0.0, 0.15, 0.4):
        first, second = (draw.random(60) < 0.5 + shift).astype(float), (draw.random(60) < 0.5).astype(float)
        expected = stats.permutation_test(
            (first, second), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=20_000, rng=1
        ).pvalue
        assert statistics.flipped_signs([first - second]) == pytest.approx(expected, abs=0.02)


def test_tasks_weigh_the_same_in_the_permutation_test() -> None:
    """Exactly, over all signs of two small tasks."""
    tasks = [np.array([1.0, 1.0, -1.0]), np.array([1.0, 0.0, 1.0, 1.0, 0.0])]
    observed = abs(sum(task.mean() for task in tasks))
    signs = itertools.product((-1, 1), repeat=8)
    sums = [(tasks[0] * s[:3]).mean() + (tasks[1] * s[3:]).mean() for s in map(np.array, signs)]
    as_far = [abs(each) >= observed - 1e-9 for each in sums]
    assert statistics.flipped_signs(tasks) == pytest.approx(np.mean(as_far), abs=0.02)
    assert statistics.flipped_signs([np.zeros(4)]) == 1.0


def test_holm_is_the_step_down_procedure() -> None:
    """By hand: 0.01 x 4, 0.02 x 3, max(0.06, 0.03 x 2), max(0.06, 0.5 x 1)."""
    assert statistics.holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []
