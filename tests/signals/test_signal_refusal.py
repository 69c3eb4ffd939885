"""Every strategy on every kind of family: it runs and cuts, or is refused at once with the list of those that would.

The full matrix: on every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import families
import pytest
import torch
from family_runs import KINDS, SHALLOW, model_of

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError

TOKENS = {"llava_siglip": 36, "gemma3": 16}  # of every image, where families have one number
FIRST = {"fastv": 2, "dart": 2, "pyramiddrop": 2, "fitprune": 2, "sparsevlm": 1}  # where they cut first
DEEP = ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe")  # whose first three layers take up visual features


def attached(family: str, name: str) -> Any:
    strategy = vtp.get_strategy(name)(**SHALLOW.get(name, {}))
    return vtp.prune(model_of(family, "sdpa"), strategy, processor=families.Processor())


def ran(family: str, name: str) -> list[Any]:
    one = families.FAMILIES[family]
    with attached(family, name) as pruned, torch.no_grad():
        model_of(family, "sdpa")(**one.batch([one.sample(0, 1)]))
    return list(pruned.events)


def kind(case: Mapping[str, Any]) -> str:
    return case["family"] if case["family"] in KINDS else "like one of these"


@pytest.mark.covering("name kind", kind=kind)
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("name", vtp.list_strategies())
def test_it_cuts_or_is_refused_at_once(family: str, name: str):
    try:
        events = ran(family, name)
    except PruningError as error:
        message = str(error)
    else:
        assert {event.strategy for event in events} == {name}
        return
    assert "\n" not in message
    if "no CLIP checkpoint is known for a vision tower of width 32" in message:  # the tiny tower is nobody's
        return
    if name == "visionzip" and "keep_tokens" in message:  # 64 by default
        assert (
            message == f"visionzip: keep_tokens must be at most {TOKENS[family]}, the tokens of an image here, got 64"
        )
        return
    if family in DEEP and "its first 3 decoder layers" in message:
        field = vtp.get_strategy(name).cut_field
        assert message == (
            f"{name}: {field} must be in 3 ... 11 for this model, got {FIRST[name]}: "
            "its first 3 decoder layers still add features of the vision tower (deepstack)"
        )
        return
    start, _, listed = message.partition("; possible here: ")
    assert start.startswith(f"{name}: ")
    assert name not in listed.split(", ")
    for other in ("stride", "random"):
        assert other in listed.split(", ")


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("qwen2_vl", "prumerge", "it needs a class token, the vision tower of Qwen2-VL has none"),
        ("llava_next", "prumerge_plus", "it needs one class token per image, LLaVA-NeXT"),
        ("gemma3", "cdpruner", "Gemma 3 has no CLIP text encoder that matches its vision tower"),
        ("idefics3", "l2", "has no vit stage"),
        ("internvl", "tome", "merging inside the blocks is not possible"),
    ],
)
def test_the_reason_is_named_and_nothing_is_attached(family: str, name: str, reason: str):
    model = model_of(family, "sdpa")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(PruningError, match=reason):
        attached(family, name)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not hasattr(model, "_vtp_pruned")
