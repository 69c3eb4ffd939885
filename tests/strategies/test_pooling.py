"""Pooling: average pooling where it exists, and exactly K equal cells where it does not."""

from __future__ import annotations

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy


def restated(x: torch.Tensor, rows: int, cols: int, height: int, width: int) -> list[list[float]]:
    """Cells of height x width on a full grid."""
    pooled = []
    for u in range(0, rows, height):
        for v in range(0, cols, width):
            members = [x[(u + a) * cols + v + b].double() for a in range(height) for b in range(width)]
            pooled.append((sum(members) / len(members)).tolist())
    return pooled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "cols", "height", "width"), [(12, 12, 2, 2), (12, 12, 3, 3), (6, 6, 6, 6), (4, 8, 2, 2)]
)
def test_regular_cells_are_average_pooling(rows: int, cols: int, height: int, width: int, dtype: torch.dtype):
    n = rows * cols
    seen = slow.visual(slow.tokens("random", n, dtype=dtype), grid=(rows, cols))
    selection = get_strategy("pooling")(keep_tokens=n // height // width).decide(seen)
    for x, pooled in zip(seen.tokens, selection.tokens, strict=True):
        expected = restated(x, rows, cols, height, width)
        assert torch.allclose(pooled.double(), torch.tensor(expected).double(), atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 7, 35, 64, 100, 143])
def test_every_budget_is_met_and_every_token_counts_once(k: int):
    seen = slow.visual(torch.eye(144)[None], grid=(12, 12))
    selection = get_strategy("pooling")(keep_tokens=k).decide(seen)
    assert selection.counts == [k]
    shares = (selection.tokens[0] > 0).float()
    assert shares.sum(0).tolist() == [1.0] * 144
    assert all(share[source] for share, source in zip(shares, selection.sources[0].tolist(), strict=True))


def test_holes_of_an_earlier_stage_are_no_matter():
    index = torch.tensor([[0, 1, 4, 9, 14, 15, 22, 35], [0, 1, 2, 3, 4, 5, 6, 7]])
    seen = VisualTokens(tokens=torch.randn(2, 8, 3), grid=(6, 6), index=index)
    assert get_strategy("pooling")(keep_tokens=5).decide(seen).counts == [5, 5]


def test_equal_tokens_stay_equal():
    seen = slow.visual(slow.tokens("constant", 36), grid=(6, 6))
    for x, pooled in zip(seen.tokens, get_strategy("pooling")(keep_tokens=10).decide(seen).tokens, strict=True):
        assert torch.allclose(pooled, x[:1].expand(10, -1), atol=1e-6)


def test_one_token():
    selection = get_strategy("pooling")(keep_tokens=1).decide(slow.visual(torch.randn(1, 1, 4)))
    assert selection.keeps_all
