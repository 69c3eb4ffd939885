"""Which cases of a product a run takes: a covering part, or with VTP_FULL_MATRIX=1 (`make test-full`) all of them.

Most tests are functions of several axes: family, stage, strategy, signal, kernel, layout. The promise is about the
whole product, which takes hours. A test marked `covering` takes as few of its cases as show

* every value of every axis, and
* every combination of the axes that a mark names together: `covering("name stage", "stage layout")`.

Among cases that show as much the one wins that brings most new pairs of values, so that what is not asked for is still
spread over what is run. So a default run proves that every family, stage, strategy, signal, kernel and layout works
somewhere in every such test, and that what is named together works together; a fault that needs three values at once,
or two that no mark names, may be left to the full run. An axis is an argument of `parametrize`, a fixture's parameter,
or what a function of the mark makes of these: `covering("name kernel", kernel=where_it_matters)`.

The choice is the same in every process and another for every test. It is made among what is collected: a case that is
named alone is run.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from heapq import heappop, heapreplace
from itertools import combinations
from typing import Any

import pytest

Case = Mapping[str, Hashable]

FULL = bool(os.environ.get("VTP_FULL_MATRIX"))
PRODUCTS = pytest.StashKey[
    dict[str, tuple[list[Case], list[Case], tuple[str, ...]]]
]()  # test: cases, those taken, named


def covering(cases: Sequence[Case], *together: str, salt: str = "", full: bool = FULL) -> list[int]:
    """Which of the cases are run: their places, ascending. `together`: names of axes, apart by spaces.

    `salt`: cases that show as much are taken in another order for every salt.
    """
    if full:
        return list(range(len(cases)))
    groups = [*together, *(axis for axis in cases[0] if axis not in " ".join(together).split())]
    wanted = [_shown(case, groups) for case in cases]
    pairs = [_shown(case, [" ".join(pair) for pair in combinations(sorted(case), 2)]) for case in cases]
    turn = [zlib.crc32(f"{salt}{sorted(case.items())}".encode()) for case in cases]
    missing, met, taken = set().union(*wanted), set(), []

    def worth(i: int) -> tuple[int, int, int, int]:
        return -len(wanted[i] & missing), -len(pairs[i] - met), -turn[i], i

    ahead = sorted(map(worth, range(len(cases))))  # a heap; nothing is worth more than when it was last looked at
    while missing:
        best = ahead[0][-1]
        if (now := worth(best)) != ahead[0]:
            heapreplace(ahead, now)
            continue
        heappop(ahead)
        missing -= wanted[best]
        met |= pairs[best]
        taken.append(best)
    return sorted(taken)


def _shown(case: Case, groups: Iterable[str]) -> set[Hashable]:
    """The values that a case has, group by group."""
    return {(group, tuple(case[axis] for axis in group.split())) for group in groups}


def dear(every: Iterable[str], stand_ins: Iterable[str], full: bool = FULL) -> list[str]:
    """Values of an axis of which each takes seconds: those that stand for the others by default."""
    every, few = list(every), set(stand_ins)
    if unknown := few - set(every):
        raise ValueError(f"not values of the axis: {', '.join(sorted(unknown))}")
    return [value for value in every if full or value in few]


# -- at collection ----------------------------------------------------------------------------------------------------


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what the default run leaves out of the tests that are marked `covering`."""
    products: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("covering") and hasattr(item, "callspec"):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    spared: set[pytest.Item] = set()
    seen = config.stash.setdefault(PRODUCTS, {})
    for name, group in products.items():
        mark = group[0].get_closest_marker("covering")
        cases = [_case(item.callspec, mark.kwargs) for item in group]
        taken = covering(cases, *mark.args, salt=name)
        seen[name] = cases, [cases[place] for place in taken], mark.args
        spared |= set(group) - {group[place] for place in taken}
    if spared:
        config.hook.pytest_deselected(items=list(spared))
        items[:] = [item for item in items if item not in spared]


def _case(callspec: Any, derived: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> Case:
    """What tells parameters from others, in every process: their text, or their place where the text has an address."""
    texts = {axis: repr(value) for axis, value in callspec.params.items()}
    plain = {axis: str(callspec.indices[axis]) if " at 0x" in text else text for axis, text in texts.items()}
    return plain | {axis: make(callspec.params) for axis, make in derived.items()}
