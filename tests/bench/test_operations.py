"""How many operations a selection asks for: bounded, few per pick where picks depend on each other, none per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vtp_plugin import plugins
from vtp_plugin.bench.operations import operations
from vtp_plugin.samples import NARROW, run, sample
from vtp_plugin.strategy import PruningStrategy

CPU = torch.device("cpu")
PER_PICK = {  # operations for one more kept token, of methods whose picks depend on each other
    "cdpruner": 19,
    "coreprune": 8,  # four at a time
    "divprune": 7,
    "flashvid": 0.7,  # 70 % of them frame by frame, eight frames at a time
    "mmtok": 8,
    "scope": 9,
    "vtp": 7,
}
GROWING = {"fitprune", "pyramiddrop", "downsample", "prunesid", "vispruner", "tome"}  # with other things than picks
# These walk over the picture, or keep more of more tokens.
WALKING = {"fitprune", "pixelprune", "prunesid", "pyramiddrop", "sparsevlm", "tome"}
PER_TOKEN = {"vispruner": 7 / 8}  # thins out eight at a time, each time among those that are left
AT_ONCE = ("cdpruner", "divprune", "mmtok", "scope", "vispruner", "vtp", "dart")  # images of a batch, in one decision


def asked(strategy: PruningStrategy, n: int, b: int = 1) -> int:
    seen = sample(strategy, n, b=b, widths=NARROW, device=CPU)
    return operations(lambda: run(strategy, seen))


def built(name: str, **fields: Any) -> PruningStrategy:
    cls = plugins.get_strategy(name)
    return cls(**(fields if cls.budgeted else {}))


def test_what_is_counted() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert operations(lambda: x.t().reshape(2, 6).sum(0)) == 2  # a copy and a sum
    assert operations(lambda: x[None, 1:].transpose(0, 1)) == 0
    assert operations(lambda: (x + 1) * 2) == 2


@pytest.mark.parametrize("name", sorted(set(plugins.strategies()) - GROWING))
def test_operations_of_one_more_pick(name: str) -> None:
    few, many = (asked(built(name, keep_tokens=k), 144) for k in (40, 80))
    assert (many - few) / 40 <= PER_PICK.get(name, 0)


@pytest.mark.parametrize("name", sorted(set(plugins.strategies()) - WALKING))
def test_operations_do_not_grow_with_the_tokens(name: str) -> None:
    small, large = (asked(built(name, keep_tokens=32), n) for n in (144, 576))
    assert large <= 1.1 * small + 10 + (576 - 144) * PER_TOKEN.get(name, 0)


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_batch_costs_no_more_operations_than_an_image(name: str) -> None:
    alone, four = (asked(built(name, keep_tokens=32), 144, b) for b in (1, 4))
    assert four <= 1.3 * alone + 150
