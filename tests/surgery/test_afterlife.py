"""Nothing of a call stays alive after it: no features, pixel values, masks or signals."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from family_runs import SHALLOW, by_kind, model_of, new_tensors

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError

EARLY = ("vprune", "l2")
NAMES = ("stride", "visionzip", "vtp", "fastv", "sparsevlm", "dart")
OF_VIDEOS = ("stride", "evs", "vidcom2", "flashvid")


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
    one = families.FAMILIES[family]
    names = (*EARLY[: 2 * ("vit" in one.stages)], *NAMES)
    check(family, names, one.batch([one.sample(0, 2), one.sample(1, 1)]))


@pytest.mark.parametrize("family", by_kind(name for name, one in families.FAMILIES.items() if one.video))
@torch.no_grad()
def test_no_tensor_of_a_video_outlives_its_call(family: str):
    one = families.FAMILIES[family]
    check(family, OF_VIDEOS, one.batch([one.video(3)]))


def check(family: str, names: tuple[str, ...], inputs: dict[str, Any]) -> None:
    model = model_of(family, "sdpa")
    for name in names:
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
