"""Nothing of a call stays alive after it: no features, pixel values, masks or signals."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
import torch
from family_runs import SHALLOW, by_kind, model_of
from torch import Tensor

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError

EARLY = ("vprune", "l2")
NAMES = ("stride", "visionzip", "vtp", "fastv", "sparsevlm", "dart")


@contextmanager
def new_tensors() -> Iterator[list[Tensor]]:
    """Those that were made inside and are alive at its end; what was there before is frozen, out of sight."""
    found: list[Tensor] = []
    gc.freeze()  # with the garbage in it: to collect that first would take most of the time
    try:
        yield found
        gc.collect()
        found += [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    finally:
        gc.unfreeze()


def test_what_is_kept_is_seen():
    """The instrument itself."""
    before = torch.zeros(3)
    with new_tensors() as found:
        kept = {"there": torch.ones(2)}
        torch.ones(4)
    assert [x is kept["there"] for x in found] == [True]
    assert before is not None


@pytest.mark.parametrize("family", by_kind(families.FAMILIES))
@torch.no_grad()
def test_no_tensor_outlives_its_call(family: str):
    one, model = families.FAMILIES[family], model_of(family, "sdpa")
    inputs: dict[str, Any] = one.batch([one.sample(0, 2), one.sample(1, 1)])
    for name in (*EARLY[: 2 * ("vit" in one.stages)], *NAMES):
        fields = SHALLOW.get(name, {"layers": "2 3 4"} if name == "sparsevlm" else {})
        try:
            pruned = vtp.prune(model, vtp.get_strategy(name)(**fields), processor=families.Processor())
        except PruningError:
            continue
        with pruned:
            model.generate(**inputs, max_new_tokens=2)  # what is made once per model
            pruned.events.clear()
            with new_tensors() as left:
                model.generate(**inputs, max_new_tokens=2)
                pruned.events.clear()
        host = getattr(model.model, "rope_deltas", None)  # what the host itself keeps
        kept = set() if host is None else {host.untyped_storage().data_ptr()}
        assert [tuple(x.shape) for x in left if x.untyped_storage().data_ptr() not in kept] == []
