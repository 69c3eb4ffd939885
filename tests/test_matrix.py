"""The part of a product that a default run takes shows every value of every axis, and what its mark names together."""

from __future__ import annotations

from itertools import product

import matrix
import pytest
from matrix import covering, dear

AXES = {"name": "abcdef", "stage": "pvl", "kernel": "es", "layout": "123"}
CASES = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]


def shown(cases: list[matrix.Case], axes: str) -> set[tuple]:
    return {tuple(case[axis] for axis in axes.split()) for case in cases}


@pytest.mark.parametrize(
    ("together", "most"),
    [((), 6), (("name stage",), 18), (("name stage", "kernel layout"), 18), (("name stage", "name layout"), 24)],
    ids=str,
)
def test_every_value_and_what_belongs_together(together: tuple[str, ...], most: int) -> None:
    part = [CASES[place] for place in covering(CASES, *together, full=False)]
    for axes in (*AXES, *together):
        assert shown(part, axes) == shown(CASES, axes)
    assert len(part) <= most


def test_pairs_that_nobody_asked_for_are_spread() -> None:
    part = [CASES[place] for place in covering(CASES, "name stage", full=False)]
    for axes in ("name kernel", "name layout", "stage kernel", "stage layout", "kernel layout"):
        assert len(shown(part, axes)) >= 0.75 * len(shown(CASES, axes))


def test_products_with_holes_are_covered_too() -> None:
    """Where some combinations do not exist, as videos at stages of families that take none."""
    cases = [case for case in CASES if case["layout"] != "3" or case["name"] in "ab"]
    part = [cases[place] for place in covering(cases, "name stage", full=False)]
    assert shown(part, "name stage") == shown(cases, "name stage")
    assert shown(part, "layout") == {("1",), ("2",), ("3",)}


def test_the_full_matrix_is_everything_in_its_order() -> None:
    assert covering(CASES, full=True) == list(range(len(CASES)))
    assert dear("abc", "b", full=True) == ["a", "b", "c"]
    assert dear("abc", "b", full=False) == ["b"]


def test_a_value_that_stands_for_others_is_one_of_them() -> None:
    with pytest.raises(ValueError, match="x"):
        dear("abc", "bx")


@pytest.mark.covering("name stage")
@pytest.mark.parametrize("layout", AXES["layout"])
@pytest.mark.parametrize("kernel", AXES["kernel"])
@pytest.mark.parametrize(("name", "stage"), [("a", "p"), ("a", "v"), ("b", "p")])
def test_of_every_test_of_this_run(
    name: str, stage: str, kernel: str, layout: str, request: pytest.FixtureRequest
) -> None:
    """Every product of the suite, this one among them."""
    products = request.config.stash[matrix.PRODUCTS]
    assert any(test.endswith(request.node.originalname) for test in products)
    for test, (cases, part, together) in products.items():
        for axes in (*cases[0], *together):
            assert shown(part, axes) == shown(cases, axes), (test, axes)
