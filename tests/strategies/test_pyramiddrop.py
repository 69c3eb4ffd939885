"""PyramidDrop: its counts, stage by stage, and the row that it ranks by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import slow
import torch

from vtp_plugin import get_strategy


def staged(strategy, n: int, depth: int = 32) -> list[int]:
    """Tokens after every cut of one image of n tokens."""
    stages, counts = len(strategy.cut_layers(depth)), [n]
    for stage in range(stages):
        seen = slow.visual(torch.zeros(1, counts[-1], 2), cut=(stage, stages), entered=n)
        counts.append(strategy.wanted(seen))
    return counts[1:]


def test_the_papers_stages():
    strategy = get_strategy("pyramiddrop")()
    assert strategy.cut_layers(32) == (8, 16, 24)
    assert staged(strategy, 576) == [288, 144, 72]


@pytest.mark.parametrize("n", [1, 2, 7, 36, 576])
@pytest.mark.parametrize(
    "hyper", [{"keep_ratio": 0.125}, {"keep_ratio": 0.5, "layers": [2, 5]}, {"keep_tokens": 5}, {"keep_ratio": 1.0}]
)
def test_counts_fall_to_the_budget(hyper: dict, n: int):
    strategy = get_strategy("pyramiddrop")(**hyper)
    counts = staged(strategy, n)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == strategy.count(n)
    if "keep_ratio" in hyper:
        m = len(counts)
        assert counts == [
            max(strategy.count(n), int(n * hyper["keep_ratio"] ** (s / m) + 1e-6)) for s in range(1, m + 1)
        ]


@pytest.mark.parametrize("kind", ["random", "equal"])
@pytest.mark.parametrize("query", ["next", "previous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_row_ranks(query: str, kind: str, dtype: torch.dtype):
    rows = {"next_query_attention": slow.attention(1, 36), "last_query_attention": slow.attention(1, 36)}
    if kind == "equal":
        rows = {name: torch.full((1, 36), 0.01) for name in rows}
    strategy, kept = get_strategy("pyramiddrop")(query=query), list(range(36))
    row = rows["next_query_attention" if query == "next" else "last_query_attention"][0].tolist()
    for stage, number in enumerate((18, 9, 4)):
        here = {name: row[:, kept] for name, row in rows.items()}
        seen = slow.visual(torch.zeros(1, len(kept), 2, dtype=dtype), cut=(stage, 3), entered=36, **here)
        kept = [kept[i] for i in slow.columns(strategy.decide(seen))[0]]
        assert kept == slow.best(row, number)


def test_an_earlier_cut_by_somebody_else_is_no_matter():
    strategy = get_strategy("pyramiddrop")()
    seen = slow.visual(torch.zeros(1, 3, 2), cut=(0, 3), entered=36, next_query_attention=torch.rand(1, 3))
    assert strategy.decide(seen).keeps_all
    assert strategy.wanted(replace(seen, entered=None)) == 1


@pytest.mark.parametrize("layers", ["8 16 24", [8, 16, 24]])
def test_layers_as_text_or_list(layers: object):
    assert get_strategy("pyramiddrop")(layers=layers).cut_layers(32) == (8, 16, 24)


@pytest.mark.parametrize("layers", [0, "", "3 2", "a", [2, 2], 1.5, []])
def test_wrong_layers_are_refused(layers: object):
    with pytest.raises(ValueError, match="pyramiddrop: layers must be like '8 16 24', got"):
        get_strategy("pyramiddrop")(layers=layers)


@pytest.mark.parametrize(("depth", "layers"), [(2, (1,)), (4, (1, 2, 3)), (40, (10, 20, 30))])
def test_stages_scale_with_the_depth(depth: int, layers: tuple):
    assert get_strategy("pyramiddrop")().cut_layers(depth) == layers
