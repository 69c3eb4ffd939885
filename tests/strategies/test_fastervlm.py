"""FasterVLM and HiRED (one view): top-k of CLS attention; and `invert`, which every ranking method has."""

from __future__ import annotations

import math

import pytest
import slow
import torch

from vtp_plugin import get_strategy, list_strategies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 36, 61])
@pytest.mark.parametrize("name", ["fastervlm", "hired"])
def test_the_most_attended_patches_stay(name: str, n: int, dtype: torch.dtype):
    seen = slow.visual(slow.tokens("random", n, dtype=dtype), cls_attention=slow.attention(2, n))
    k = max(1, round(0.25 * n)) if name == "fastervlm" else max(1, math.floor(0.2 * n + 1e-6))
    expected = [slow.best(row.tolist(), k) for row in seen.cls_attention]
    assert slow.columns(get_strategy(name)().decide(seen)) == expected


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 144), (0.1, 58), (0.05, 29)])
def test_fastervlms_settings(ratio: float, kept: int):
    assert get_strategy("fastervlm")(keep_ratio=ratio).count(576) == kept


def test_hireds_setting():
    assert get_strategy("hired")().count(576) == 115


def test_equal_attention_keeps_the_beginning():
    seen = slow.visual(torch.randn(1, 9, 3), cls_attention=torch.ones(1, 9))
    assert slow.columns(get_strategy("fastervlm")(keep_tokens=4).decide(seen)) == [[0, 1, 2, 3]]


def test_fastervlm_is_visionzips_dominant_part_without_cls():
    seen = slow.visual(
        torch.randn(1, 40, 4),
        cls_attention=slow.attention(1, 40),
        keys=torch.randn(1, 40, 3),
        cls=torch.randn(1, 4),
    )
    zipped = slow.columns(get_strategy("visionzip")(dominant=12, contextual=3).decide(seen))[0]
    assert zipped[1:12] == slow.columns(get_strategy("fastervlm")(keep_tokens=11).decide(seen))[0]


def test_inverted_it_keeps_the_least_attended_ones():
    seen = slow.visual(torch.randn(2, 20, 3), cls_attention=slow.attention(2, 20))
    kept = get_strategy("fastervlm")(keep_tokens=7, invert=True).decide(seen)
    assert slow.columns(kept) == [slow.best((-row).tolist(), 7) for row in seen.cls_attention]


def test_ties_go_to_the_lower_index_in_an_inverted_ranking_too():
    seen = slow.visual(torch.randn(1, 9, 3), cls_attention=torch.ones(1, 9))
    assert slow.columns(get_strategy("fastervlm")(keep_tokens=4, invert=True).decide(seen)) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("name", list_strategies())
def test_only_methods_that_rank_can_be_inverted(name: str):
    cls = get_strategy(name)
    if "invert" in cls.fields():
        assert cls(invert=True).invert
    else:
        with pytest.raises(ValueError, match=f"{name}: invert needs a method that ranks"):
            cls(invert=True)
