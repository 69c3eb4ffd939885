"""Both layouts of LLaVA; with both attention kernels where a case reads attention or changes its masks."""

from __future__ import annotations

import pytest
from family_runs import FULL
from models import FAMILIES, Tiny, tiny
from promises import CASES

from vtp_plugin import PruningStrategy, Stage, get_strategy, signals
from vtp_plugin.signals import BlockView


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    if request.param == "llava":
        pytest.importorskip("llava")
    return request.param


@pytest.fixture(params=["eager", "sdpa"])
def host(request, family: str) -> Tiny:
    return tiny(family, request.param)


@pytest.fixture
def sdpa(family: str) -> Tiny:
    return tiny(family, "sdpa")


def meets_attention(strategy: PruningStrategy) -> bool:
    """Whether the kernel matters: signals of the tower's blocks, merging inside them, masks of decoder layers."""
    blocks = any(signal.view is BlockView for signal in signals.needed(strategy))
    return blocks or strategy.stage is Stage.LLM or strategy.name == "tome"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases that never meet attention run with one kernel; VTP_FULL_MATRIX=1: with both."""
    alike = {
        case for case, cut in CASES.items() if not any(meets_attention(get_strategy(name)(**f)) for name, f in cut)
    }
    chosen = {id(item): getattr(getattr(item, "callspec", None), "params", {}) for item in items}
    spared = (
        []
        if FULL
        else [i for i in items if chosen[id(i)].get("host") == "eager" and chosen[id(i)].get("case") in alike]
    )
    if spared:
        config.hook.pytest_deselected(items=spared)
        gone = set(map(id, spared))
        items[:] = [item for item in items if id(item) not in gone]
