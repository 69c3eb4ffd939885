"""HiPrune against its restatement with sets."""

from __future__ import annotations

import pytest
import slow
import torch

from vtp_plugin import get_strategy


def restated(deep: list[float], shallow: list[float], columns: int, k: int, alpha: float) -> list[int]:
    n = len(deep)
    anchors = slow.ranked(shallow)[: round(alpha * k / 5)]
    near = {min(n - 1, max(0, a + step)) for a in anchors for step in (-1, 1, -columns, columns)} - set(anchors)
    order = anchors_first(anchors, deep) + [i for i in slow.ranked(deep) if i in near]
    order += [i for i in slow.ranked(deep) if i not in near and i not in anchors]
    return sorted(order[:k])


def anchors_first(anchors: list[int], deep: list[float]) -> list[int]:
    return sorted(anchors, key=lambda i: (-deep[i], i))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("grid", "k"), [((1, 1), 1), ((6, 8), 10), ((6, 8), 30), ((8, 6), 47)])
def test_as_described(grid: tuple[int, int], k: int, alpha: float):
    n = grid[0] * grid[1]
    seen = slow.visual(torch.zeros(2, n, 3), grid, received=slow.attention(2, n), shallow_received=slow.attention(2, n))
    kept = get_strategy("hiprune")(keep_tokens=k, alpha=alpha).decide(seen)
    rows = zip(seen.received.tolist(), seen.shallow_received.tolist(), strict=True)
    assert slow.columns(kept) == [restated(deep, shallow, grid[1], k, alpha) for deep, shallow in rows]


def test_without_anchors_it_is_the_attention_received():
    seen = slow.visual(torch.zeros(2, 40, 3), received=slow.attention(2, 40), shallow_received=slow.attention(2, 40))
    kept = get_strategy("hiprune")(keep_tokens=9, alpha=0.0).decide(seen)
    assert slow.columns(kept) == [slow.best(row.tolist(), 9) for row in seen.received]


@pytest.mark.parametrize("value", ["8", 1.5, None])
def test_a_block_is_a_whole_number(value: object):
    with pytest.raises(ValueError, match="hiprune: shallow must be a whole number"):
        get_strategy("hiprune")(shallow=value)
