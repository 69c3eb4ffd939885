"""VScan's first stage against its restatement with lists."""

from __future__ import annotations

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy


def chosen(seen: VisualTokens, b: int, k: int, window: int) -> list[int]:
    local, deep = seen.shallow_attention[b].double().tolist(), seen.cls_attention[b].double().tolist()
    rows, columns = seen.grid
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(rows * columns):
        windows.setdefault((i // columns // window, i % columns // window), []).append(i)
    ranked = [sorted(members, key=lambda i: (-local[i], i)) for members in windows.values()]
    kept: list[int] = []
    while len(kept) < k // 2:
        turn = sorted((members.pop(0) for members in ranked if members), key=lambda i: (-local[i], i))
        kept += turn[: k // 2 - len(kept)]
    rest = [i for i in slow.ranked(deep) if i not in kept]
    return sorted(kept + rest[: k - k // 2])


def averaged(seen: VisualTokens, b: int, kept: list[int]) -> torch.Tensor:
    x, similarity = seen.tokens[b].double(), slow.cosines(seen.projected[b])
    groups = {i: [i] for i in kept}
    for j in range(len(x)):
        if j not in kept:
            groups[slow.argmax(kept, lambda i: similarity[j][i])].append(j)  # noqa: B023
    return torch.stack([x[group].mean(0) for group in groups.values()])


def seen_by(grid: tuple[int, int], kind: str = "random", dtype: torch.dtype = torch.float32) -> VisualTokens:
    n = grid[0] * grid[1]
    attention = {name: slow.attention(2, n) for name in ("cls_attention", "shallow_attention")}
    return slow.visual(
        slow.tokens(kind, n, dtype=dtype), grid, projected=slow.tokens(kind, n, 7, dtype=dtype), **attention
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [1, 2, 6])
@pytest.mark.parametrize(("grid", "k"), [((1, 1), 1), ((6, 8), 1), ((6, 8), 12), ((7, 5), 13), ((6, 6), 35)])
def test_as_described(grid: tuple[int, int], k: int, window: int, dtype: torch.dtype):
    seen = seen_by(grid, dtype=dtype)
    selection = get_strategy("vscan")(keep_tokens=k, window=window).decide(seen)
    for b, columns in enumerate(slow.columns(selection)):
        assert columns == chosen(seen, b, k, window)
        if selection.tokens is not None:
            torch.testing.assert_close(selection.tokens[b].double(), averaged(seen, b, columns), atol=1e-4, rtol=1e-4)


def test_dropping_instead_of_averaging():
    seen = seen_by((6, 6))
    one, other = (get_strategy("vscan")(keep_tokens=9, merge=merge).decide(seen) for merge in (True, False))
    assert one.keep.equal(other.keep)
    assert one.tokens is not None
    assert other.tokens is None


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize("k", [1, 7, 35])
def test_exactly_k(kind: str, k: int):
    slow.check_exact(get_strategy("vscan")(keep_tokens=k).decide(seen_by((6, 6), kind)), 36, k)
