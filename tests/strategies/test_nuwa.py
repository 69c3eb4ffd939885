"""Nuwa's two stages against their restatements."""

from __future__ import annotations

import math

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy
from vtp_plugin.stages import Stage


def norm(vector: list[float]) -> float:
    return math.sqrt(sum(v * v for v in vector))


def chosen(seen: VisualTokens, b: int, k: int, regions: int) -> list[int]:
    keys, attention = seen.keys[b].double().tolist(), seen.cls_attention[b].double().tolist()
    salience = [a * norm(key) for a, key in zip(attention, keys, strict=True)]
    rows, columns = seen.grid
    members: dict[tuple[int, int], list[int]] = {}
    for i in range(rows * columns):
        members.setdefault((i // columns * regions // rows, i % columns * regions // columns), []).append(i)
    ranked = [sorted(own, key=lambda i: (-salience[i], i)) for own in members.values()]
    kept: list[int] = []
    while len(kept) < k:
        turn = sorted((own.pop(0) for own in ranked if own), key=lambda i: (-salience[i], i))
        kept += turn[: k - len(kept)]
    return sorted(kept)


def quartile(values: list[float]) -> float:
    ordered, place = sorted(values), 0.75 * (len(values) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])


def smoothed(seen: VisualTokens, b: int, kept: list[int], radius: float) -> torch.Tensor:
    x, values = seen.tokens[b].double(), seen.patch_values[b].double().tolist()
    norms = [norm(key) for key in seen.keys[b].double().tolist()]
    rows, columns = seen.grid
    largest, high, found = math.dist((0, 0), (rows - 1, columns - 1)), quartile(norms), []
    for i in kept:
        if norms[i] >= high - 1e-9:
            found.append(x[i])
            continue
        weights = {}
        for j in range(len(x)):
            apart = math.dist(divmod(i, columns), divmod(j, columns))
            if j == i or apart < radius * largest:
                weights[j] = max(0.0, slow.cosine(values[i], values[j]))
        found.append(sum(w * x[j] for j, w in weights.items()) / sum(weights.values()))
    return torch.stack(found)


def seen_by(grid: tuple[int, int], kind: str = "random", dtype: torch.dtype = torch.float32) -> VisualTokens:
    n = grid[0] * grid[1]
    signals = {"cls_attention": slow.attention(2, n), "keys": slow.tokens(kind, n, 5)}
    return slow.visual(slow.tokens(kind, n, dtype=dtype), grid, patch_values=slow.tokens(kind, n, 8), **signals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("regions", [1, 2, 4])
@pytest.mark.parametrize(("grid", "k"), [((2, 2), 1), ((6, 8), 5), ((6, 8), 16), ((7, 5), 34)])
def test_first_stage(grid: tuple[int, int], k: int, regions: int, dtype: torch.dtype):
    seen = seen_by(grid, dtype=dtype)
    selection = get_strategy("nuwa")(keep_tokens=k, regions=regions).decide(seen)
    for b, columns in enumerate(slow.columns(selection)):
        assert columns == chosen(seen, b, k, regions)
        torch.testing.assert_close(selection.tokens[b].double(), smoothed(seen, b, columns, 0.26), atol=1e-4, rtol=1e-4)


def test_smoothing_is_a_switch_and_has_a_radius():
    seen = seen_by((6, 6))
    plain = get_strategy("nuwa")(keep_tokens=9, smooth=False).decide(seen)
    alone = get_strategy("nuwa")(keep_tokens=9, radius=0.0).decide(seen)
    assert plain.tokens is None
    for b, columns in enumerate(slow.columns(plain)):
        torch.testing.assert_close(alone.tokens[b], seen.tokens[b, columns])


@pytest.mark.parametrize(("n", "k"), [(1, 1), (20, 7), (20, 19)])
def test_second_stage(n: int, k: int):
    strategy = get_strategy("nuwa")(at="llm", keep_tokens=k)
    assert strategy.stage is Stage.LLM
    seen = slow.visual(torch.zeros(2, n, 6), normed=torch.randn(2, n, 6), text_normed=torch.randn(2, 4, 6))
    for b, columns in enumerate(slow.columns(strategy.decide(seen))):
        text = seen.text_normed[b].double().mean(0).tolist()
        assert columns == slow.best([slow.cosine(row, text) for row in seen.normed[b].double().tolist()], k)


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize("k", [1, 7, 35])
def test_exactly_k(kind: str, k: int):
    slow.check_exact(get_strategy("nuwa")(keep_tokens=k).decide(seen_by((6, 6), kind)), 36, k)
