"""Slow, explicit pieces for the restatements of the catalogue's methods: lists and loops in double precision.

Nothing is imported from the methods: what a test compares was computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vtp_plugin import Selection, VisualTokens

Matrix = list[list[float]]

INPUTS = ("random", "duplicates", "constant")


def tokens(kind: str, n: int, d: int = 6, b: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Features [b, n, d]: random; only five distinct directions, repeated; all equal."""
    x = torch.randn(b, n, d)
    if kind == "duplicates":
        x = x[:, torch.arange(n) % min(5, n)]
    if kind == "constant":
        x = x[:, :1].expand(b, n, d).clone()
    return x.to(dtype)


def visual(x: Tensor, grid: tuple[int, int] | None = None, **signals: object) -> VisualTokens:
    b, n, _ = x.shape
    return VisualTokens(tokens=x, grid=grid or (1, n), index=torch.arange(n).expand(b, n), **signals)


def video(x: Tensor, film: tuple[int, int, int], slots: Tensor | None = None, **signals: object) -> VisualTokens:
    """Tokens [b, n, d] of films of so many frames, rows and columns, at slots [b, n] of these; by default at all."""
    frames, rows, columns = film
    index = torch.arange(x.shape[1]).expand(x.shape[:2]) if slots is None else slots
    cell = torch.stack([index // columns % rows, index % columns], dim=-1)
    where = {"film": film, "frame": index // (rows * columns), "cell": cell}
    return VisualTokens(tokens=x, grid=(frames * rows, columns), index=index, **where, **signals)


def some(film: tuple[int, int, int], n: int, b: int = 2) -> Tensor:
    """n of the slots of a film, ascending, [b, n]."""
    total = film[0] * film[1] * film[2]
    return torch.stack([torch.randperm(total)[:n].sort().values for _ in range(b)])


def attention(b: int, n: int) -> Tensor:
    """Rows that sum to less than one, as those without their CLS column."""
    return torch.randn(b, n + 1).softmax(-1)[:, 1:]


def columns(selection: Selection) -> list[list[int]]:
    return [row.tolist() for row in selection.sources]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / size if size > 0 else 0.0


def cosines(x: Tensor) -> Matrix:
    """[N, D] -> N x N."""
    rows = x.double().tolist()
    return [[cosine(a, b) for b in rows] for a in rows]


def best(scores: Sequence[float], k: int) -> list[int]:
    """The k highest, ties to the lower index, ascending."""
    return sorted(ranked(scores)[:k])


def ranked(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def argmax(candidates: Sequence[int], gain: Callable[[int], float]) -> int:
    return max(candidates, key=lambda i: (gain(i), -i))


def minmax(values: Sequence[float], eps: float = 1e-6) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low + eps) for v in values]


def check_exact(selection: Selection, n: int, k: int) -> None:
    """k distinct, ascending columns in every row."""
    for row in columns(selection):
        assert len(row) == k
        assert row == sorted(set(row))
        assert 0 <= row[0] <= row[-1] < n
