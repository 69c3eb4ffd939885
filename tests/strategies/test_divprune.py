"""DivPrune against its pair-by-pair restatement."""

from __future__ import annotations

import pytest
import slow
import torch
from torch import Tensor

from vtp_plugin import get_strategy


def restated(z: Tensor, k: int, weight: list[float] | None = None, centred: bool = False) -> list[int]:
    similarity = slow.cosines(z.double() - z.double().mean(0) if centred else z)
    n = len(similarity)
    weight = weight or [1.0] * n
    distance = [[weight[j] * (1 - similarity[i][j]) for j in range(n)] for i in range(n)]
    picks: list[int] = []
    while len(picks) < k:
        others = [j for j in range(n) if j not in picks]
        rivals = picks or range(n)
        picks.append(slow.argmax(others, lambda j: min([distance[i][j] for i in rivals if i != j], default=0.0)))  # noqa: B023
    return sorted(picks)


def test_the_papers_setting():
    assert get_strategy("divprune")().count(576) == 56


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (30, 7), (30, 29), (40, 20)])
def test_as_described(n: int, k: int, dtype: torch.dtype):
    z = slow.tokens("random", n, d=9, dtype=dtype)
    kept = get_strategy("divprune")(keep_tokens=k).decide(slow.visual(torch.zeros(2, n, 3), projected=z))
    assert slow.columns(kept) == [restated(row, k) for row in z]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight", ["norm", "attention", "distinctiveness"])
@pytest.mark.parametrize(("n", "k"), [(6, 1), (30, 7), (30, 29)])
def test_weights(n: int, k: int, weight: str, dtype: torch.dtype):
    z, attention = slow.tokens("random", n, d=9, dtype=dtype), slow.attention(2, n)
    strategy = get_strategy("divprune")(keep_tokens=k, weight=weight)
    assert ("cls_attention" in strategy.needs) is (weight == "attention")
    kept = slow.columns(strategy.decide(slow.visual(torch.zeros(2, n, 3), projected=z, cls_attention=attention)))
    for row, row_attention, columns in zip(z, attention, kept, strict=True):
        similarity = slow.cosines(row)
        weights = {
            "norm": row.double().norm(dim=-1).tolist(),
            "attention": row_attention.tolist(),
            "distinctiveness": slow.minmax([-sum(alike) / n for alike in similarity]),
        }
        assert columns == restated(row, k, weights[weight], centred=weight == "distinctiveness")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["duplicates", "constant"])
def test_no_token_is_picked_twice(kind: str, dtype: torch.dtype):
    z = slow.tokens(kind, 64, dtype=dtype)
    kept = get_strategy("divprune")(keep_tokens=16).decide(slow.visual(torch.zeros(2, 64, 3), projected=z))
    slow.check_exact(kept, 64, 16)
    if kind == "duplicates":
        assert all({i % 5 for i in row} == set(range(5)) for row in slow.columns(kept))


def test_lengths_do_not_matter():
    z = torch.randn(1, 30, 8)
    longer = z * (torch.rand(1, 30, 1) + 0.5)
    kept = [get_strategy("divprune")(keep_tokens=9).decide(slow.visual(z, projected=v)) for v in (z, longer)]
    assert kept[0].keep.equal(kept[1].keep)
