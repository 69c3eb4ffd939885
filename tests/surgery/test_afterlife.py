"""Nothing of a call stays alive after it: no features, pixel values, masks or signals."""

from __future__ import annotations

import gc
from typing import Any

import families
import pytest
import torch
from family_runs import SHALLOW, model_of
from torch import Tensor

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError

EARLY = ("vprune", "l2")
NAMES = ("stride", "visionzip", "vtp", "fastv", "sparsevlm", "dart")


def tensors() -> dict[int, Tensor]:
    gc.collect()
    return {id(x): x for x in gc.get_objects() if isinstance(x, Tensor)}


@pytest.mark.parametrize("family", families.FAMILIES)
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
            before = tensors()
            model.generate(**inputs, max_new_tokens=2)
            pruned.events.clear()
            left = {n: x for n, x in tensors().items() if n not in before}
        host = getattr(model.model, "rope_deltas", None)  # what the host itself keeps
        kept = set() if host is None else {host.untyped_storage().data_ptr()}
        assert [tuple(x.shape) for x in left.values() if x.untyped_storage().data_ptr() not in kept] == []
