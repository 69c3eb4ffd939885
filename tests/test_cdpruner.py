"""CDPruner: its greedy picks against determinants of the conditional kernel."""

from __future__ import annotations

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy


def restated(seen: VisualTokens, b: int, k: int, sign: int) -> list[int]:
    """The greedy MAP by determinants: no Cholesky, no recursion."""
    text = seen.text[b].double().tolist()
    relevance = [sign * slow.cosine(row, text) for row in seen.aligned[b].double().tolist()]
    low, high = min(relevance), max(relevance)
    r = [(v - low + 1e-6) / (high - low) if high > low else 1.0 for v in relevance]
    similarity = slow.cosines(seen.projected[b])
    n = len(r)
    kernel = torch.tensor([[r[i] * similarity[i][j] * r[j] for j in range(n)] for i in range(n)], dtype=torch.float64)
    picks: list[int] = []
    while len(picks) < k:
        others = [j for j in range(n) if j not in picks]
        picks.append(slow.argmax(others, lambda j: float(torch.linalg.det(kernel[[*picks, j]][:, [*picks, j]]))))
    return sorted(picks)


def seen_by(kind: str, n: int, d: int, dtype: torch.dtype = torch.float32) -> VisualTokens:
    aligned, text = torch.randn(2, n, 5), torch.randn(2, 5)
    return slow.visual(torch.zeros(2, n, 3), projected=slow.tokens(kind, n, d, dtype=dtype), aligned=aligned, text=text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (24, 6), (24, 12)])
def test_as_described(n: int, k: int, sign: int, dtype: torch.dtype):
    seen = seen_by("random", n, 24, dtype)
    kept = get_strategy("cdpruner")(keep_tokens=k, relevance_sign=sign).decide(seen)
    assert slow.columns(kept) == [restated(seen, b, k, sign) for b in range(2)]


@pytest.mark.parametrize("kind", ["duplicates", "constant"])
@pytest.mark.parametrize("k", [1, 5, 6, 39])
def test_more_tokens_than_directions_go_on_by_relevance(kind: str, k: int):
    seen = seen_by(kind, 40, 6)
    kept = get_strategy("cdpruner")(keep_tokens=k).decide(seen)
    slow.check_exact(kept, 40, k)
    if kind == "constant" and k > 1:
        text = seen.text[:, None]
        relevance = -torch.nn.functional.cosine_similarity(seen.aligned, text, dim=-1)
        assert slow.columns(kept) == [slow.best(row.tolist(), k) for row in relevance]


def test_equal_relevance_is_pure_diversity():
    seen = seen_by("random", 20, 30)
    seen.aligned[:] = 1.0
    kept = get_strategy("cdpruner")(keep_tokens=5).decide(seen)
    slow.check_exact(kept, 20, 5)


def test_the_kernel_of_orthogonal_tokens_keeps_the_most_relevant():
    seen = seen_by("random", 12, 12)
    seen.projected[:] = torch.eye(12)
    relevance = -torch.nn.functional.cosine_similarity(seen.aligned, seen.text[:, None], dim=-1)
    kept = get_strategy("cdpruner")(keep_tokens=5).decide(seen)
    assert slow.columns(kept) == [slow.best(row.tolist(), 5) for row in relevance]
