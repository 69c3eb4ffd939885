"""HoloV against its restatement with lists."""

from __future__ import annotations

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy


def restated(seen: VisualTokens, b: int, k: int, segments: int, context: float) -> list[int]:
    similarity, attention = slow.cosines(seen.projected[b]), seen.cls_attention[b].double().tolist()
    n, segments = len(attention), min(segments, len(attention))
    sizes = [n // segments + (s < n % segments) for s in range(segments)]
    starts = [sum(sizes[:s]) for s in range(segments)]
    pieces = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    variance = [0.0] * n
    for piece in pieces:
        for i in piece:
            others = [similarity[i][j] for j in piece if j != i]
            mean = sum(others) / max(1, len(others))
            variance[i] = sum((v - mean) ** 2 for v in others) / max(1, len(others))
    scale = sum(1000 * a for a in attention) / max(sum(variance), 1e-12 * n)
    scores = [1000 * a + context * v * scale for a, v in zip(attention, variance, strict=True)]
    worth = [sum(scores[i] for i in piece) / len(piece) for piece in pieces]
    quotas = [min(int(k * w / sum(worth)), size) for w, size in zip(worth, sizes, strict=True)]
    best = slow.ranked(worth)
    turn = 0
    while sum(quotas) < k:
        piece = best[turn % segments]
        quotas[piece] += quotas[piece] < sizes[piece]
        turn += 1
    kept = []
    for piece, quota in zip(pieces, quotas, strict=True):
        kept += sorted(piece, key=lambda i: (-attention[i], i))[:quota]
    return kept


def seen_by(kind: str, n: int, dtype: torch.dtype = torch.float32) -> VisualTokens:
    projected = slow.tokens(kind, n, dtype=dtype)
    return slow.visual(torch.zeros(2, n, 3), projected=projected, cls_attention=slow.attention(2, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("context", [0.0, 0.09, 3.0])
@pytest.mark.parametrize("segments", [1, 4, 16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 2), (48, 1), (50, 13), (50, 49)])
def test_as_described(n: int, k: int, segments: int, context: float, dtype: torch.dtype):
    seen = seen_by("random", n, dtype)
    kept = get_strategy("holov")(keep_tokens=k, segments=segments, context=context).decide(seen)
    assert slow.columns(kept) == [restated(seen, b, k, segments, context) for b in range(2)]


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize("k", [1, 5, 39])
def test_exactly_k_and_nothing_twice(kind: str, k: int):
    kept = get_strategy("holov")(keep_tokens=k, order="raster").decide(seen_by(kind, 40))
    slow.check_exact(kept, 40, k)


def test_a_stretch_that_is_full_gives_to_the_next():
    attention = torch.full((1, 32), 0.001)
    attention[0, 8:10] = 0.4  # two tokens of one stretch are worth nearly everything
    seen = slow.visual(torch.zeros(1, 32, 3), projected=torch.randn(1, 32, 6), cls_attention=attention)
    (kept,) = slow.columns(get_strategy("holov")(keep_tokens=12, order="raster").decide(seen))
    assert len(kept) == 12
    assert {8, 9} <= set(kept)


def test_raster_order_is_a_switch():
    seen = seen_by("random", 64)
    by_score, by_place = (get_strategy("holov")(keep_tokens=20, order=o).decide(seen) for o in ("score", "raster"))
    for one, other in zip(slow.columns(by_score), slow.columns(by_place), strict=True):
        assert one != other == sorted(one)
